"""Streams: every token once and in order, the same windows from any place, little memory."""

import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.data import documents, packing
from secateur.data import token_stream as streams
from secateur.data.corpora import split_documents
from secateur.data.documents import InMemory, open_file
from secateur.data.packing import Joints, Mark, packed, tokenised
from secateur.data.stream import open_stream
from secateur.data.texts import Text
from secateur.errors import SecateurError, UsageError
from secateur.models.tiny import tiny_model, tiny_tokenizer
from secateur.training.hooks import Hook
from secateur.training.loop import fit
from secateur.training.settings import TrainSettings

TOKENIZER = tiny_tokenizer()  # one token a byte, no BOS of its own
EOS = TOKENIZER.eos_token_id
TEXTS = st.lists(
    st.text(st.sampled_from("ab é€😀\n \t"), min_size=0, max_size=60), min_size=1, max_size=6
)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(documents, "STRETCH", 16)
    monkeypatch.setattr(packing, "TOGETHER", 40)


def ids_of(texts):
    return [t for text in texts for t in [*TOKENIZER(text)["input_ids"], EOS]]


def memory(texts):
    return InMemory(texts, {"name": "documents"})


def all_tokens(stream):
    """All windows of one pass, in the order of the text."""
    out, number = [], 0
    while len(windows := stream.windows(number)):
        out += windows.reshape(-1).tolist()
        number += 1
    return out


def written(folder: Path, kind: str, texts: list[str]) -> Path:
    path = folder / f"t.{kind}"
    if kind == "txt":
        path.write_text("\n<|endoftext|>\n".join(texts), encoding="utf-8")
    elif kind == "jsonl":
        path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    else:
        arrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(arrow.table({"text": texts}), path, row_group_size=3)
    return path


WORDS = [f"document {i} has {'many ' * i}words\n\nand €uros {i}" for i in range(11)]


# -- packing -------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(TEXTS, st.integers(1, 40))
def test_every_token_is_in_one_block_once_and_in_order(texts, size):
    kept = [t for t in texts if t.strip()]
    pieces = list(tokenised([memory(texts)], TOKENIZER, Joints((), (EOS,)), Mark()))
    blocks = list(packed(pieces, 0, size))
    assert [len(ids) for ids, _ in blocks[:-1]] == [size] * (len(blocks) - 1)
    assert len(blocks[-1][0]) < size
    assert [following is None for _, following in blocks] == [False] * (len(blocks) - 1) + [True]
    assert np.concatenate([ids for ids, _ in blocks]).tolist() == ids_of(kept)


@settings(max_examples=40, deadline=None)
@given(TEXTS, st.integers(1, 25))
def test_a_block_is_the_same_from_its_mark_as_from_the_start(texts, size):
    sources = [memory(texts), memory(texts[::-1])]
    joints = Joints((1, 1), (EOS,))

    def blocks(mark):
        return list(packed(tokenised(sources, TOKENIZER, joints, mark), mark.skip, size))

    whole = blocks(Mark())
    for number, (_, following) in enumerate(whole):
        if following is not None:
            again = Mark(**json.loads(json.dumps(vars(following))))  # as it is kept in a file
            rest = blocks(again)
            assert [ids.tolist() for ids, _ in rest] == [
                ids.tolist() for ids, _ in whole[number + 1 :]
            ]


def test_documents_begin_as_the_tokenizer_begins_them_and_end_with_the_separator():
    from tokenizers import processors

    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    assert Joints.of(tokenizer, None) == Joints((1,), (EOS,))
    assert Joints.of(TOKENIZER, "\n").end == tuple(TOKENIZER("\n")["input_ids"])


