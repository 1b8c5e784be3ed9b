"""The size of random networks and of tickets, per construction, on a trained and a larger target."""

from __future__ import annotations

import time
from typing import Any

from secateur.errors import UsageError
from secateur.lottery.certificate import bound_error, certify
from secateur.lottery.construction import Construction
from secateur.lottery.copies import CopyTicket
from secateur.lottery.experiments.base import Experiment, Table
from secateur.lottery.log_ticket import LogTicket
from secateur.lottery.malach import MalachTicket
from secateur.lottery.subset_sum import SubsetSumTicket
from secateur.lottery.targets import resolve_target
from secateur.lottery.ticket import Ticket
from secateur.progress import Progress
from secateur.report.charts import Bar, bar_chart


def constructions(weight_eps: float) -> dict[str, Construction]:
    """Every construction at one weight accuracy."""
    return {
        "subset sum": SubsetSumTicket(weight_eps=weight_eps),
        "copies (depth L+1)": CopyTicket(weight_eps=weight_eps),
        "log, matching": LogTicket(weight_eps=weight_eps, pools="matching"),
        "log, shared": LogTicket(weight_eps=weight_eps),
        "log, shared, base 3/2": LogTicket(weight_eps=weight_eps, base="3/2"),
        "log, batch": LogTicket(weight_eps=weight_eps, pools="batch"),
        "log, independent": LogTicket(weight_eps=weight_eps, pools="independent"),
        "one product (Malach)": MalachTicket(weight_eps=weight_eps),
    }


def run(quick: bool, seed: int, progress: Progress) -> Experiment:
    """Sizes at weight error 1e-1, 1e-2, 1e-3 on digits, and at 1e-2 on 784-300-100-10."""
    plans = [("digits", eps) for eps in ((1e-2,) if quick else (1e-1, 1e-2, 1e-3))]
    plans += [] if quick else [("he:784-300-100-10", 1e-2)]
    rows: list[dict[str, Any]] = []
    for word, eps in plans:
        target = resolve_target(word)
        for name, construction in constructions(eps).items():
            with progress.stage(f"{word} {eps:g} {name}"):
                started, cpu = time.perf_counter(), time.process_time()
                ticket = construction.fit(target, (0, 1), seed=seed)
                seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
                certificate = certify(ticket, starts=8, samples=32)
                tight = _zonotope(ticket)
            size = ticket.size()
            rows.append(
                {
                    "target": word,
                    "weight_eps": eps,
                    "construction": name,
                    "weights": size.target,
                    "neurons": size.neurons,
                    "random": size.random,
                    "kept": size.kept,
                    "bytes": size.seed_and_bits,
                    "seconds": seconds,
                    "cpu_seconds": cpu,
                    "weight_error": max(certificate.weight_error),
                    "bound": certificate.bound,
                    "zonotope": tight,
                    "empirical": certificate.empirical,
                    "grown_pools": sum(r["grown_pools"] for r in ticket.history["layers"]),
                }
            )
    return Experiment(
        "Sizes of random networks and tickets",
        _findings(rows),
        (_table(rows),),
        {"sizes": _chart([r for r in rows if r["target"] == "digits" and r["weight_eps"] == 1e-2])},
        {"seed": seed, "rows": rows},
    )


def _zonotope(ticket: Ticket) -> float | None:
    """The tighter bound, or None where it would need too much memory."""
    try:
        return float(bound_error(ticket.fold(), ticket.box, "zonotope").max())
    except UsageError:
        return None


def _findings(rows: list[dict[str, Any]]) -> tuple[str, ...]:
    lines = []
    for key in dict.fromkeys((r["target"], r["weight_eps"]) for r in rows):
        group = sorted(
            (r for r in rows if (r["target"], r["weight_eps"]) == key), key=lambda r: r["neurons"]
        )
        order = " < ".join(f"{r['construction']} {r['neurons']:,}" for r in group)
        lines.append(f"{key[0]} at weight error {key[1]:g}, random neurons: {order}")
    return tuple(lines)


def _table(rows: list[dict[str, Any]]) -> Table:
    return Table(
        "Sizes",
        (
            "target", "weight error", "construction", "random neurons", "random parameters",
            "kept", "kept per weight", "ticket bytes", "largest weight error", "bound on [0, 1]",
            "zonotope bound", "found error", "processor seconds",
        ),
        tuple(
            (
                r["target"], f"{r['weight_eps']:g}", r["construction"], f"{r['neurons']:,}",
                f"{r['random']:.3g}", f"{r['kept']:,}", f"{r['kept'] / r['weights']:.2f}",
                f"{r['bytes']:,}", f"{r['weight_error']:.2g}", f"{r['bound']:.3g}",
                "" if r["zonotope"] is None else f"{r['zonotope']:.3g}",
                f"{r['empirical']:.3g}", f"{r['cpu_seconds']:.1f}",
            )
            for r in rows
        ),
    )  # fmt: skip


def _chart(rows: list[dict[str, Any]]) -> Any:
    bars = [
        Bar(r["construction"], r["neurons"] / r["weights"], f"{r['neurons'] / r['weights']:,.1f}")
        for r in sorted(rows, key=lambda r: r["neurons"])
        if "Malach" not in r["construction"] and "independent" not in r["construction"]
    ]
    return bar_chart(
        bars,
        title="Random neurons per target weight, digits, weight error 0.01",
        width=640,
        description="Independent pools and single products are off the scale; see the table.",
    )
