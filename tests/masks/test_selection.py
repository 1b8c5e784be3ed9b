"""Selection against brute force: exact counts, ties to the lowest index, reference masks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from secateur.errors import NumericsError, UsageError
from secateur.masks.selection import (
    band_counts,
    bands,
    cumulative_share,
    nominal_sparsity,
    select,
    select_cumulative_reference,
    select_reference,
)
from secateur.masks.target import Cut, Scope, Target, spread

SCOPES = ["row", "layer", "block:1", "block:5", "block:128", "global"]


def by_rank(values: list[float], count: int) -> list[bool]:
    """The oracle: sort (score, index) pairs in Python."""
    order = sorted(range(len(values)), key=lambda i: (values[i], i))
    gone = set(order[:count])
    return [i in gone for i in range(len(values))]


def brute_force(score: Tensor, cut: Cut) -> Tensor:
    rows, columns = cut.shape
    mask = torch.zeros(cut.shape, dtype=torch.bool)
    if cut.keep is not None and cut.group is not None:
        for row in range(rows):
            for start in range(0, columns, cut.group):
                part = score[row, start : start + cut.group]
                gone = by_rank(part.tolist(), cut.group - cut.keep)
                mask[row, start : start + cut.group] = torch.tensor(gone)
        return mask
    if cut.scope.kind == "row":
        parts = [(slice(r, r + 1), slice(0, columns)) for r in range(rows)]
    elif cut.scope.kind == "block":
        width = cut.scope.width
        parts = [(slice(0, rows), slice(a, a + width)) for a in range(0, columns, width)]
    else:
        parts = [(slice(0, rows), slice(0, columns))]
    sizes = [score[part].numel() for part in parts]
    for part, count in zip(parts, spread(cut.count, sizes), strict=True):
        gone = by_rank(score[part].flatten().tolist(), count)
        mask[part] = torch.tensor(gone).view(score[part].shape)
    return mask


@settings(max_examples=150, deadline=None)
@given(
    rows=st.integers(1, 7),
    columns=st.integers(1, 13),
    share=st.floats(0, 1),
    scope=st.sampled_from(SCOPES),
    levels=st.sampled_from([1, 2, 3, 1000]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.float16, torch.int64]),
    seed=st.integers(0, 10_000),
)
def test_select_is_rank_by_score_then_index(rows, columns, share, scope, levels, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    score = torch.randint(0, levels, (rows, columns), generator=generator).to(dtype)
    cut = Cut((rows, columns), round(share * rows * columns), Scope.parse(scope))
    mask = select(score, cut)
    assert mask.dtype == torch.bool
    assert int(mask.sum()) == cut.count
    assert torch.equal(mask, brute_force(score, cut))


@settings(max_examples=100, deadline=None)
@given(
    rows=st.integers(1, 6),
    groups=st.integers(1, 6),
    group=st.integers(1, 17),
    data=st.data(),
    levels=st.sampled_from([1, 2, 1000]),
)
def test_pattern_is_exact_in_every_group(rows, groups, group, data, levels):
    keep = data.draw(st.integers(1, group))
    seed = data.draw(st.integers(0, 1000))
    generator = torch.Generator().manual_seed(seed)
    score = torch.randint(0, levels, (rows, groups * group), generator=generator).float()
    cut = Cut.of((rows, groups * group), Target.parse(f"{keep}:{group}"), Scope("row"))
    mask = select(score, cut)
    assert (mask.view(rows, groups, group).sum(-1) == group - keep).all()
    assert torch.equal(mask, brute_force(score, cut))


def test_per_group_counts_differ_by_at_most_one():
    score = torch.rand(7, 96)
    cut = Cut.of((7, 96), Target.parse(0.6), Scope("row"))
    per_row = select(score, cut).sum(1)
    assert int(per_row.sum()) == cut.count == 403  # 672 * 0.6 = 403.2
    assert set(per_row.tolist()) == {57, 58}  # the original removes floor(57.6) = 57 in each


def test_negative_zero_and_infinities_rank_as_numbers():
    score = torch.tensor([[0.0, -0.0, float("-inf"), float("inf")]])
    assert select(score, Cut((1, 4), 2)).tolist() == [[True, False, True, False]]


def test_nothing_and_everything():
    score = torch.rand(3, 8)
    for scope in SCOPES:
        assert not select(score, Cut((3, 8), 0, Scope.parse(scope))).any()
        assert select(score, Cut((3, 8), 24, Scope.parse(scope))).all()


def test_single_input():
    score = torch.tensor([[3.0], [1.0], [2.0]])
    assert select(score, Cut((3, 1), 1, Scope("layer"))).tolist() == [[False], [True], [False]]


def test_nan_is_refused_by_name_and_infinity_is_not():
    score = torch.rand(4, 4)
    score[1, 2] = float("nan")
    with pytest.raises(NumericsError, match=r"1 of 16 scores of 'model\.q'"):
        select(score, Cut((4, 4), 8), "model.q")
    both = torch.tensor([[float("inf"), float("-inf"), 1.0, 2.0]])  # their sum is NaN, they are not
    assert select(both, Cut((1, 4), 1)).tolist() == [[False, True, False, False]]


def test_wrong_shape_is_refused():
    with pytest.raises(UsageError, match="shape"):
        select(torch.rand(4, 4), Cut((4, 5), 2))


def test_input_is_left_alone():
    score = torch.rand(5, 8)
    before = score.clone()
    select(score.T, Cut((8, 5), 11, Scope("layer")))
    assert torch.equal(score, before)


def test_band_counts_share_the_total():
    cut = Cut((3, 300), 451, Scope("block", 128))
    assert bands(cut) == [(0, 128), (128, 256), (256, 300)]
    assert sum(band_counts(cut)) == 451
    assert max(band_counts(cut)[:2]) - min(band_counts(cut)[:2]) <= 1


# --- the original scripts ---------------------------------------------------------------------


def test_reference_row_floors_and_takes_the_first_of_ties():
    score = torch.tensor([[1.0, 1.0, 1.0, 0.0, 2.0]])
    cut = Cut.of((1, 5), Target.parse(0.5), Scope("row"))
    assert select_reference(score, cut).tolist() == [[True, False, False, True, False]]


@pytest.mark.parametrize("scope", ["layer", "block:8"])
def test_reference_threshold_is_inclusive(scope):
    score = torch.arange(32.0).view(2, 16)[:, torch.randperm(16)]
    cut = Cut.of((2, 16), Target.parse(0.5), Scope.parse(scope))
    groups = 1 if scope == "layer" else 2
    assert int(select_reference(score, cut).sum()) == 16 + groups  # one too many per group
    nothing = Cut.of((2, 16), Target.parse(0.0), Scope.parse(scope))
    assert int(select_reference(score, nothing).sum()) == groups
    with pytest.raises(UsageError):
        select_reference(score, Cut((2, 16), 32, Scope.parse(scope)))


def test_reference_threshold_prunes_every_tie():
    score = torch.tensor([[0.0, 1.0, 1.0, 1.0]])
    cut = Cut.of((1, 4), Target.parse(0.25), Scope("layer"))
    assert int(select_reference(score, cut).sum()) == 4
    assert int(select(score, cut).sum()) == 1


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:4"])
def test_reference_pattern_agrees_where_nothing_ties(pattern):
    score = torch.rand(9, 32)
    cut = Cut.of((9, 32), Target.parse(pattern), Scope("row"))
    assert torch.equal(select(score, cut), select_reference(score, cut))


@pytest.mark.parametrize(
    ("columns", "sparsity", "removed"), [(96, 0.6, 57), (5, 0.5, 2), (9, 0.99, 8)]
)
def test_reference_row_count_is_the_floor_of_what_was_typed(columns, sparsity, removed):
    cut = Cut.of((3, columns), Target.parse(sparsity), Scope("row"))
    assert nominal_sparsity(cut) == sparsity
    assert (select_reference(torch.rand(3, columns), cut).sum(1) == removed).all()
    allocated = replace(cut, count=cut.count - 3)  # a plan moved it: what was typed is history
    assert nominal_sparsity(allocated) == allocated.sparsity


def test_cumulative_share_is_the_running_sum_in_score_order():
    score = torch.tensor([[4.0, 1.0, 3.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    share = cumulative_share(score)
    assert torch.allclose(share[0], torch.tensor([1.0, 0.1, 0.6, 0.3], dtype=torch.float64))
    assert torch.isfinite(share).all()


def test_variant_bisection_reaches_the_target_and_equals_the_exact_cut_nearby():
    generator = torch.Generator().manual_seed(0)
    score = torch.rand(64, 256, generator=generator) ** 2
    mask = select_cumulative_reference(score, 0.5)
    assert abs(float(mask.float().mean()) - 0.5) <= 2e-3
    exact = select(cumulative_share(score), Cut((64, 256), int(mask.sum()), Scope("layer")))
    assert (mask != exact).float().mean() < 2e-3  # the original keeps the one that straddles
    assert np.ptp(mask.sum(1).numpy()) > 0  # rows differ: that is the point of the variant


def test_variant_names_the_row_that_breaks_the_original():
    score = torch.zeros(2, 4)
    score[:, 0] = 1.0
    score[1] = torch.tensor([1.0, 0.0, 0.0, 0.0])
    hopeless = torch.ones(2, 1)
    with pytest.raises(UsageError, match="no weight below"):
        select_cumulative_reference(hopeless, 0.5)
