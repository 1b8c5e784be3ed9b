"""From wished ratios to exact counts: the budget every allocator ends in.

An allocator says how much *more* one matrix may lose than another; what the whole loses is
not its business. ``project`` moves its wishes, inside their bounds, until the parameters add
up; ``round_to_units`` turns them into whole units (weights, rows, N of M, heads, channels).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from secateur.errors import NumericsError, UsageError

Mode = Literal["shift", "scale", "density"]
_STEPS = 200  # of a bisection in float64; the last free set is then solved exactly


def project(
    raw: Sequence[float],
    sizes: Sequence[int],
    sparsity: float,
    low: float | Sequence[float] = 0.0,
    high: float | Sequence[float] = 1.0,
    mode: Mode = "shift",
) -> list[float]:
    """The ratios nearest in shape to ``raw`` whose parameter-weighted mean is ``sparsity``.

    Finds t with sum_i P_i clip(r_i + t, low_i, high_i) = S sum_i P_i (monotone in t).

    Args:
        raw: wished sparsity of each item; may lie outside the bounds.
        sizes: parameters P_i of each.
        sparsity: S in [0, 1].
        low, high: bounds of every ratio, or one for each.
        mode: ``shift`` adds t to all; ``scale`` multiplies the ratios by t; ``density``
            multiplies what is kept, 1 - r_i. Where nothing is left to multiply (zeros), the
            rest is shifted.

    Raises:
        UsageError: no ratios within the bounds can meet the target.
        NumericsError: a wish is NaN or infinite.
    """
    n = len(raw)
    lows, highs = _each(low, n), _each(high, n)
    for i, value in enumerate(raw):
        if not math.isfinite(value):
            raise NumericsError(
                f"the allocator wishes a sparsity of {value} for item {i}",
                fix="look for constant, NaN or infinite scores in its evidence",
            )
    total = sum(sizes)
    if not total:
        return [sparsity] * n
    refuse_infeasible(sizes, sparsity, lows, highs)
    budget, slack = sparsity * total, 1e-9 * total
    if mode == "density":
        kept = project(
            [1 - r for r in raw],
            sizes,
            1 - sparsity,
            [1 - h for h in highs],
            [1 - lo for lo in lows],
            "scale",
        )
        return [1 - k for k in kept]
    wishes = _of_the_largest(raw) if mode == "scale" else list(raw)
    if mode == "scale":
        scaled = _solve(wishes, wishes, sizes, budget, lows, highs)
        if abs(_weighted(scaled, sizes) - budget) <= slack:
            return scaled
        wishes = scaled  # zeros cannot grow by a factor: what is missing is shifted
    return _solve(wishes, [1.0] * n, sizes, budget, lows, highs)


def _of_the_largest(raw: Sequence[float]) -> list[float]:
    """What only ratios matter of, as shares of the largest; a billionth of it counts as nothing."""
    top = max(raw, default=0.0)
    if top <= 0:
        return [0.0] * len(raw)
    shares = [r / top for r in raw]
    return [s if s > 1e-9 else 0.0 for s in shares]


def refuse_infeasible(
    sizes: Sequence[int], sparsity: float, low: Sequence[float], high: Sequence[float]
) -> None:
    """Stop where no ratios within the bounds have the weighted mean ``sparsity``.

    Raises:
        UsageError: saying what the bounds allow.
    """
    for lo, hi in zip(low, high, strict=True):
        if not 0 <= lo <= hi <= 1:
            raise UsageError(
                "bounds of a sparsity lie in [0, 1], the lower first",
                field="bounds",
                value=[lo, hi],
            )
    total = sum(sizes)
    least = sum(p * lo for p, lo in zip(sizes, low, strict=True)) / total
    most = sum(p * hi for p, hi in zip(sizes, high, strict=True)) / total
    if not least - 1e-9 <= sparsity <= most + 1e-9:
        raise UsageError(
            f"with these bounds between {least:.6g} and {most:.6g} of the weights can go, "
            f"so {sparsity:.6g} cannot be met",
            field="bounds",
            value=[min(low), max(high)],
            fix=f"bounds around the target, such as [{max(0.0, sparsity - 0.1):.3g}, "
            f"{min(1.0, sparsity + 0.1):.3g}]",
        )


def _solve(
    base: list[float],
    slope: list[float],
    sizes: Sequence[int],
    budget: float,
    lows: list[float],
    highs: list[float],
) -> list[float]:
    """clip(base + t * slope) with the weighted sum nearest to ``budget``; slope >= 0."""

    def at(t: float) -> list[float]:
        moved = (b + t * s for b, s in zip(base, slope, strict=True))
        return [min(max(m, lo), hi) for m, lo, hi in zip(moved, lows, highs, strict=True)]

    moving = [i for i, s in enumerate(slope) if s > 0]
    if not moving:
        return at(0.0)
    # Where no bound is met the sum is linear in t: no bisection (searches come here thousands of times).
    gain = sum(sizes[i] * slope[i] for i in moving)
    if gain > 0:
        t = (budget - _weighted(base, sizes)) / gain
        free_ratios = [b + t * s for b, s in zip(base, slope, strict=True)]
        if free_ratios == at(t):
            return free_ratios
    left = min((lows[i] - base[i]) / slope[i] for i in moving)
    right = max((highs[i] - base[i]) / slope[i] for i in moving)
    for _ in range(_STEPS):
        middle = (left + right) / 2
        if middle in (left, right):
            break
        if _weighted(at(middle), sizes) < budget:
            left = middle
        else:
            right = middle
    t = (left + right) / 2
    found = at(t)
    # On the items off their bounds the sum is linear in t: one Newton step is exact.
    free = [i for i in moving if lows[i] < found[i] < highs[i]]
    gain = sum(sizes[i] * slope[i] for i in free)
    if gain > 0:
        found = at(t + (budget - _weighted(found, sizes)) / gain)
    return found


def round_to_units(
    ratios: Sequence[float],
    units: Sequence[int],
    counts: Sequence[int],
    budget: int,
    low: Sequence[int] | None = None,
    high: Sequence[int] | None = None,
) -> list[int]:
    """Whole units to remove from each item, so that the parameters add up to ``budget``.

    Starts at the nearest whole numbers and moves the items whose rounding hurt most (largest
    remainder; ties to the first), as long as that brings the sum nearer: where a smallest
    unit has room to move, |achieved - budget| is at most half of it.

    Args:
        ratios: share removed from each item, from ``project``.
        units: parameters in one unit of each item (1: a weight; d_out: a column of rows; ...).
        counts: units in each item.
        budget: parameters to remove in all.
        low, high: fewest and most units of each item (default 0 and all).
    """
    n = len(ratios)
    lows = [0] * n if low is None else list(low)
    highs = list(counts) if high is None else list(high)
    wished = [r * c for r, c in zip(ratios, counts, strict=True)]
    taken = [
        min(max(math.floor(w + 0.5), lo), hi) for w, lo, hi in zip(wished, lows, highs, strict=True)
    ]
    left = budget - sum(t * u for t, u in zip(taken, units, strict=True))
    while left:
        step = 1 if left > 0 else -1
        before = left
        hurt = [step * (w - t) for w, t in zip(wished, taken, strict=True)]
        for i in sorted(range(n), key=lambda i: (-hurt[i], i)):
            size = units[i]
            room = taken[i] < highs[i] if step > 0 else taken[i] > lows[i]
            if not room or not size or size >= 2 * step * left:
                continue
            taken[i] += step
            left -= step * size
            if left * step <= 0:
                break
        if left == before:
            break
    return taken


def _weighted(ratios: Sequence[float], sizes: Sequence[int]) -> float:
    return math.fsum(r * p for r, p in zip(ratios, sizes, strict=True))


def _each(bound: float | Sequence[float], n: int) -> list[float]:
    if isinstance(bound, int | float):
        return [float(bound)] * n
    values = [float(b) for b in bound]
    if len(values) != n:
        raise ValueError(f"{len(values)} bounds for {n} items")
    return values
