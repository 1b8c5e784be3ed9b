"""The report of ``secateur heads``: which heads went, how they ranked, what that cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from markupsafe import Markup

from secateur.files import finite
from secateur.report import charts, facts, words
from secateur.report.charts import Bar, Cell


def write_heads_report(result: dict[str, Any], folder: Path | str) -> dict[str, Path]:
    """Write ``report.html``, ``report.md`` and ``report.json`` of head pruning into ``folder``."""
    from secateur.report.write import write_pages

    result = finite(result)
    settings = result["settings"]
    context = {
        "result": result,
        "title": result["model"],
        "subtitle": f"{words.percent(settings['share'], 0)} of the heads asked for, by {settings['ranking']}",
        "verdicts": verdicts(result),
        "headlines": headlines(result),
        "figures": {"map": scores_map(result), "left": left_chart(result)},
        "settings": facts.facts({k: v for k, v in settings.items() if k != "rules"})
        + facts.facts(settings["rules"]),
        "machine": facts.facts(result["machine"]),
    }
    header = {
        "library_name": "transformers",
        "tags": ["secateur", "pruning", "attention-heads"],
    }
    card = context | {"front_matter": yaml.safe_dump(header, sort_keys=False)}
    return write_pages(Path(folder), "heads", context, card, result)


def headlines(result: dict[str, Any]) -> list[dict[str, str]]:
    """The figures a reader looks for first."""
    heads, sizes, held = result["heads"], result["parameters"], result["held_out"]
    out = [
        {
            "label": "heads removed",
            "value": f"{heads['removed']} of {heads['of']}",
            "detail": f"{words.percent(heads['asked'], 1)} asked for",
        },
        {
            "label": "parameters",
            "value": words.short(sizes["after"]),
            "detail": f"of {words.short(sizes['before'])}",
        },
    ]
    if held:
        value = held["pruned"] if "dense" in held else held["mean"]
        dense = f", dense {words.figure(held['dense'])}" if "dense" in held else ""
        detail = f"{held['samples']} held-out samples{dense}"
        out.append({"label": held["what"], "value": words.figure(value), "detail": detail})
    return out


def verdicts(result: dict[str, Any]) -> list[tuple[str, str]]:
    """What was delivered, in sentences with a tone."""
    heads, held = result["heads"], result["held_out"]
    share = heads["removed"] / max(1, heads["of"])
    out = [
        (
            "good" if abs(share - heads["asked"]) * heads["of"] < 1 else "caution",
            f"{words.percent(share, 1)} of the heads are gone, {words.percent(heads['asked'], 1)} "
            "were asked for; a layer keeps what the rules say it must.",
        )
    ]
    if held is None:
        out.append(("caution", "Nothing was measured: there was no sample left over."))
    elif "dense" in held:
        before, after = held["dense"], held["pruned"]
        if before is None or after is None:
            out.append(("caution", f"Held-out {held['what']}: not a finite number."))
        else:
            change = words.change(before, after) if before else words.figure(after)
            tone = "caution" if after > before else "good"
            out.append((tone, f"Held-out {held['what']}: {change}."))
    opens = "transformers" if result["stock"] else "secateur.load_pruned"
    why = f" ({result['why']})" if result["why"] else ""
    out.append(("plain", f"The folder opens with {opens}{why}."))
    return out


def scores_map(result: dict[str, Any]) -> Markup:
    """Scores, layers down and heads across; a head that went is marked."""
    layers = result["layers"]
    widest = max(layer["heads"] for layer in layers)
    cells: list[list[Cell | None]] = []
    for layer in layers:
        gone = set(layer["gone"])
        line: list[Cell | None] = [
            Cell(
                score or 0.0,
                f"{layer['name']}, head {i}: {words.figure(score)}{', removed' if i in gone else ''}",
                alert=i in gone,
            )
            for i, score in enumerate(layer["scores"])
        ]
        cells.append(line + [None] * (widest - len(line)))
    values = [cell.value for line in cells for cell in line if cell is not None]
    return charts.responsive(
        lambda width: charts.heat_map(
            [layer["name"] for layer in layers],
            [str(i) for i in range(widest)],
            cells,
            title="Score of each head",
            low=min(values),
            high=max(values),
            text=words.figure,
            x_label="head",
            width=width,
        )
    )


def left_chart(result: dict[str, Any]) -> Markup:
    """Share of each layer's heads that stays."""
    bars = [
        Bar(layer["name"], layer["kept"] / layer["heads"], f"{layer['kept']} of {layer['heads']}")
        for layer in result["layers"]
    ]
    return charts.responsive(lambda width: charts.bar_chart(bars, title="Heads left", width=width))
