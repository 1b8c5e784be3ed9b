"""Neurons sampled until one random weight is met, against 1/eps: logarithm against power.

For every construction and every eps, random weights w ~ U[-1, 1] each get a fresh pool, and the
neurons are counted from the first one drawn to the one that completes the weight. Wrong signs
count. The polynomial constructions are fitted by N = C (1/eps)^p, the logarithmic ones by
N = a + b log10(1/eps) (and by the power law too: their p goes to 0).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from secateur.lottery.decomposition import bits_needed, ratio, slot_probability
from secateur.lottery.drawing import draw
from secateur.lottery.experiments.base import Experiment, Table, fit_line, powers
from secateur.lottery.laws import Law
from secateur.lottery.malach import hit_probability
from secateur.lottery.philox import ROLE_IN, ROLE_OUT
from secateur.lottery.search import Pools, resolve, single, subsets
from secateur.progress import Progress
from secateur.report.charts import Series, line_chart

Counts = NDArray[np.float64]


@dataclass(frozen=True)
class Case:
    """One construction: how neurons are counted, over which eps, and its bound for one weight."""

    name: str
    count: Callable[[NDArray[np.float64], float, int], Counts]
    eps: list[float]
    bound: Callable[[float], float] | None
    logarithmic: bool


def run(quick: bool, seed: int, progress: Progress) -> Experiment:
    """See the module's docstring."""
    weights = 40 if quick else 300
    w = np.random.default_rng(seed).uniform(-1, 1, weights)
    results: list[dict[str, Any]] = []
    cases = _cases(quick)
    with progress.stage("growth", total=sum(len(c.eps) for c in cases), unit="runs") as advance:
        for case in cases:
            points = []
            for eps in case.eps:
                counts = case.count(w, eps, seed)
                points.append(
                    {
                        "eps": eps,
                        "mean": float(counts.mean()),
                        "p95": float(np.quantile(counts, 0.95)),
                        "bound": case.bound(eps) if case.bound else None,
                    }
                )
                advance(1)
            results.append(_fitted(case, points))
    return Experiment(
        "Neurons sampled for one weight against accuracy",
        _findings(results),
        (_fit_table(results), _point_table(results)),
        {"growth": _chart(results)},
        {"weights": weights, "seed": seed, "delta_of_bounds": 0.05, "constructions": results},
    )


def _cases(quick: bool) -> list[Case]:
    far = 4.0 if quick else 8.0
    step = 1 if quick else 2
    log_eps = powers(1, far, step)
    return [
        Case("log, golden ratio", _bitwise("golden"), log_eps, _log_bound("golden"), True),
        Case("log, base 3/2", _bitwise("3/2"), log_eps, _log_bound("3/2"), True),
        Case("subset sum", _subset, powers(1, 3 if quick else 5, step), None, True),
        Case(
            "one product (Malach)",
            _single(False),
            powers(1, 3 if quick else 4.5, step),
            _single_bound("product"),
            False,
        ),
        Case(
            "two factors (Malach)",
            _single(True),
            powers(1, 1.5 if quick else 2.5, 2 if quick else 4),
            _single_bound("factors"),
            False,
        ),
        Case(
            "log, uniform weights",
            _bitwise("golden", "uniform"),
            powers(1, 2 if quick else 3, 2),
            None,
            False,
        ),
    ]


def _pools(law: Law, count: int, size: int, seed: int) -> Pools:
    ids = np.arange(count)
    zero = np.zeros(count, np.int64)
    return Pools(seed, 0, law, ids, zero, zero, np.full(count, size), np.zeros(count, bool))


def _bitwise(base: str, kind: str = "hyperbolic") -> Callable[..., Counts]:
    """Neurons until every bit has a product of the right signs."""

    def count(w: NDArray[np.float64], eps: float, seed: int) -> Counts:
        gamma = ratio(base)
        bits = bits_needed(1.0, eps, gamma)
        span = bits * math.log(1 / gamma) if kind == "hyperbolic" else 0.0
        law = Law(kind, 1.0, span)  # type: ignore[arg-type]
        edges = gamma ** np.arange(bits + 1)
        block = 512 if kind == "hyperbolic" else 65536
        result = np.zeros(len(w))
        for p, weight in enumerate(w):
            open_bits, begin = np.ones(bits, bool), 0
            while open_bits.any():
                neurons = np.arange(begin, begin + block)
                a = draw(law, seed, 0, ROLE_IN, p, neurons, 0).astype(np.float64)
                b = draw(law, seed, 0, ROLE_OUT, p, neurons, 0).astype(np.float64)
                product = np.where((a > 0) & (b * weight > 0), np.abs(a * b), 0.0)
                interval = bits - np.searchsorted(edges[::-1], product, side="left")
                for i in open_bits.nonzero()[0]:
                    hits = ((interval == i) & (product > 0)).nonzero()[0]
                    if hits.size:
                        open_bits[i] = False
                        result[p] = max(result[p], begin + hits[0] + 1)
                begin += block
        return result

    return count


