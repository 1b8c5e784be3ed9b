"""How many neurons each way of laying out pools really needs, against 1/eps, on one small network.

Every construction is given less and less until some weight is no longer met; the smallest size that
still met all of them counts. So this is what the random network must hold, where ``growth`` counts
what one weight waits for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from secateur.lottery.construction import Construction
from secateur.lottery.copies import CopyTicket
from secateur.lottery.experiments.base import Experiment, Table, fit_line, powers
from secateur.lottery.experiments.sized import SizedLog
from secateur.lottery.log_ticket import PoolKind
from secateur.lottery.network import TargetNetwork
from secateur.lottery.reading import from_module
from secateur.lottery.search_torch import best_subset
from secateur.lottery.subset_sum import MOST, SubsetSumTicket
from secateur.lottery.targets import he_mlp
from secateur.progress import Progress
from secateur.report.charts import Series, line_chart

SIZES = (4, 12, 6)
KINDS: tuple[PoolKind, ...] = ("independent", "shared", "batch", "matching")
Least = Callable[[TargetNetwork, float, int], int]


def run(quick: bool, seed: int, progress: Progress) -> Experiment:
    """See the module's docstring."""
    target = from_module(he_mlp(SIZES))
    seeds = range(seed, seed + (1 if quick else 8))
    accuracies = powers(1, 3 if quick else 5, 1 if quick else 2)
    cases: dict[str, Least] = {f"log, {kind}": _least_pool(kind) for kind in KINDS}
    cases |= {"subset sum": _least_products, "copies (depth L+1)": _least_copies}
    results: list[dict[str, Any]] = []
    with progress.stage("pools", total=len(cases) * len(accuracies), unit="sizes") as advance:
        for name, least in cases.items():
            points = []
            for eps in accuracies:
                found = [least(target, eps, number) / target.weights for number in seeds]
                points.append({"eps": eps, "mean": sum(found) / len(found), "largest": max(found)})
                for kind in KINDS[:3]:
                    if name == f"log, {kind}":
                        sized = SizedLog(weight_eps=eps, pools=kind).estimate(target)
                        points[-1]["bound"] = sized.neurons / target.weights
                advance(1)
            results.append({"name": name, "points": points, **_fits(points)})
    sixteen = _sixteen(seeds, 200 if quick else 2000)
    return Experiment(
        "Random neurons per weight that a whole network needs, per layout",
        tuple(
            f"{r['name']}: {r['linear_in_log']['slope']:+.2f} neurons per weight and decade of 1/eps "
            f"[{r['linear_in_log']['low']:.2f}, {r['linear_in_log']['high']:.2f}], "
            f"R² {r['linear_in_log']['r_squared']:.3f}"
            for r in results
        ),
        (_table(results), _sixteen_table(sixteen)),
        {"pools": _chart(results)},
        {
            "target": f"he:{'-'.join(map(str, SIZES))}",
            "seeds": len(seeds),
            "constructions": results,
            "best_of_16_products": sixteen,
        },
    )


def _sixteen(seeds: range, weights: int) -> list[dict[str, Any]]:
    """Errors of the best subset of 16 products U(0, 1) U(-1, 1), for weights U(-h, h)."""
    rows = []
    for half in (0.1, 0.25, 0.5, 1.0):
        medians, tails = [], []
        for seed in seeds:
            rng = np.random.default_rng(seed)
            products = rng.uniform(0, 1, (weights, 16)) * rng.uniform(-1, 1, (weights, 16))
            wanted = torch.from_numpy(rng.uniform(-half, half, weights))
            _, rest = best_subset(wanted, torch.from_numpy(products))
            medians.append(float(rest.abs().median()))
            tails.append(float(rest.abs().quantile(0.95)))
        rows.append({"half_width": half, "median": medians, "p95": tails})
    return rows


def _sixteen_table(rows: list[dict[str, Any]]) -> Table:
    return Table(
        "Error of the best subset of 16 products, per seed from smallest to largest",
        ("weights uniform on", "median", "95 % point"),
        tuple(
            (
                f"[-{r['half_width']:g}, {r['half_width']:g}]",
                f"{min(r['median']):.2g} to {max(r['median']):.2g}",
                f"{min(r['p95']):.2g} to {max(r['p95']):.2g}",
            )
            for r in rows
        ),
    )


def _fits(points: list[dict[str, Any]]) -> dict[str, Any]:
    decades = [math.log10(1 / p["eps"]) for p in points]
    means = [p["mean"] for p in points]
    return {
        "linear_in_log": asdict(fit_line(decades, means)),
        "power_law": asdict(fit_line(decades, [math.log10(m) for m in means])),
    }


def _met(finder: Construction, target: TargetNetwork, seed: int) -> int | None:
    """The random network's neurons if every weight was met, else None."""
    ticket = finder.fit(target, (0, 1), seed=seed)
    if any(r["failed_weights"] for r in ticket.history["layers"]):
        return None
    return ticket.size().neurons


def _least_pool(kind: PoolKind) -> Least:
    def least(target: TargetNetwork, eps: float, seed: int) -> int:
        """Bisection over the share of the planned pool, to 5 per cent."""

        def tried(share: float) -> int | None:
            finder = SizedLog(
                weight_eps=eps, pools=kind, growth=0, refine=1, on_failure="accept", share=share
            )
            return _met(finder, target, seed)

        high = 2.0**-8
        while (neurons := tried(high)) is None:
            high *= 2
        low = high / 2  # which failed, or is too small to matter
        while high / low > 1.05:
            middle = math.sqrt(low * high)
            fewer = tried(middle)
            if fewer is None:
                low = middle
            else:
                high, neurons = middle, fewer
        return neurons

    return least


def _least_products(target: TargetNetwork, eps: float, seed: int) -> int:
    for products in range(2, MOST + 1):
        finder = SubsetSumTicket(weight_eps=eps, products=products, growth=0, on_failure="accept")
        if (neurons := _met(finder, target, seed)) is not None:
            return neurons
    raise AssertionError("40 products meet every weight of this network")


def _least_copies(target: TargetNetwork, eps: float, seed: int) -> int:
    for copies in range(2, MOST + 1):
        finder = CopyTicket(weight_eps=eps, copies=copies, growth=0, on_failure="accept")
        if (neurons := _met(finder, target, seed)) is not None:
            return neurons
    raise AssertionError("40 copies meet every weight of this network")


def _table(results: list[dict[str, Any]]) -> Table:
    return Table(
        "Random neurons per target weight",
        ("construction", "eps", "mean", "largest", "asked for by the bound (delta 0.05)"),
        tuple(
            (
                r["name"],
                f"{p['eps']:.0e}",
                f"{p['mean']:.1f}",
                f"{p['largest']:.1f}",
                f"{p['bound']:.1f}" if "bound" in p else "",
            )
            for r in results
            for p in r["points"]
        ),
    )


def _chart(results: list[dict[str, Any]]) -> Any:
    series = [
        Series(r["name"], [(math.log10(1 / p["eps"]), p["mean"]) for p in r["points"]], tone=i)
        for i, r in enumerate(results)
    ]
    return line_chart(
        series,
        title=f"Random neurons per weight for all of {'-'.join(map(str, SIZES))}",
        x_label="digits of accuracy, log10(1/eps)",
        y_label="random neurons per weight (log scale)",
        height=380,
        log_y=True,
        y_text=lambda y: f"{y:,.1f}",
        description="All layouts grow linearly in the digits; how fast depends on who may share.",
    )
