"""Windows: exact, drawn by seed, from every kind of source, and never more than there is."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.data import windows as module
from secateur.data.texts import Text
from secateur.data.windows import Windows, calibration_windows, evaluation_windows
from secateur.errors import UsageError
from secateur.models.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()  # one token a byte, no BOS of its own
WORDS = ["alpha beta gamma", "delta", "the end of it all"]


@pytest.fixture(scope="module")
def with_bos():
    from tokenizers import processors

    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def test_evaluation_is_the_joined_text_cut_in_order() -> None:
    windows = evaluation_windows(WORDS, TOKENIZER, 5)
    ids = TOKENIZER("\n\n".join(WORDS))["input_ids"]
    whole = len(ids) // 5
    assert windows.ids.tolist() == [ids[5 * i : 5 * i + 5] for i in range(whole)]
    assert windows.mask is None
    assert windows.record["bos"] is False
    assert (windows.tokens, windows.record["available"]) == (5 * whole, whole)


@given(st.integers(2, 60), st.integers(1, 9))
def test_the_remainder_is_dropped_and_the_limit_kept(length: int, limit: int) -> None:
    total = len(TOKENIZER("\n\n".join(WORDS))["input_ids"])
    if total < length:
        with pytest.raises(UsageError, match=f"{total} tokens"):
            evaluation_windows(WORDS, TOKENIZER, length)
        return
    windows = evaluation_windows(WORDS, TOKENIZER, length, limit=limit)
    assert len(windows) == min(limit, total // length)
    assert windows.length == length


def test_bos_stands_once_at_the_start_if_the_tokenizer_puts_it(with_bos) -> None:
    windows = evaluation_windows(WORDS, with_bos, 5)
    assert windows.record["bos"] is True
    assert windows.ids[0, 0] == 1
    assert (windows.ids.reshape(-1)[1:] != 1).all()


def test_calibration_packs_documents_with_eos(with_bos) -> None:
    bos, eos = with_bos.bos_token_id, with_bos.eos_token_id
    windows = calibration_windows(WORDS, with_bos, samples=4, length=10, seed=3)
    stream = windows.ids.reshape(-1)
    assert windows.record["joined_by"] == "EOS"
    ends = (stream[:-1] == eos).nonzero()[:, 0]
    assert len(ends)
    assert (stream[ends + 1] == bos).all()
    known = {token for w in WORDS for token in with_bos(w)["input_ids"]} | {eos}
    assert set(stream.tolist()) <= known


def test_without_eos_documents_are_joined_by_a_blank_line() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    windows = calibration_windows(["aaaa", "bbbb"], tokenizer, samples=1, length=12)
    assert tokenizer.decode(windows.ids[0]) in ("aaaa\n\nbbbb\n\n", "bbbb\n\naaaa\n\n")
    assert windows.record["joined_by"] == "blank line"


@settings(max_examples=30)
@given(st.integers(0, 5), st.integers(1, 6), st.integers(2, 9))
def test_windows_never_overlap_and_follow_the_seed(seed: int, samples: int, length: int) -> None:
    stream = torch.arange(1000, 1060)
    one = calibration_windows(stream, None, samples, length, seed)
    again = calibration_windows(stream, None, samples, length, seed)
    assert torch.equal(one.ids, again.ids)
    assert one.fingerprint == again.fingerprint
    assert one.ids.unique().numel() == samples * length
    assert ((one.ids[:, :1] - 1000) % length == 0).all()
    assert (one.ids.diff(dim=1) == 1).all()


def test_another_seed_draws_other_windows() -> None:
    prints = {calibration_windows("pydoc", TOKENIZER, 4, 64, s).fingerprint for s in range(4)}
    assert len(prints) == 4


def test_of_a_corpus_calibration_takes_the_head_and_evaluation_the_tail() -> None:
    drawn = calibration_windows("pydoc", TOKENIZER, 2, 32)
    cut = evaluation_windows("pydoc", TOKENIZER, 32, limit=2)
    assert drawn.record["text"]["split"] == "train"
    assert cut.record["text"]["split"] == "test"
    assert evaluation_windows("pydoc:train", TOKENIZER, 32, 1).record["text"]["split"] == "train"


def test_a_file_is_taken_whole(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("abcdefgh")
    assert evaluation_windows(tmp_path / "t.txt", TOKENIZER, 8).tokens == 8
    assert calibration_windows(str(tmp_path / "t.txt"), TOKENIZER, 1, 9).tokens == 9  # with EOS


def test_a_huge_text_costs_no_more_than_what_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STRETCH", 100)
    seen = []

    def counting(text, **kwargs):
        seen.append(len(text))
        return TOKENIZER(text, **kwargs)

    counting.eos_token_id, counting.get_vocab = 2, TOKENIZER.get_vocab
    calibration_windows(["x" * 100_000], counting, samples=2, length=50)
    assert sum(seen) < 1000


@pytest.mark.parametrize(
    ("samples", "length", "words"),
    [
        (10, 10, "4 windows of 10, not 10"),
        (1, 100, "0 windows of 100, not 1"),
        (100, 2, "22 windows of 2, not 100"),
    ],
)
def test_too_little_text_says_how_much_there_is_and_what_to_do(
    samples: int, length: int, words: str
) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        calibration_windows(["a" * 20, "b" * 22], TOKENIZER, samples, length)
    assert "a longer text" in (caught.value.fix or "")


def test_the_proposed_length_works() -> None:
    with pytest.raises(UsageError, match="length 4 or less"):
        calibration_windows(["a" * 20, "b" * 22], TOKENIZER, 10, 10)
    assert len(calibration_windows(["a" * 20, "b" * 22], TOKENIZER, 10, 4)) == 10


def test_given_tokens_are_taken_as_they_are_and_padded_on_the_right() -> None:
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    assert torch.equal(calibration_windows(ids, None, 8, 512).ids, ids)
    assert len(calibration_windows(ids, None, 1, 512)) == 1
    ragged = [{"input_ids": [5, 6, 7]}, {"input_ids": torch.tensor([8]), "attention_mask": [1]}]
    windows = calibration_windows(ragged, None, 8, 512)
    assert windows.ids.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert windows.mask is not None
    assert windows.mask.tolist() == [[True, True, True], [True, False, False]]
    assert windows.tokens == 4


def test_batches_of_a_loader_are_unrolled_and_an_endless_one_is_no_problem() -> None:
    batch = {"input_ids": torch.ones(2, 3), "attention_mask": torch.ones(2, 3)}
    batch = {key: value.long() for key, value in batch.items()}
    assert calibration_windows(itertools.repeat(batch), None, 5, 3).ids.shape == (5, 3)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ([], "nothing in it"),
        ([" ", "\n"], "no text"),
        ([{"labels": [1]}], "no 'input_ids', but labels"),
        (torch.ones(2, 3), "whole numbers"),
        (torch.ones(2, 3, 4, dtype=torch.long), "whole numbers"),
        ([{"input_ids": [1, 2], "attention_mask": [1]}], "shape"),
        ([object()], "no sequence of token ids"),
        (7, "not a sequence"),
        (torch.zeros(0, 4, dtype=torch.long), "nothing in it"),
    ],
)
def test_what_is_no_text_and_no_tokens_is_refused(source, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        calibration_windows(source, TOKENIZER, 1, 2)


@pytest.mark.parametrize(
    ("field", "changes"), [("samples", {"samples": 0}), ("length", {"length": 0})]
)
def test_counts_start_at_one(field: str, changes: dict) -> None:
    with pytest.raises(UsageError, match=field):
        calibration_windows(WORDS, TOKENIZER, **changes)
    with pytest.raises(UsageError, match="length"):
        evaluation_windows(WORDS, TOKENIZER, 1)


def test_text_needs_a_tokenizer() -> None:
    with pytest.raises(UsageError, match="needs a tokenizer"):
        calibration_windows(WORDS, None)


def test_ids_beyond_the_vocabulary_mean_the_wrong_tokenizer() -> None:
    with pytest.raises(UsageError, match="vocabulary has 50 entries") as caught:
        evaluation_windows(WORDS, TOKENIZER, 5, vocabulary=50)
    assert "tokenizer" in (caught.value.fix or "")
    with pytest.raises(UsageError, match="-100"):
        Windows(torch.tensor([[3, -100]])).check_vocabulary(50)


@given(st.integers(1, 7), st.integers(1, 40))
def test_batches_cover_all_windows_in_order(count: int, tokens: int) -> None:
    windows = Windows(torch.arange(count * 6).view(count, 6), torch.ones(count, 6).bool())
    batches = list(windows.batches(tokens))
    assert torch.equal(torch.cat([ids for ids, _ in batches]), windows.ids)
    assert all(ids.shape == mask.shape for ids, mask in batches if mask is not None)
    assert len(batches) == math.ceil(count / max(1, tokens // 6))


def test_the_fingerprint_covers_ids_shape_and_mask() -> None:
    ids = torch.arange(6)
    prints = {
        Windows(ids.view(2, 3)).fingerprint,
        Windows(ids.view(3, 2)).fingerprint,
        Windows(ids.view(2, 3).clone() + 1).fingerprint,
        Windows(ids.view(2, 3), ids.view(2, 3) > 0).fingerprint,
    }
    assert len(prints) == 4


def test_the_record_is_what_the_text_says() -> None:
    text = Text.of(["abc " * 30], "mine")
    assert calibration_windows(text, TOKENIZER, 2, 8).record["text"] == text.record()
