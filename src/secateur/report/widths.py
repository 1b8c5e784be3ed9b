"""What a run of S2HPruner shows: widths over the training, the gap closing, FLOPs on their target."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from secateur.report import charts, words
from secateur.report.charts import Cell, Series

COLUMNS = 40
"""Moments of the training that the map of widths shows."""
_FIXED = 5
"""Columns of a row before the widths: see ``training.s2hpruner.WATCHED``."""


def pictures(result: dict[str, Any]) -> list[tuple[str, str, Markup]]:
    """(heading, caption, chart) of each picture; empty where nothing was learned."""
    record = result["method"]
    history = record.get("history") or {"columns": [], "rows": []}
    rows = history["rows"]
    if len(rows) < 2:
        return []
    out = [
        (
            "Widths over the training",
            "Share of each group's units the hard network has; a group a line, a moment a column.",
            widths_map(history["columns"][_FIXED:], rows, record["widths"]),
        )
    ]
    gap = gap_chart(rows)
    if gap is not None:
        measured = record.get("gap") or {}
        caption = (
            "Accuracy of both networks on the training images since the last point, batch norms on "
            "each batch's own statistics."
        )
        if measured:
            caption += (
                f" At the end, on {words.count(measured['images'])} training images: soft "
                f"{measured['soft']:.2%}, hard {measured['hard']:.2%}, Jensen-Shannon divergence "
                f"{measured['divergence']:.4f} nats."
            )
        out.append(("Soft and hard network", caption, gap))
    return [*out, ("FLOPs against the target", _reached(record), flops_chart(rows, record))]


def _reached(record: dict[str, Any]) -> str:
    word = "within" if record["within"] else "outside"
    return (
        f"The hard network has {words.percent(record['flops'], 2)} of the dense one's FLOPs; "
        f"{words.percent(record['target'], 2)} were asked for, {word} {words.percent(record['relax'], 1)}."
    )


def widths_map(groups: list[str], rows: list[list[Any]], widths: dict[str, list[int]]) -> Markup:
    """Share of units kept, groups down, steps across."""
    every = -(-len(rows) // COLUMNS)
    shown = rows[::every]
    if shown[-1] is not rows[-1]:
        shown = [*shown, rows[-1]]
    cells = [
        [
            Cell(
                row[_FIXED + i] / widths[group][1],
                f"{group}, step {row[0]}: {row[_FIXED + i]} of {widths[group][1]}",
            )
            for row in shown
        ]
        for i, group in enumerate(groups)
    ]
    return charts.responsive(
        lambda width: charts.heat_map(
            groups, [str(row[0]) for row in shown], cells, title="Widths over the training",
            low=0.0, high=1.0, text=lambda v: f"{v:.0%}", x_label="step", width=width, tone=1,
        )
    )  # fmt: skip


def gap_chart(rows: list[list[Any]]) -> Markup | None:
    """Accuracies of both networks over the steps; None where there was no hard network."""
    lines = [
        Series(name, [(row[0], row[column]) for row in rows if row[column] is not None], tone=tone)
        for name, column, tone in (("soft", 3, 5), ("hard", 4, 1))
    ]
    if not lines[0].points:
        return None
    return charts.responsive(
        lambda width: charts.line_chart(
            lines, title="Accuracy while training", x_label="step", y_label="accuracy",
            width=width, y_text=lambda v: f"{v:.0%}",
        )
    )  # fmt: skip


def flops_chart(rows: list[list[Any]], record: dict[str, Any]) -> Markup:
    """Share of the FLOPs over the steps, and the target."""
    line = Series("hard network", [(row[0], row[1]) for row in rows], tone=1)
    return charts.responsive(
        lambda width: charts.line_chart(
            [line], title="FLOPs of the hard network", x_label="step", y_label="of the dense one's",
            width=width, y_text=lambda v: f"{v:.0%}", reference=(record["target"], "target"),
        )
    )  # fmt: skip
