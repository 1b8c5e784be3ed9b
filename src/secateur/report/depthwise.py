"""DEPrune's pictures: what is left of every layer, which taps live, and what a width costs."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from secateur.report import charts, words
from secateur.report.charts import Bar, Cell, Series

Picture = tuple[str, str, Markup]


def pictures(result: dict[str, Any]) -> list[Picture]:
    """Heading, caption and chart of each."""
    rows = [row for row in result["layers"] if row["kind"] == "depthwise"]
    found = [_shares(rows)] if rows else []
    found += _maps([row for row in rows if row.get("map")])
    return found + _staircase(result["method"].get("latency", {}))


def _shares(rows: list[dict[str, Any]]) -> Picture:
    bars = []
    for row in rows:
        share = row["after"] / max(1, row["before"])
        channels = f"{row['kept_channels']}/{row['channels']} channels"
        bars.append(Bar(row["name"], share, f"{words.percent(share, 1)} of taps, {channels}"))
    worst = max((row.get("imbalance", 0.0) for row in rows), default=0.0)
    caption = (
        "Taps left in each depth-wise layer, and channels that still have one. The fullest 32 "
        f"channels of a layer have at most {100 * worst:.1f} points more than its average."
    )
    chart = charts.responsive(lambda width: charts.bar_chart(bars, title="Taps left", width=width))
    return "Depth-wise layers", caption, chart


def _maps(rows: list[dict[str, Any]]) -> list[Picture]:
    """A line for each layer, a field for each tap of its kernel, row by row."""
    if not rows:
        return []
    widest = max(len(row["map"]) * len(row["map"][0]) for row in rows)
    cells: list[list[Cell | None]] = []
    for row in rows:
        line: list[Cell | None] = []
        for y, taps in enumerate(row["map"]):
            for x, count in enumerate(taps):
                share = count / max(1, row["channels"])
                said = f"{row['name']}, tap ({y}, {x}): {words.percent(share, 1)} live"
                line.append(Cell(share, said))
        cells.append(line + [None] * (widest - len(line)))
    top = max(cell.value for line in cells for cell in line if cell is not None)
    chart = charts.responsive(
        lambda width: charts.heat_map(
            [row["name"] for row in rows],
            [str(i) for i in range(widest)],
            cells,
            title="Channels that keep each tap",
            low=0.0,
            high=max(top, 1e-9),
            text=lambda v: words.percent(v, 0),
            x_label="tap of the kernel, row by row",
            width=width,
        )
    )
    caption = "Share of a layer's channels that keep each tap of the kernel: which taps live."
    return [("Kernel maps", caption, chart)]


def _staircase(latency: dict[str, Any]) -> list[Picture]:
    """Measured time of the largest layer against its width."""
    points = [(float(n), 1e6 * seconds) for n, seconds in latency.get("curve", [])]
    if len(points) < 2:
        return []
    chart = charts.responsive(
        lambda width: charts.line_chart(
            [Series(latency["layer"], points)],
            title="Time of a depth-wise layer against its columns",
            x_label="columns kept in each 32 channels",
            y_label="microseconds",
            width=width,
            from_zero=True,
        )
    )
    caption = (
        "Measured on this device, one image, at every 16 columns or more: where a tile of 32 is "
        "filled anew there would be a step."
    )
    return [("What a width costs", caption, chart)]