def _subset(w: NDArray[np.float64], eps: float, seed: int) -> Counts:
    """Neurons (both in-signs) until some subset of the products is near enough."""
    pools = _pools(Law("uniform", 1.0), len(w), 0, seed)
    result = np.full(len(w), np.nan)
    todo = np.arange(len(w))
    size = 2
    while len(todo):
        part = pools.take(todo, np.full(len(todo), size))
        n = min(size, 34)
        found = subsets(part, 1, w[todo, None], n, n, 0.0, resolve("auto"))
        met = found.residual[:, 0] <= eps
        result[todo[met]] = size
        todo, size = todo[~met], size + 1
        if size > 80:
            result[todo] = size
            break
    return result


def _single(both: bool) -> Callable[..., Counts]:
    """Neurons until one product (or both factors) is near enough."""

    def count(w: NDArray[np.float64], eps: float, seed: int) -> Counts:
        limit = int(60 / (eps**2 if both else eps) * 10)
        pools = _pools(Law("uniform", math.sqrt(2)), len(w), limit, seed)
        picks = single(pools, 1, w[:, None], eps, both, resolve("auto"))
        return picks.neurons[:, 0, 0].astype(np.float64) + 1

    return count


def _log_bound(base: str) -> Callable[[float], float]:
    def bound(eps: float) -> float:
        bits = bits_needed(1.0, eps, ratio(base))
        return math.log(bits / 0.05) / slot_probability(bits)

    return bound


def _single_bound(match: str) -> Callable[[float], float]:
    return lambda eps: math.log(1 / 0.05) / hit_probability(1.0, eps, math.sqrt(2), match)


def _fitted(case: Case, points: list[dict[str, Any]]) -> dict[str, Any]:
    decades = [math.log10(1 / p["eps"]) for p in points]
    power = fit_line(decades, [math.log10(p["mean"]) for p in points])
    linear = fit_line(decades, [p["mean"] for p in points])
    return {
        "name": case.name,
        "logarithmic": case.logarithmic,
        "points": points,
        "power_law": asdict(power),
        "linear_in_log": asdict(linear),
    }


def _findings(results: list[dict[str, Any]]) -> tuple[str, ...]:
    lines = []
    for result in results:
        power, linear = result["power_law"], result["linear_in_log"]
        if result["logarithmic"]:
            lines.append(
                f"{result['name']}: {linear['slope']:+.1f} neurons per decade of 1/eps "
                f"[{linear['low']:.1f}, {linear['high']:.1f}], R² {linear['r_squared']:.4f}"
            )
        else:
            lines.append(
                f"{result['name']}: neurons grow as (1/eps)^{power['slope']:.3f} "
                f"[{power['low']:.3f}, {power['high']:.3f}], R² {power['r_squared']:.4f}"
            )
    return tuple(lines)


def _fit_table(results: list[dict[str, Any]]) -> Table:
    rows = tuple(
        (
            r["name"],
            f"{r['linear_in_log']['slope']:.1f}",
            f"{r['linear_in_log']['r_squared']:.4f}",
            f"{r['power_law']['slope']:.3f}",
            f"{r['power_law']['low']:.3f} to {r['power_law']['high']:.3f}",
            f"{r['power_law']['r_squared']:.4f}",
        )
        for r in results
    )
    head = ("construction", "neurons per decade", "R²", "exponent of 1/eps", "95 %", "R² (log-log)")
    return Table("Fitted growth laws", head, rows)


def _point_table(results: list[dict[str, Any]]) -> Table:
    rows = tuple(
        (
            r["name"],
            f"{p['eps']:.0e}",
            f"{p['mean']:.4g}",
            f"{p['p95']:.4g}",
            "" if p["bound"] is None else f"{p['bound']:.4g}",
        )
        for r in results
        for p in r["points"]
    )
    return Table(
        "Neurons until the weight is met",
        ("construction", "eps", "mean", "95 %", "bound (delta 0.05)"),
        rows,
    )


def _chart(results: list[dict[str, Any]]) -> Any:
    series = [
        Series(r["name"], [(math.log10(1 / p["eps"]), p["mean"]) for p in r["points"]], tone=i)
        for i, r in enumerate(results)
    ]
    return line_chart(
        series,
        title="Neurons sampled until one weight is met",
        x_label="digits of accuracy, log10(1/eps)",
        y_label="neurons (mean, log scale)",
        height=380,
        log_y=True,
        y_text=lambda y: f"{y:,.0f}",
        description="Log and subset-sum constructions stay flat; single products rise as powers.",
    )
