"""Files and corpora as documents, their parts, and what is said about what cannot be read."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateur.data.corpora import joined, split_documents
from secateur.data.texts import Text, fingerprint, head_and_tail, load_text
from secateur.errors import UsageError

DOCUMENTS = ["First one.\n\nIts second paragraph.", "Zweites, äöü €", "third"]


def test_plain_text_is_one_document_unless_separated(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("a\n\nb\n", encoding="utf-8")
    (tmp_path / "three.txt").write_text(joined(DOCUMENTS), encoding="utf-8")
    assert load_text(tmp_path / "one.txt").documents == ["a\n\nb"]
    assert load_text(str(tmp_path / "three.txt")).documents == DOCUMENTS


def _write_parquet(path: Path, columns: dict) -> None:
    arrow = pytest.importorskip("pyarrow", reason="needs the extra 'data'")
    from pyarrow import parquet

    parquet.write_table(arrow.table(columns), path)


def test_the_same_documents_from_every_format_have_the_same_hash(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text(joined(DOCUMENTS), encoding="utf-8")
    lines = [json.dumps({"text": d, "id": i}) for i, d in enumerate(DOCUMENTS)]
    (tmp_path / "t.jsonl").write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    _write_parquet(tmp_path / "t.parquet", {"id": [1, 2, 3], "text": DOCUMENTS})
    texts = [load_text(tmp_path / f"t.{kind}") for kind in ("txt", "jsonl", "parquet")]
    assert [t.documents for t in texts] == [DOCUMENTS] * 3
    assert {t.sha256 for t in texts} == {fingerprint(DOCUMENTS)}
    assert texts[1].record()["documents"] == 3


def test_the_fingerprint_sees_where_documents_end() -> None:
    assert fingerprint(["ab", "c"]) != fingerprint(["a", "bc"]) != fingerprint(["abc"])


def test_pydoc_needs_no_download_and_its_parts_do_not_overlap() -> None:
    whole, train, test = (load_text(f"pydoc:{part}") for part in ("all", "train", "test"))
    assert load_text("pydoc", split="test") == test
    assert (train.name, train.split, train.licence) == ("pydoc", "train", "PSF-2.0")
    letters = ["".join("".join(t.documents).split()) for t in (train, test, whole)]
    assert letters[0] + letters[1] == letters[2]
    assert 0.085 < test.characters / whole.characters < 0.115


def test_an_explicit_part_of_a_file_wins_over_the_default(tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_text("\n\n".join(f"paragraph {i}" for i in range(100)), encoding="utf-8")
    assert load_text(f"{path}:test", split="train").documents == load_text(path, "test").documents
    assert load_text(path, "test").documents[0].startswith("paragraph 9")


@given(st.lists(st.text("ab \n", min_size=1).map(str.strip).filter(bool), min_size=1, max_size=6))
def test_head_and_tail_lose_no_word(documents: list[str]) -> None:
    head, tail = head_and_tail(documents, 0.3)
    assert "".join("".join(head + tail).split()) == "".join("".join(documents).split())
    assert all(document.strip() for document in head + tail)


@pytest.mark.parametrize("share", [0.05, 0.1, 0.5])
def test_the_cut_falls_at_a_paragraphs_end(share: float) -> None:
    document = "\n\n".join(f"paragraph {i:04d}" for i in range(500))
    (head,), (tail,) = head_and_tail([document], share)
    assert head[-4:].isdigit()
    assert tail.startswith("paragraph")
    assert abs(len(tail) / len(document) - share) < 0.01


def test_separated_documents_come_back() -> None:
    assert split_documents(joined(DOCUMENTS)) == DOCUMENTS
    assert split_documents("\r\n".join(joined(DOCUMENTS).split("\n"))) == DOCUMENTS
    assert split_documents("<|endoftext|>\n\na\n<|endoftext|>\n") == ["a"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.txt", b"  \n\n ", "no text"),
        ("latin.txt", b"caf\xe9", "UTF-8"),
        ("broken.jsonl", b'{"text": "a"}\n{"text": ', "line 2 is not JSON"),
        ("other.jsonl", b'{"content": "a"}', "no string field 'text' \\(it has: content\\)"),
        ("list.jsonl", b"[1]", "no string field 'text'"),
        ("number.jsonl", b'{"text": "a"}\n{"text": 3}', "row 2"),
        ("broken.parquet", b"PAR1 not really", "not a Parquet file"),
    ],
)
def test_unreadable_files_are_named(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow", reason="needs the extra 'data'")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=words) as caught:
        load_text(tmp_path / name)
    assert name in str(caught.value)


def test_a_parquet_file_without_texts_names_its_columns(tmp_path: Path) -> None:
    _write_parquet(tmp_path / "t.parquet", {"body": ["a"]})
    with pytest.raises(UsageError, match="it has: body"):
        load_text(tmp_path / "t.parquet")
    _write_parquet(tmp_path / "t.parquet", {"text": ["a", None]})
    with pytest.raises(UsageError, match="row 2"):
        load_text(tmp_path / "t.parquet")


def test_a_wrong_name_is_answered_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="did you mean 'shakespeare'"):
        load_text("shakespear")
    (tmp_path / "valid.txt").write_text("x")
    with pytest.raises(UsageError, match=r"did you mean '.*valid\.txt'"):
        load_text(tmp_path / "vaild.txt")
    with pytest.raises(UsageError, match="a folder"):
        load_text(tmp_path)


@pytest.mark.parametrize("spec", ["pydoc:trian", "pydoc:valid"])
def test_a_part_that_is_not_there(spec: str) -> None:
    with pytest.raises(UsageError, match="part") as caught:
        load_text(spec)
    assert "train" in str(caught.value)


def test_text_of_documents_in_memory() -> None:
    text = Text.of(["ab", "c"], "mine")
    assert (text.characters, text.split, text.sha256) == (3, "all", fingerprint(["ab", "c"]))