# -- reading -------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(st.text(st.sampled_from("ab €😀\n\r \t"), max_size=120), st.booleans(), st.data())
def test_plain_text_in_pieces_is_the_text_read_whole(tmp_path_factory, text, bom, data):
    parts = text.split("\r")
    text = "\n".join(parts)
    for _ in range(data.draw(st.integers(0, 3))):
        place = data.draw(st.integers(0, len(text)))
        text = text[:place] + "\n<|endoftext|>\n" + text[place:]
    path = tmp_path_factory.mktemp("plain") / "t.txt"
    path.write_bytes(b"\xef\xbb\xbf" * bom + text.encode() or b" ")
    found, pieces = [], list(open_file(path).pieces())
    for piece in pieces:
        assert piece.first == (not found or found[-1][1])
        if piece.first:
            found.append(["", False])
        found[-1] = [found[-1][0] + piece.text, piece.last]
    assert [document for document, _ in found] == split_documents(text)
    assert all(ended for _, ended in found)
    for number, piece in enumerate(pieces):
        assert list(open_file(path).pieces(json.loads(json.dumps(piece.at)))) == pieces[number:]


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_every_format_gives_the_same_windows_from_any_place(tmp_path, kind):
    path = written(tmp_path, kind, WORDS)
    stream = open_stream(path, TOKENIZER, 7, block=3)
    expected = ids_of(WORDS)
    assert all_tokens(stream) == expected[: len(expected) // 7 * 7]
    assert stream.total == len(expected) // 7
    pieces = list(open_file(path).pieces())
    for number, piece in enumerate(pieces):
        assert list(open_file(path).pieces(piece.at)) == pieces[number:]


def test_windows_line_ends_and_line_ends_are_one(tmp_path):
    (tmp_path / "t.txt").write_bytes(b"one\r\ntwo\r\n<|endoftext|>\r\nthree\r\n")
    pieces = list(open_file(tmp_path / "t.txt").pieces())
    assert [(p.text, p.first, p.last) for p in pieces] == [
        ("one\ntwo", True, True),
        ("three", True, True),
    ]


def test_several_files_and_patterns_follow_one_another_in_a_drawn_order(tmp_path):
    for i in range(5):
        (tmp_path / f"{i}.jsonl").write_text(json.dumps({"body": f"text {i} " * 9}) + "\n")
    options = {"field": "body", "block": 4}
    one = open_stream(tmp_path / "*.jsonl", TOKENIZER, 8, seed=1, **options)
    again = open_stream(
        [tmp_path / f"{i}.jsonl" for i in range(5)], TOKENIZER, 8, seed=1, **options
    )
    other = open_stream(str(tmp_path / "*.jsonl"), TOKENIZER, 8, seed=2, **options)
    assert one.fingerprint == again.fingerprint != other.fingerprint
    assert all_tokens(one) == all_tokens(again)
    assert all_tokens(one) != all_tokens(other)
    assert {t["name"] for t in one.record["texts"]} == {f"{i}.jsonl" for i in range(5)}


def test_a_stream_of_datasets_goes_on_from_its_state(tmp_path):
    datasets = pytest.importorskip("datasets")
    written(tmp_path, "jsonl", WORDS)
    rows = [{"text": t} for t in WORDS]

    def fresh():
        return datasets.IterableDataset.from_generator(lambda: iter(rows))

    expected = ids_of(WORDS)
    index = tmp_path / "index.jsonl"
    assert (
        all_tokens(open_stream(fresh(), TOKENIZER, 6, block=4, index=index))
        == (expected[: len(expected) // 6 * 6])
    )
    late = open_stream(fresh(), TOKENIZER, 6, block=4, index=index)
    seen = []
    late.sources[0].documents = _watched(late.sources[0].documents, seen)
    assert late.windows(9).reshape(-1).tolist() == expected[9 * 24 : 10 * 24]
    assert seen[0][0][0] > 3  # it did not begin at the first row
    stored = datasets.Dataset.from_list(rows)
    assert (
        all_tokens(open_stream(stored, TOKENIZER, 6, block=4))
        == (expected[: len(expected) // 6 * 6])
    )


def _watched(documents_of, seen):
    def watched(at=None):
        for place, text in documents_of(at):
            seen.append((place, text))
            yield place, text

    return watched


# -- order ---------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(1, 7), st.integers(0, 3), st.data())
def test_each_pass_takes_every_window_once_whatever_the_batches(block, batch, seed, data):
    def fresh():
        return open_stream(Text.of(WORDS), TOKENIZER, 16, block=block, epochs=3)

    total = len(ids_of(WORDS)) // 16
    order, rows = fresh().order(seed), []
    while len(rows) + batch <= 3 * total:
        rows += order.rows(len(rows), batch)
    assert len(set(rows[:total])) == total
    assert {row // block for row in rows[:block]} == {0}
    if batch == 1:
        assert sorted(rows[total : 2 * total]) == list(range(total))
        assert rows[:total] != rows[total : 2 * total] or block == 1
    start = data.draw(st.integers(0, len(rows) - 1))
    assert fresh().order(seed).rows(start, len(rows) - start) == rows[start:]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 12), st.integers(1, 9))
def test_what_is_set_aside_is_in_no_batch(aside, block):
    whole = open_stream(Text.of(WORDS), TOKENIZER, 16, block=block)
    stream = open_stream(Text.of(WORDS), TOKENIZER, 16, block=block, held_out=aside, epochs=2)
    total = len(ids_of(WORDS)) // 16
    rows = stream.order(0).rows(0, 2 * (total - aside))
    for turn in (rows[: total - aside], rows[total - aside :]):
        assert sorted(turn) == list(range(aside, total))
    assert stream.total == total - aside
    with pytest.raises(UsageError, match="in each of 2 passes"):
        stream.order(0).rows(len(rows), 1)
    if aside:
        assert torch.equal(stream.held.ids, whole.batch(range(aside)).ids)
        assert stream.fingerprint != whole.fingerprint
    else:
        assert stream.held is None


def test_another_seed_is_another_order_of_the_same_blocks():
    stream = open_stream(Text.of(WORDS), TOKENIZER, 16, block=8)
    one, other = stream.order(0).rows(0, 16), stream.order(1).rows(0, 16)
    assert one != other
    assert sorted(one[:8]) == sorted(other[:8]) == list(range(8))


def test_a_batch_larger_than_a_block_reads_no_block_twice(monkeypatch):
    stream = open_stream(Text.of(WORDS), TOKENIZER, 4, block=2)
    rows = stream.order(0).rows(0, 24)
    read = []
    original = stream._read
    monkeypatch.setattr(stream, "_read", lambda number: read.append(number) or original(number))
    ids = stream.batch(rows).ids
    assert read == []
    flat = ids_of(WORDS)
    assert ids.tolist() == [flat[4 * r : 4 * r + 4] for r in rows]


# -- training ------------------------------------------------------------------------------------


class Stop(Exception):
    pass


class StopAt(Hook):
    def __init__(self, step):
        self.step = step

    def after_step(self, at):
        if at.step == self.step:
            raise Stop


SETTINGS = {"steps": 9, "batch": 3, "micro_batch": 2, "checkpoint_every": 2, "lr": 1e-3}


@pytest.mark.parametrize("indexed", [True, False])
def test_a_killed_training_sees_the_windows_it_would_have_seen(tmp_path, indexed):
    path = written(tmp_path, "jsonl", WORDS)

    def train(folder, hooks=()):
        index = folder / "stream.jsonl" if indexed else None
        data = open_stream(path, TOKENIZER, 16, block=4, index=index, epochs=2)
        settings = TrainSettings(**SETTINGS)
        return fit(tiny_model("llama"), data, settings, folder=folder, hooks=hooks)

    whole = train(tmp_path / "whole")
    with pytest.raises(Stop):
        train(tmp_path / "killed", [StopAt(5)])
    resumed = train(tmp_path / "killed")
    assert resumed.resumed == 4
    assert resumed.losses == whole.losses


def test_where_the_text_ends_the_training_is_kept_and_goes_on_with_more_passes(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(streams, "COUNTED_TOKENS", 0)
    monkeypatch.setattr(streams, "COUNTED_BYTES", 0)
    path = written(tmp_path, "txt", WORDS[:5])
    settings = TrainSettings(**{**SETTINGS, "checkpoint_every": None})

    def data(epochs):
        return open_stream(path, TOKENIZER, 16, epochs=epochs, tokens=9 * 3 * 16)

    total = len(ids_of(WORDS[:5])) // 16
    with pytest.raises(UsageError, match=f"{total * 16} tokens, and no more") as caught:
        fit(tiny_model("llama"), data(1), settings, folder=tmp_path / "run")
    assert caught.value.field == "epochs"
    resumed = fit(tiny_model("llama"), data(None), settings, folder=tmp_path / "run")
    assert resumed.resumed == total // 3 > 1
    whole = fit(tiny_model("llama"), data(3), settings, folder=tmp_path / "whole")
    assert resumed.losses[resumed.resumed :] == whole.losses[resumed.resumed :]


def test_a_budget_beyond_the_text_is_refused_before_training():
    have = len(ids_of(WORDS)) // 16 * 16
    with pytest.raises(UsageError, match=f"{have:,} tokens, and no more") as caught:
        open_stream(Text.of(WORDS), TOKENIZER, 16, tokens=have * 2 + 1)
    assert "epochs=3" in str(caught.value)
    open_stream(Text.of(WORDS), TOKENIZER, 16, tokens=have)
    open_stream(Text.of(WORDS), TOKENIZER, 16, tokens=have * 2, epochs=2)
    open_stream(Text.of(WORDS), TOKENIZER, 16, tokens=have * 9, epochs=None)


TWO = """
import json, sys, time
import torch
torch.set_num_threads(1)
from pathlib import Path
from secateur.run.ranks import Ranks
from secateur.data.stream import open_stream
from secateur.data.texts import Text
from secateur.models.tiny import tiny_model, tiny_tokenizer
from secateur.training import checkpoint
from secateur.training.loop import fit
from secateur.training.settings import TrainSettings
ranks, folder, look = Ranks.from_environment("cpu"), Path(sys.argv[1]), checkpoint.load
def late(path):
    time.sleep(2 * ranks.rank)  # the other process could write the first checkpoint meanwhile
    return look(path)
checkpoint.load = late
texts = [f"document {i} " * (i + 3) for i in range(30)]
data = open_stream(
    Text.of(texts), tiny_tokenizer(), 16, block=8, epochs=2, index=folder / "index.jsonl"
)
settings = TrainSettings(steps=8, batch=6, lr=1e-3, optimizer="sgd", checkpoint_every=3)
fitted = fit(tiny_model("llama"), data, settings, folder=folder / "training")
if ranks.leads:
    (folder / "losses.json").write_text(json.dumps(fitted.losses))
"""


@pytest.mark.slow
def test_two_processes_see_what_one_sees(tmp_path):
    found = []
    for world in (1, 2):
        folder = tmp_path / str(world)
        folder.mkdir()
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        (tmp_path / "two.py").write_text(TWO)
        done = subprocess.run(
            [sys.executable, *(launch if world == 2 else []), tmp_path / "two.py", folder],
            capture_output=True,
            text=True,
            timeout=240,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr[-2000:]
        found.append(json.loads((folder / "losses.json").read_text()))
    assert found[0] == pytest.approx(found[1], abs=1e-5)
    one, two = (tmp_path / w / "index.jsonl" for w in "12")
    assert one.read_text() == two.read_text()


# -- marks ---------------------------------------------------------------------------------------


def test_the_index_survives_a_torn_line_and_serves_no_other_stream(tmp_path):
    path, index = written(tmp_path, "txt", WORDS), tmp_path / "index.jsonl"
    whole = all_tokens(open_stream(path, TOKENIZER, 5, block=3, index=index))
    text = index.read_text()
    for cut in (len(text) - 9, len(text) // 2, 10, 0):
        index.write_text(text[:cut])
        assert all_tokens(open_stream(path, TOKENIZER, 5, block=3, index=index)) == whole
        assert index.read_text() == text
    other = open_stream(path, TOKENIZER, 6, block=3, index=index)
    assert all_tokens(other)[:30] == whole[:30]
    assert index.read_text() != text


def test_a_text_that_changed_behind_its_fingerprint_is_noticed(tmp_path, monkeypatch):
    rows = list(WORDS)
    stream = open_stream(Text.of(rows), TOKENIZER, 8, block=2)
    all_tokens(stream)
    monkeypatch.setattr(stream.sources[0], "_documents", ["changed " + rows[0], *rows[1:]])
    with pytest.raises(UsageError, match="block 0 of the text is not what it was"):
        stream.windows(0)


# -- memory --------------------------------------------------------------------------------------


class Sparse:
    """A tokenizer that costs nothing: every 32nd byte is a token."""

    eos_token_id = 0

    def __call__(self, texts, **_):
        if isinstance(texts, str):
            return {"input_ids": list(texts.encode()[:1])}
        return {"input_ids": [list(text.encode()[::32]) for text in texts]}

    def get_vocab(self):
        return {}


@pytest.mark.parametrize("kind", ["lines", "one line", "jsonl"])
def test_a_large_file_costs_little_memory(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(documents, "STRETCH", 8192)
    monkeypatch.setattr(packing, "TOGETHER", 32_768)
    path = tmp_path / ("t.jsonl" if kind == "jsonl" else "t.txt")
    sentence = "A line of text, neither long nor short, that goes on and on. "
    with path.open("w") as file:
        for _ in range(40):
            if kind == "jsonl":
                file.write((json.dumps({"text": sentence * 16}) + "\n") * 128)
            else:
                file.write((sentence + "\n" * (kind == "lines")) * 2048)
    assert path.stat().st_size > 4.9e6
    tracemalloc.start()
    stream = open_stream(path, Sparse(), 256, block=64)
    number = 0
    while len(stream.windows(number)):
        number += 1
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert number > 8
    assert peak < 2.5e6  # hashing takes a MiB at a time


# -- bad input -----------------------------------------------------------------------------------


def bad(folder: Path, name: str, content: bytes) -> Path:
    (folder / name).write_bytes(content)
    return folder / name


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"", "the file is empty"),
        ("a.txt", b" \n\n ", "0 tokens, less than one window"),
        ("a.txt", b"few words", "10 tokens, less than one window of 16"),
        ("a.txt", b"good line\nbad \xff byte", "byte 14"),
        ("a.jsonl", b'{"body": "x"}', "no string field 'text' \\(it has: body\\)"),
        ("a.jsonl", b'{"text": "x"}\n{"text": 3}', "row 2"),
        ("a.jsonl", b'{"text": "x"}\nnothing', "line 2 is not JSON"),
        ("a.jsonl", b'{"text": "\xff"}', "byte 10"),
        ("a.parquet", b"PAR2", "not a Parquet file"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, content, words):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    with pytest.raises(UsageError, match=words) as caught:
        open_stream(bad(tmp_path, name, content), TOKENIZER, 16)
    assert caught.value.field in ("text", "length")


def test_a_parquet_file_without_the_field_names_its_columns(tmp_path):
    path = written(tmp_path, "parquet", WORDS)
    with pytest.raises(UsageError, match="'body' \\(it has: text\\)"):
        open_stream(path, TOKENIZER, 16, field="body")


def test_sources_that_are_not_there(tmp_path):
    good = written(tmp_path, "txt", WORDS)
    for sources, words in (
        (tmp_path / "t.tx", "did you mean"),
        (tmp_path, r"\*\.jsonl"),
        (f"{tmp_path}/*.json", "no file matches"),
        ([], "no text is given"),
        ([good, good], "named twice"),
        (iter(WORDS), "read from any place"),
        ("hf:a:b:c@d,e@", "not the name"),
    ):
        with pytest.raises(UsageError, match=words):
            open_stream(sources, TOKENIZER, 16)


def test_a_data_set_that_cannot_be_opened_or_read_on(tmp_path):
    datasets = pytest.importorskip("datasets")
    with pytest.raises(SecateurError, match="could not open it"):
        open_stream(f"hf:{tmp_path}/nothing", TOKENIZER, 16)

    def rows():
        yield {"text": "x" * 40}
        raise ConnectionError("gone")

    with pytest.raises(SecateurError, match=r"cannot be read on .*gone"):
        open_stream(datasets.IterableDataset.from_generator(rows), TOKENIZER, 16)


def test_a_folder_of_files_is_a_data_set_too(tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "train.jsonl").write_text(
        "".join(json.dumps({"text": t}) + "\n" for t in WORDS), encoding="utf-8"
    )
    expected = ids_of(WORDS)
    stream = open_stream(f"hf:{tmp_path}:train", TOKENIZER, 16)
    assert all_tokens(stream) == expected[: len(expected) // 16 * 16]


def test_a_tokenizer_without_eos_needs_a_separator():
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(UsageError, match="no EOS") as caught:
        open_stream(Text.of(WORDS), tokenizer, 16)
    assert caught.value.field == "separator"
    stream = open_stream(Text.of(["ab", "cd"]), tokenizer, 8, separator="\n\n")
    assert tokenizer.decode(stream.batch([0]).ids[0]) == "ab\n\ncd\n\n"


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"length": 1}, "length"),
        ({"length": 256, "context": 128}, "length"),
        ({"block": 0}, "block"),
        ({"epochs": 0}, "epochs"),
        ({"held_out": -1}, "held_out"),
        ({"held_out": 500}, "length"),
        ({"vocabulary": 100}, "tokenizer"),
    ],
)
def test_options_out_of_range_are_named(options, field):
    with pytest.raises(UsageError) as caught:
        open_stream(Text.of(WORDS), TOKENIZER, **{"length": 16, **options})
    assert caught.value.field == field


def test_batches_are_what_the_loop_expects():
    stream = open_stream(Text.of(WORDS), TOKENIZER, 16)
    batch = stream.batch([3, 0])
    assert batch.ids.dtype == torch.int64
    assert batch.ids.shape == (2, 16)
    assert batch.predicted == stream.scored([3, 0]) == 30
