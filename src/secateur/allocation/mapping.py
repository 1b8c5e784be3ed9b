"""From one figure a block to wished ratios: the mapping OWL, DLP and DSA share."""

from __future__ import annotations

from collections.abc import Sequence

EQUAL = 1e-12
"""Values closer than this, relative to their size, are one value with rounding errors."""


def width_of(values: Sequence[float]) -> float:
    """max - min; 0 where the difference is only rounding, which must not become a plan."""
    low, high = min(values), max(values)
    return high - low if high - low > EQUAL * max(abs(low), abs(high)) else 0.0


def minmax(values: Sequence[float]) -> list[float]:
    """Values moved and scaled to [0, 1]; all equal (or a single one) gives zeros."""
    low = min(values)
    width = width_of(values)
    return [(v - low) / width if width > 0 else 0.0 for v in values]


def around_mean(
    values: Sequence[float], sizes: Sequence[int], sparsity: float, half_range: float
) -> list[float]:
    """s_l = S + 2 lambda (m_l - mean m) with m = minmax(values): larger values, sparser blocks.

    The ratios span exactly 2 ``half_range`` and their mean, weighted by the blocks' ``sizes``,
    is S (for equal blocks the plain mean of the papers). Equal values give S everywhere.
    Negate ``values`` for importances (large = keep), as OWL's outlier ratio is.
    """
    m = minmax(values)
    mean = sum(p * v for p, v in zip(sizes, m, strict=True)) / sum(sizes)
    return [sparsity + 2 * half_range * (v - mean) for v in m]
