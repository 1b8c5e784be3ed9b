"""Plans drawn: ratio over depth, for one run's report and for allocators side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from secateur.report import charts, words
from secateur.report.charts import TONES, Cell, Series


def allocation_chart(summaries: Mapping[str, dict[str, Any]]) -> Markup | None:
    """A line per plan: the share of each block that goes; the target is dashed.

    Args:
        summaries: label -> ``allocation.summary.summary`` of a plan.
    """
    series = [
        Series(label, [(float(i), v) for i, v in enumerate(s["blocks"].values())], tone=n % TONES)
        for n, (label, s) in enumerate(summaries.items())
    ]
    if not series or max(len(s.points) for s in series) < 2:
        return None
    target = next(iter(summaries.values()))["achieved"]
    return charts.responsive(
        lambda width: charts.line_chart(
            series,
            title="Pruned share of each block",
            x_label="block",
            y_label="share of the block's weights that goes",
            width=width,
            height=340,
            reference=(target, "target"),
            y_text=lambda y: words.percent(y, 0),
        )
    )


def allocation_map(summaries: Mapping[str, dict[str, Any]]) -> Markup | None:
    """A row per plan, a column per block: readable where many lines would cross."""
    if len(summaries) < 2:
        return None
    labels = list(summaries)
    blocks = [str(i) for i in range(len(next(iter(summaries.values()))["blocks"]))]
    cells: list[list[Cell | None]] = [
        [
            Cell(v, f"{label}, {block}: {words.percent(v, 1)} pruned")
            for block, v in summaries[label]["blocks"].items()
        ]
        for label in labels
    ]
    values = [c.value for row in cells for c in row if c]
    return charts.responsive(
        lambda width: charts.heat_map(
            labels,
            blocks,
            cells,
            title="Pruned share of each block, by allocator",
            low=max(0.0, min(values) - 0.02),
            high=max(values),
            text=lambda v: words.percent(v, 0),
            x_label="block",
            tone=1,
            width=width,
        )
    )


def of_run(result: dict[str, Any]) -> Markup | None:
    """The chart of a run's own plan; None where it is uniform."""
    allocation = result.get("allocation")
    if not allocation or allocation["spread"] < 1e-3:
        return None
    return allocation_chart({allocation["allocator"]: allocation})
