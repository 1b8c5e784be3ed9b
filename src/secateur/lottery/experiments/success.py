"""How often the first pools are too small, against the delta they were sized for."""

from __future__ import annotations

from typing import Any

import torch

from secateur.lottery.experiments.base import Experiment, Table, wilson
from secateur.lottery.experiments.sized import SizedLog
from secateur.lottery.reading import from_module
from secateur.lottery.targets import he_mlp
from secateur.progress import Progress
from secateur.report.charts import Series, line_chart

DELTAS = (0.5, 0.2, 0.1, 0.05, 0.01)
FRACTIONS = (1.0, 0.5, 0.3)
"""Also with a share of the neurons the union bound asks for, to see where it starts to fail."""


def run(quick: bool, seed: int, progress: Progress) -> Experiment:
    """Tickets for one small target over many seeds; a failure is any needed slot left empty."""
    runs = 15 if quick else 400
    target = from_module(he_mlp((6, 5, 3)))
    rows: list[dict[str, Any]] = []
    with progress.stage("success", total=len(DELTAS) * runs, unit="tickets") as advance:
        for delta in DELTAS:
            for fraction in FRACTIONS:
                failures = 0
                finder = SizedLog(
                    weight_eps=1e-3, delta=delta, growth=0, refine=1, on_failure="accept",
                    share=fraction,
                )  # fmt: skip
                for number in range(runs):
                    ticket = finder.fit(target, (0, 1), seed=seed + number)
                    failures += any(r["empty_slots"] for r in ticket.history["layers"])
                low, high = wilson(failures, runs)
                rows.append(
                    {
                        "delta": delta,
                        "fraction": fraction,
                        "failures": failures,
                        "runs": runs,
                        "low": low,
                        "high": high,
                    }
                )
            advance(runs)
    full = [r for r in rows if r["fraction"] == 1.0]
    kept = sum(r["failures"] <= r["delta"] * runs for r in full)
    findings = (
        f"the failure rate stays below delta for {kept} of {len(full)} values of delta",
        "; ".join(f"delta {r['delta']:g}: {r['failures']} of {runs}" for r in full),
        "with 30 % of the pool: "
        + "; ".join(
            f"delta {r['delta']:g}: {r['failures']} of {runs}"
            for r in rows
            if r["fraction"] == FRACTIONS[-1]
        ),
    )
    return Experiment(
        "Failure rate against delta",
        findings,
        (_table(rows),),
        {"success": _chart(rows)},
        {"target": "he:6-5-3", "weight_eps": 1e-3, "seed": seed, "rows": rows},
    )


def _table(rows: list[dict[str, Any]]) -> Table:
    return Table(
        "Tickets with an empty slot",
        ("delta", "pool, share of the bound", "failures", "rate, 95 %"),
        tuple(
            (
                f"{r['delta']:g}",
                f"{r['fraction']:.0%}",
                f"{r['failures']} of {r['runs']}",
                f"{r['low']:.4f} to {r['high']:.4f}",
            )
            for r in rows
        ),
    )


def _chart(rows: list[dict[str, Any]]) -> Any:
    delta = torch.tensor(sorted(DELTAS)).tolist()
    lines = [Series("delta itself", [(d, d) for d in delta], tone=5)]
    for tone, fraction in enumerate(FRACTIONS):
        points = sorted(
            (r["delta"], r["failures"] / r["runs"]) for r in rows if r["fraction"] == fraction
        )
        lines.append(Series(f"{fraction:.0%} of the pool", points, tone=tone))
    return line_chart(
        lines,
        title="Failure rate against delta",
        x_label="delta",
        y_label="share of tickets with an empty slot",
        from_zero=True,
    )
