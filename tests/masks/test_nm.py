"""N:M masks as pattern numbers: order, exact round trips, and size at the entropy."""

from itertools import combinations
from math import comb, log2

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.errors import SecateurError, UsageError
from secateur.masks import nm


def random_mask(rows, groups, keep, group, seed=0):
    order = torch.rand(rows, groups, group, generator=torch.Generator().manual_seed(seed))
    return (order.argsort(-1).argsort(-1) < group - keep).view(rows, -1)


def test_patterns_stand_in_the_published_order():
    assert ["".join(map(str, row)) for row in nm.candidates(2, 4).int().tolist()] == [
        "1100", "1010", "1001", "0110", "0101", "0011",
    ]  # fmt: skip


@pytest.mark.parametrize("pattern", [(1, 4), (2, 4), (2, 8), (4, 8), (3, 3), (8, 16), (1, 1)])
def test_patterns_are_all_of_them_once(pattern):
    keep, group = pattern
    table = nm.candidates(keep, group)
    assert {tuple(r.nonzero().view(-1).tolist()) for r in table} == set(
        combinations(range(group), keep)
    )
    assert len(table) == comb(group, keep)


@given(data=st.data(), group=st.integers(1, 12), rows=st.integers(1, 5), groups=st.integers(0, 70))
@settings(max_examples=60, deadline=None)
def test_packing_gives_back_every_mask(data, group, rows, groups):
    keep = data.draw(st.integers(1, group))
    mask = random_mask(rows, groups, keep, group, data.draw(st.integers(0, 99)))
    index = nm.encode(mask, keep, group)
    packed = nm.pack_indices(index, keep, group)
    assert packed.numel() == nm.packed_bytes(index.numel(), keep, group)
    back = nm.unpack_indices(packed, index.numel(), keep, group)
    assert torch.equal(nm.decode(back.view(index.shape), keep, group), mask)


@pytest.mark.parametrize(("pattern", "most"), [((2, 4), 0.65), ((1, 4), 0.5), ((4, 8), 0.77)])
def test_size_is_the_entropy_within_a_hundredth(pattern, most):
    keep, group = pattern
    mask = random_mask(256, 512 // group * 4, keep, group)
    bits = 8 * nm.packed_bytes(mask.numel() // group, keep, group) / mask.numel()
    assert log2(comb(group, keep)) / group <= bits <= most


def test_large_masks_cross_chunks(monkeypatch):
    monkeypatch.setattr(nm, "_CHUNK", 8)
    mask = random_mask(40, 60, 2, 4)
    index = nm.encode(mask, 2, 4)
    whole = nm.pack_indices(index, 2, 4)
    assert torch.equal(nm.unpack_indices(whole, index.numel(), 2, 4), index.view(-1))
    monkeypatch.setattr(nm, "_CHUNK", 1 << 18)
    assert torch.equal(nm.pack_indices(index, 2, 4), whole)


def test_masks_that_are_no_pattern_are_refused():
    mask = random_mask(4, 3, 2, 4)
    mask[0, 0] = ~mask[0, 0]
    with pytest.raises(SecateurError, match="1 of 12 groups do not keep 2 of 4"):
        nm.encode(mask, 2, 4)
    with pytest.raises(SecateurError, match="does not divide"):
        nm.encode(torch.zeros(2, 6, dtype=torch.bool), 2, 4)
    with pytest.raises(UsageError, match="enumerated"):
        nm.candidates(16, 32)


@pytest.mark.parametrize("pattern", [(2, 4), (3, 7), (4, 8)])
def test_numbers_beyond_the_tables_are_the_tables(pattern, monkeypatch):
    mask = ~nm.candidates(*pattern)
    numbers = torch.arange(len(mask))[:, None]
    assert torch.equal(nm.encode(mask, *pattern), numbers)
    monkeypatch.setattr(nm, "WIDEST", 0)
    assert torch.equal(nm.encode(mask, *pattern), numbers)
    assert torch.equal(nm.decode(numbers, *pattern), mask)


@pytest.mark.parametrize("pattern", [(1, 20), (16, 32), (32, 32), (2, 64), (31, 64)])
def test_wide_groups_are_packed_too(pattern):
    keep, group = pattern
    mask = random_mask(3, 5, keep, group)
    packed = nm.pack_indices(nm.encode(mask, keep, group), keep, group)
    assert packed.numel() == nm.packed_bytes(15, keep, group)
    back = nm.unpack_indices(packed, 15, keep, group)
    assert torch.equal(nm.decode(back.view(3, 5), keep, group), mask)


def test_more_patterns_than_numbers_are_refused():
    assert not nm.numbered(64, 128)
    with pytest.raises(UsageError, match="too many patterns"):
        nm.encode(random_mask(1, 1, 64, 128), 64, 128)


def test_damaged_numbers_are_refused():
    packed = nm.pack_indices(nm.encode(random_mask(4, 9, 2, 4), 2, 4), 2, 4)
    with pytest.raises(SecateurError, match="take"):
        nm.unpack_indices(packed[:-1], 36, 2, 4)
    with pytest.raises(SecateurError, match="damaged"):
        nm.unpack_indices(torch.full_like(packed, 255), 36, 2, 4)
