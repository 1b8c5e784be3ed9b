"""The charts of a run's page, each from its part of the result; None where there is none."""

from __future__ import annotations

import math
from functools import partial
from statistics import fmean
from typing import Any

from markupsafe import Markup

from secateur.report import charts, pictures, words
from secateur.report.charts import Bar, Cell, Series
from secateur.report.facts import interval

_SHOWN = 21
"""Matrices whose masks are shown, when more have pictures."""
_ROLES = ("q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down", "fc1", "fc2")
_DISK = {
    "dense": "dense",
    "pruned": "pruned folder",
    "bitmask": "bitmask container",
    "semi_structured": "2:4 in a GPU's own form",
}


def quality_chart(result: dict[str, Any]) -> Markup | None:
    """Perplexity dense and pruned with 95 % intervals."""
    quality = result.get("quality") or {}
    bars = []
    for key, tone in (("dense", 5), ("pruned", 1)):
        measured = quality.get(key)
        if measured:
            low, high = interval(measured)
            value = measured["perplexity"]
            bars.append(Bar(key, value, words.figure(value), low, high, tone))
    if not bars:
        return None
    return _bars(bars, "Perplexity, lower is better")


def recovery_chart(result: dict[str, Any]) -> Markup | None:
    """Perplexity of the dense model, after the cut and after recovery."""
    before = (result.get("recovery") or {}).get("before")
    after = result.get("quality") or {}
    if not before or not after.get("pruned"):
        return None
    bars = []
    shown = (
        ("dense", after.get("dense"), 5),
        ("cut", before["pruned"], 4),
        ("recovered", after["pruned"], 1),
    )
    for label, measured, tone in shown:
        if measured:
            low, high = interval(measured)
            value = measured["perplexity"]
            bars.append(Bar(label, value, words.figure(value), low, high, tone))
    return _bars(bars, "Perplexity before and after recovery, lower is better")


def error_chart(result: dict[str, Any]) -> Markup | None:
    """Relative output error after each block."""
    points = [
        (float(b["index"]), float(b["error"]))
        for b in result.get("blocks") or []
        if b.get("error") is not None and math.isfinite(b["error"])
    ]
    if len(points) < 2:
        return None
    return charts.responsive(
        lambda width: charts.line_chart(
            [Series("block", points, tone=1)],
            title="Relative output error by block",
            x_label="block",
            y_label="relative error of the block's output",
            width=width,
            height=260,
            from_zero=True,
            description=f"From {points[0][1]:.3g} after the first block to {points[-1][1]:.3g}.",
        )
    )


def sparsity_chart(result: dict[str, Any]) -> Markup | None:
    """Blocks by roles: how much of each matrix is gone; off-target ones are outlined."""

    def cell(modules: list[dict[str, Any]]) -> Cell:
        gone = sum(m["delivered_count"] for m in modules)
        asked = sum(m["asked_count"] for m in modules)
        size = sum(math.prod(m["shape"]) for m in modules)
        text = f"{_title(modules)}: {words.percent(gone / size)} pruned, {words.count(gone)} of "
        text += f"{words.count(size)}; asked {words.count(asked)}"
        return Cell(gone / size, text, alert=gone != asked)

    grid = _grid(result, cell)
    if grid is None:
        return None
    values = [c.value for line in grid[2] for c in line if c]
    even = max(values) - min(values) < 0.005
    low, high = (0.0, 1.0) if even else (max(0.0, min(values) - 0.02), max(values))
    draw = partial(
        charts.heat_map, *grid, title="Pruned share of each matrix", low=low, high=high,
        text=partial(words.percent, digits=0), x_label="block", tone=1, tallest=16 if even else 26,
    )  # fmt: skip
    return charts.responsive(lambda width: draw(width=width))


def output_error_chart(result: dict[str, Any]) -> Markup | None:
    """Blocks by roles: relative output error of each matrix."""

    def cell(modules: list[dict[str, Any]]) -> Cell | None:
        errors = [m["output_error"] for m in modules if m.get("output_error") is not None]
        if not errors:
            return None
        value = fmean(errors)
        return Cell(value, f"{_title(modules)}: relative output error {words.figure(value, 3)}")

    grid = _grid(result, cell)
    if grid is None:
        return None
    high = max(c.value for line in grid[2] for c in line if c)
    draw = partial(
        charts.heat_map, *grid, title="Relative output error of each matrix", low=0.0, high=high,
        text=partial(words.figure, digits=2), x_label="block", tone=4,
    )  # fmt: skip
    return charts.responsive(lambda width: draw(width=width))


