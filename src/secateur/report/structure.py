"""What a structured run's report says: widths before and after, costs, and where time went."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from secateur.report import charts, words
from secateur.report.charts import Series

Sentence = tuple[str, str]
WANTED = 0.85
"""Share of the FLOPs ratio below which the page says where the rest went."""
_PART_NAMES = {
    "projections": "attention's projections",
    "ffn": "MLPs",
    "head": "outside the blocks",
    "rest": "attention itself, norms, overhead",
}


def delivered(result: dict[str, Any]) -> list[Sentence]:
    """What went, counted as it was asked for, and how the folder opens."""
    structure = result["structure"]
    before, after = structure["parameters"]["before"], structure["parameters"]["after"]
    target = structure["target"]
    text = (
        f"{words.short(before)} parameters became {words.short(after)}; "
        f"{words.percent(result['totals']['delivered'], 2)} of the units' weights are cut out"
    )
    protected = result["recipe"]["structure"]["protect"]
    if target["kind"] != "ratio" or protected:
        ratio = {"ratio": "those outside protected blocks"}
        what = ratio.get(target["kind"], f"the {target['kind']}")
        text += f" (asked: {words.percent(target['asked'], 1)} of {what}"
        got = target.get("delivered")
        text += f", delivered {words.percent(got, 1)})" if got is not None else ")"
    tone = "good" if result.get("verified") else "caution"
    form = structure["form"]
    opens = (
        "It opens with stock transformers"
        if form["stock"]
        else "It opens with secateur.load_pruned, since its shapes are no stock model's"
    )
    opens += f": {form['why']}." if form["why"] else "."
    return [(tone, text + ". Opened again and compared after writing."), ("plain", opens)]


def speed(result: dict[str, Any]) -> list[Sentence]:
    """How much of the FLOPs saved became time, and where the rest is."""
    parts = (result.get("speed") or {}).get("parts") or {}
    out: list[Sentence] = []
    for phase, found in parts.items():
        text = (
            f"{phase}: {words.ratio(found['flops_ratio'])} fewer FLOPs, "
            f"{words.ratio(found['speed_up'])} the speed "
            f"({words.percent(found['reached'], 0)} of the ratio)"
        )
        if found["reached"] < WANTED:
            text += "; " + _where(found)
        out.append(("plain" if found["reached"] >= WANTED else "caution", text + "."))
    return out


def _where(found: dict[str, Any]) -> str:
    """The part whose time shrank least for its share."""
    dense, pruned = found["dense"], found["pruned"]
    left = {p: pruned[p] - dense[p] / found["flops_ratio"] for p in _PART_NAMES}
    worst = max(left, key=lambda p: left[p])
    return (
        f"the rest is mostly in {_PART_NAMES[worst]}: {words.duration(dense[worst])} before, "
        f"{words.duration(pruned[worst])} after"
    )


def rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """One line per group, for the table."""
    return [
        {**row, "share": row["removed"] / max(1, row["before"])}
        for row in (result.get("structure") or {}).get("groups", ())
    ]


def parts_table(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Seconds by part, dense and pruned, for both phases."""
    found = (result.get("speed") or {}).get("parts") or {}
    return [
        {
            "phase": phase,
            "part": name,
            "dense": record["dense"][part],
            "pruned": record["pruned"][part],
        }
        for phase, record in found.items()
        for part, name in _PART_NAMES.items()
    ]


def widths_chart(result: dict[str, Any]) -> Markup | None:
    """Share of units kept in each block, a line per kind."""
    kinds: dict[str, list[tuple[float, float]]] = {}
    for row in rows(result):
        if row["block"] is not None:
            name = " ".join(
                part
                for part in (
                    row["stack"] if row["stack"] == "encoder" else "",
                    "cross" if row["attention"] == "cross" else "",
                    row["unit"],
                )
                if part
            )
            kinds.setdefault(name, []).append((float(row["block"]), 1 - row["share"]))
    if not kinds or max(len(points) for points in kinds.values()) < 2:
        return None
    series = [Series(n, points, tone=1 + i % 5) for i, (n, points) in enumerate(kinds.items())]
    return charts.responsive(
        lambda width: charts.line_chart(
            series,
            title="Units kept in each block",
            x_label="block",
            y_label="share kept",
            width=width,
            height=240,
            from_zero=True,
        )
    )
