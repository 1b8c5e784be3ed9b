"""Windows that share text are found; windows that only share words are not."""

import pytest
import torch

from secateur.data.overlap import refuse_overlap, shared_runs
from secateur.data.windows import Windows
from secateur.errors import UsageError


def windows(seed, n=6, length=64, vocabulary=50):
    random = torch.Generator().manual_seed(seed)
    return Windows(torch.randint(vocabulary, (n, length), generator=random))


def test_other_text_does_not_overlap():
    assert shared_runs(windows(0), windows(1)) == 0
    refuse_overlap(windows(0), windows(1))


def test_the_same_run_at_another_place_is_found():
    one, other = windows(0), windows(1)
    other.ids[3, 10:60] = one.ids[2, 5:55]
    assert shared_runs(one, other) == 50 - 48 + 1
    with pytest.raises(UsageError, match=r"share 3 runs") as caught:
        refuse_overlap(one, other)
    assert caught.value.field == "search.text"
    other.ids[3, 12:58:9] = 51  # broken into short pieces
    assert shared_runs(one, other) == 0


def test_windows_of_one_text_are_refused_even_where_they_are_disjoint():
    text = {"text": {"name": "notes.txt", "split": "all"}}
    one, other = (Windows(windows(seed).ids, None, text) for seed in (0, 1))
    with pytest.raises(UsageError, match="the very text"):
        refuse_overlap(one, other)
    part = Windows(other.ids, None, {"text": {"name": "notes.txt", "split": "test"}})
    refuse_overlap(one, part)


def test_short_windows_are_compared_whole():
    one = windows(0, 4, 16)
    assert shared_runs(one, Windows(one.ids[1:2].clone())) == 1
    assert shared_runs(one, windows(7, 4, 64)) == 0


def test_token_zero_counts_as_a_token():
    zeros = Windows(torch.zeros(1, 64, dtype=torch.int64))
    assert shared_runs(zeros, windows(0)) == 0
    assert shared_runs(zeros, Windows(torch.zeros(1, 50, dtype=torch.int64))) == 17
