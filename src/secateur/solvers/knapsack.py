"""Linear programmes with one budget row, in closed form: how ALS shares out what is kept.

    max  sum_i c_i x_i   subject to   sum_i P_i x_i <= K,   lo_i <= x_i <= hi_i

is a fractional knapsack: sorted by c_i / P_i, items are filled up to their upper bound until
the budget is spent, so all but one lie on a bound. ``linear_programme`` gives the same to
scipy's HiGHS, as a check.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]
_TIE = 1e-9  # values that differ by less, relative to the largest, are the same


def fractional_knapsack(
    values: Sequence[float],
    sizes: Sequence[float],
    budget: float,
    low: Sequence[float],
    high: Sequence[float],
) -> Vector:
    """The x that maximises c.x within the budget; it spends all of it.

    Items of equal c_i / P_i share what is left for them equally (the same fraction of their
    range), where an LP solver would return any vertex.

    Args:
        values: c_i >= 0; only their proportions matter.
        sizes: P_i > 0.
        budget: K, between sum P lo and sum P hi.
        low, high: bounds of each x_i.
    """
    c, p, lo, hi = _arrays(values, sizes, low, high)
    density = c / p
    density = density / (density.max() or 1.0)
    x = lo.copy()
    left = budget - float(p @ lo)
    order = np.argsort(-density, kind="stable")
    start = 0
    while start < len(order) and left > 0:
        stop = start + 1
        while stop < len(order) and density[order[start]] - density[order[stop]] <= _TIE:
            stop += 1
        group = order[start:stop]
        room = float(p[group] @ (hi[group] - lo[group]))
        share = 1.0 if room <= left else left / room
        x[group] += share * (hi[group] - lo[group])
        left -= share * room
        start = stop
    return x


def linear_programme(
    values: Sequence[float],
    sizes: Sequence[float],
    budget: float,
    low: Sequence[float],
    high: Sequence[float],
) -> Vector:
    """The same by scipy's HiGHS, values and sizes scaled to 1 first.

    Unscaled coefficients of 1e-14, which ALS produces on 32 blocks, lie below HiGHS's
    tolerance of 1e-7 and it then returns a wrong vertex.

    Raises:
        ValueError: infeasible, or the solver failed.
    """
    from scipy.optimize import linprog

    c, p, lo, hi = _arrays(values, sizes, low, high)
    scale = p.mean()
    found = linprog(
        -c / (c.max() or 1.0),
        A_ub=(p / scale)[None],
        b_ub=[budget / scale],
        bounds=list(zip(lo, hi, strict=True)),
        method="highs",
    )
    if found.x is None:
        raise ValueError(f"HiGHS: {found.message}")
    return np.asarray(found.x, dtype=np.float64)


def interior(
    values: Sequence[float],
    sizes: Sequence[float],
    budget: float,
    low: Sequence[float],
    high: Sequence[float],
    strength: float,
) -> Vector:
    """max c.x - (lambda / 2) ||x - k||^2 within the same limits, k = K / sum P.

    Stationarity gives x_i = clip(k + (c_i - tau P_i / mean P) / lambda), tau found by
    bisection so that the budget is spent: interior, continuous and monotone in c.

    Args:
        values: c_i, scaled to a maximum of 1 before use.
        strength: lambda > 0; the larger, the nearer to uniform.
    """
    c, p, lo, hi = _arrays(values, sizes, low, high)
    c = c / (c.max() or 1.0)
    middle, weight = budget / p.sum(), p / p.mean()

    def at(tau: float) -> Vector:
        moved: Vector = np.clip(middle + (c - tau * weight) / strength, lo, hi)
        return moved

    reach = strength + 1.0
    small, large = -reach / weight.min(), reach / weight.min()
    for _ in range(200):
        tau = (small + large) / 2
        if p @ at(tau) > budget:
            small = tau
        else:
            large = tau
    return at((small + large) / 2)


def _arrays(*columns: Sequence[float]) -> tuple[Vector, ...]:
    return tuple(np.asarray(column, dtype=np.float64) for column in columns)
