"""What an experiment returns, and the fit of a growth law."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from markupsafe import Markup
from scipy import stats

from secateur.progress import Progress


@dataclass(frozen=True)
class Table:
    """Rows of a result, already in words."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Experiment:
    """One experiment's outcome: what was found, the tables, the charts, the raw record."""

    title: str
    findings: tuple[str, ...]
    tables: tuple[Table, ...]
    charts: dict[str, Markup]
    record: dict[str, Any] = field(default_factory=dict)


class Run(Protocol):
    """An experiment; ``quick`` takes seconds instead of minutes."""

    def __call__(self, quick: bool, seed: int, progress: Progress) -> Experiment: ...


@dataclass(frozen=True)
class Line:
    """A least-squares line with the 95 % confidence interval of its slope."""

    slope: float
    low: float
    high: float
    intercept: float
    r_squared: float


def fit_line(x: Sequence[float], y: Sequence[float]) -> Line:
    """Ordinary least squares; Student's t for the interval (needs three points)."""
    result = stats.linregress(x, y)
    freedom = len(x) - 2
    half = float(stats.t.ppf(0.975, freedom) * result.stderr) if freedom > 0 else float("nan")
    slope = float(result.slope)
    return Line(slope, slope - half, slope + half, float(result.intercept), float(result.rvalue**2))


def wilson(failures: int, runs: int) -> tuple[float, float]:
    """95 % interval of a failure rate."""
    if runs == 0:
        return 0.0, 1.0
    result = stats.binomtest(failures, runs).proportion_ci(0.95, "wilson")
    return float(result.low), float(result.high)


def powers(first: float, last: float, per_decade: int) -> list[float]:
    """eps = 10^-first ... 10^-last, equally spaced in the logarithm."""
    count = round((last - first) * per_decade) + 1
    return [float(10**-e) for e in np.linspace(first, last, count)]
