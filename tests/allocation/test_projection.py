"""The budget is met exactly, inside the bounds, in every mode and at every granularity."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateur.allocation.base import plan_of_ratios
from secateur.allocation.projection import project, round_to_units
from secateur.allocation.units import UnitGroup, unit_cuts
from secateur.errors import NumericsError, UsageError
from secateur.masks.target import Scope, Target

ITEMS = st.integers(1, 12).flatmap(
    lambda n: st.tuples(
        st.lists(st.floats(-1, 2), min_size=n, max_size=n),
        st.lists(st.integers(1, 10_000), min_size=n, max_size=n),
    )
)


def mean(ratios, sizes):
    return sum(r * p for r, p in zip(ratios, sizes, strict=True)) / sum(sizes)


@given(ITEMS, st.floats(0.05, 0.95), st.sampled_from(["shift", "scale", "density"]))
def test_the_weighted_mean_is_the_target_within_the_bounds(items, sparsity, mode):
    raw, sizes = items
    low, high = sparsity * 0.5, sparsity + (1 - sparsity) * 0.6
    found = project(raw, sizes, sparsity, low, high, mode)
    assert mean(found, sizes) == pytest.approx(sparsity, abs=1e-9)
    assert all(low - 1e-12 <= r <= high + 1e-12 for r in found)
    order = sorted(range(len(raw)), key=lambda i: raw[i])
    assert all(found[a] <= found[b] + 1e-9 for a, b in pairwise(order))


@given(ITEMS, st.floats(0.1, 0.9), st.floats(-5, 5))
def test_a_shift_of_all_wishes_changes_nothing(items, sparsity, by):
    raw, sizes = items
    one = project(raw, sizes, sparsity)
    other = project([r + by for r in raw], sizes, sparsity)
    assert one == pytest.approx(other, abs=1e-6)


def test_scaling_multiplies_and_density_multiplies_what_is_kept():
    assert project([0.2, 0.4], [1, 1], 0.45, mode="scale") == pytest.approx([0.3, 0.6])
    assert project([0.8, 0.6], [1, 1], 0.55, mode="density") == pytest.approx([0.7, 0.4])


def test_zeros_that_cannot_be_scaled_are_shifted():
    found = project([0.0, 0.0], [1, 3], 0.5, mode="scale")
    assert mean(found, [1, 3]) == pytest.approx(0.5)


@given(ITEMS, st.floats(0, 1), st.integers(1, 50))
def test_rounding_misses_by_at_most_half_a_unit_that_has_room(items, sparsity, unit):
    raw, counts = items
    units = [unit * (1 + i % 3) for i in range(len(raw))]
    sizes = [u * c for u, c in zip(units, counts, strict=True)]
    ratios = project(raw, sizes, sparsity)
    budget = round(sparsity * sum(sizes))
    taken = round_to_units(ratios, units, counts, budget)
    left = budget - sum(t * u for t, u in zip(taken, units, strict=True))
    assert all(0 <= t <= c for t, c in zip(taken, counts, strict=True))
    room = [
        u for t, u, c in zip(taken, units, counts, strict=True) if (t < c if left > 0 else t > 0)
    ]
    assert left == 0 or not room or abs(left) <= min(room) / 2


@given(ITEMS, st.floats(0, 0.99))
def test_whole_weights_are_exact(items, sparsity):
    raw, sizes = items
    shapes = {f"m{i}": (1, p) for i, p in enumerate(sizes)}
    ratios = dict(zip(shapes, project(raw, sizes, sparsity), strict=True))
    plan = plan_of_ratios(Target(sparsity), shapes, ratios)
    assert plan.removed == Target(sparsity).count(sum(sizes))


@given(
    st.lists(st.tuples(st.integers(1, 8), st.integers(1, 6), st.floats(-0.3, 0.3)), min_size=1),
    st.sampled_from(["2:4", "1:4", "4:8", "3:8", "6:8"]),
)
def test_patterns_keep_one_m_and_mix_their_n(rows, pattern):
    target = Target.parse(pattern)
    shapes = {f"m{i}": (r, c * target.group) for i, (r, c, _) in enumerate(rows)}
    sizes = [r * c for r, c in shapes.values()]
    wished = project([target.sparsity + w for *_, w in rows], sizes, target.sparsity)
    plan = plan_of_ratios(target, shapes, dict(zip(shapes, wished, strict=True)))
    assert {m for _, m in plan.patterns.values()} == {target.group}
    assert all(1 <= n <= target.group for n, _ in plan.patterns.values())
    asked = Fraction(target.group - target.keep, target.group) * sum(sizes)
    steps = [size // target.group for size in sizes]
    assert abs(plan.removed - asked) <= max(steps) / 2
    for name in shapes:
        assert plan.cut(name, Scope("row")).count == plan.counts[name]


def test_bounds_that_cannot_meet_the_target():
    with pytest.raises(UsageError, match=r"between 0\.3 and 0\.4"):
        project([0.5, 0.5], [1, 1], 0.5, 0.3, 0.4)
    with pytest.raises(UsageError, match="the lower first"):
        project([0.5], [1], 0.5, 0.6, 0.4)


def test_wishes_that_are_not_numbers():
    with pytest.raises(NumericsError, match="item 1"):
        project([0.5, float("nan")], [1, 1], 0.5)


def test_units_of_structures():
    groups = {
        "b0:heads": UnitGroup(8, 100, ("q0", "o0")),
        "b1:heads": UnitGroup(8, 100, ("q1", "o1")),
        "b0:channels": UnitGroup(64, 30, ("up0",), multiple=8),
    }
    sizes = {"q0": 400, "o0": 400, "q1": 400, "o1": 400, "up0": 1920}
    ratios = {"q0": 0.2, "o0": 0.3, "q1": 0.7, "o1": 0.8, "up0": 0.5}
    cuts = unit_cuts(ratios, sizes, groups, 0.5)
    assert (cuts["b0:heads"].removed, cuts["b1:heads"].removed) == (2, 6)
    assert cuts["b0:channels"].removed == 32
    with pytest.raises(UsageError, match="cannot be met"):
        unit_cuts(ratios, sizes, groups, 0.99)