def bytes_chart(result: dict[str, Any]) -> Markup | None:
    """Bytes on disk in each form."""
    disk = (result.get("size") or {}).get("disk") or {}
    dense = disk.get("dense")
    bars = []
    for key, value in disk.items():
        if not isinstance(value, int | float) or isinstance(value, bool) or not value:
            continue
        text = words.size(value)
        if dense and key != "dense":
            text += f", {words.percent(value / dense, 1)}"
        label = _DISK.get(key, key.replace("_", " "))
        bars.append(Bar(label, value, text, tone=5 if key == "dense" else 0))
    return _bars(bars, "Bytes on disk") if bars else None


def speed_charts(result: dict[str, Any]) -> list[tuple[str, Markup]]:
    """Throughput of each phase, dense and pruned, with the spread of the repeats."""
    out = []
    for phase in ("prefill", "decode"):
        measured = (result.get("speed") or {}).get(phase)
        if not measured:
            continue
        unit = measured.get("unit", "")
        bars = []
        for key, tone in (("dense", 5), ("pruned", 2)):
            m = measured[key]
            text = f"{words.figure(m['median'], 3)} {unit}".strip()
            bars.append(Bar(key, m["median"], text, m.get("low"), m.get("high"), tone))
        out.append((phase, _bars(bars, f"Speed of {phase}, higher is better")))
    return out


def time_chart(result: dict[str, Any]) -> Markup | None:
    """Where the run's time went."""
    timing = {k: v for k, v in (result.get("timing") or {}).items() if isinstance(v, int | float)}
    total = timing.pop("total", None) or sum(timing.values())
    if not timing or not total:
        return None
    bars = [
        Bar(k.replace("_", " "), v, words.duration(v), tone=3)
        for k, v in sorted(timing.items(), key=lambda item: -item[1])
    ]
    return _bars(bars, f"Time, {words.duration(total)} in all")


def mask_panels(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Picture, histogram and facts of a chosen few matrices."""
    panels = []
    for module in _chosen([m for m in result.get("modules") or [] if m.get("picture")]):
        try:
            picture = pictures.draw(module["picture"], module["name"])
        except ValueError:
            continue
        panels.append(
            {
                "name": module["name"],
                "picture": picture,
                "span": f"{100 * pictures.Density.read(module['picture']).span:.0f}",
                "histogram": _histogram(module),
                "module": module,
            }
        )
    return panels


def _bars(bars: list[Bar], title: str) -> Markup:
    return charts.responsive(
        lambda width: charts.bar_chart(bars, title=title, width=width), wide=charts.HALF
    )


def _histogram(module: dict[str, Any]) -> Markup | None:
    counts = module.get("histogram")
    if not counts or not (sum(counts["kept"]) + sum(counts["pruned"])):
        return None
    threshold = module.get("threshold")
    return charts.responsive(
        lambda width: charts.histogram(
            counts["edges"],
            counts["kept"],
            counts["pruned"],
            title=f"Scores of {module['name']}",
            x_label="log₁₀ of the score",
            threshold=math.log10(threshold) if threshold and threshold > 0 else None,
            width=width,
        ),
        wide=charts.HALF + 60,
    )


def _chosen(modules: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All, or those of the first, the middle and the last block with a picture."""
    if len(modules) <= _SHOWN:
        return modules
    blocks = sorted({m["block"] for m in modules})
    wanted = (blocks[0], blocks[len(blocks) // 2], blocks[-1])
    per_block = max(1, _SHOWN // len(set(wanted)))
    out = []
    for block in dict.fromkeys(wanted):
        out += [m for m in modules if m["block"] == block][:per_block]
    return out


def _grid(
    result: dict[str, Any], cell: Any
) -> tuple[list[str], list[str], list[list[Cell | None]]] | None:
    """Role names, block names and cells; matrices of one block and role share a cell."""
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for module in result.get("modules") or []:
        role = module.get("role") or module["name"].rpartition(".")[2]
        groups.setdefault((role, module["block"]), []).append(module)
    if not groups:
        return None
    seen = dict.fromkeys(role for role, _ in groups)
    roles = [r for r in _ROLES if r in seen] + [r for r in seen if r not in _ROLES]
    blocks = sorted({block for _, block in groups})
    cells = [
        [cell(groups[role, block]) if (role, block) in groups else None for block in blocks]
        for role in roles
    ]
    if not any(c for line in cells for c in line):
        return None
    return roles, [str(b) for b in blocks], cells


def _title(modules: list[dict[str, Any]]) -> str:
    name = str(modules[0]["name"])
    return name if len(modules) == 1 else f"{len(modules)} matrices like {name}"
