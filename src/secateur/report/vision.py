"""The report of a run on a vision network: accuracy after each stage, and every layer as a picture."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import yaml
from markupsafe import Markup

from secateur.files import finite
from secateur.report import charts, facts, words
from secateur.report.charts import Bar, Column

PICTURES: dict[str, str] = {
    "deprune": "secateur.report.depthwise:pictures",
    "s2hpruner": "secateur.report.widths:pictures",
}
"""Method -> ``module:function`` that draws what only it has: result -> [(heading, caption, chart)]."""

_RANDOM = "before training, random weights"
_STAGES = {
    "dense": ("dense", 5),
    "cut": ("after the cut", 4),
    "recalibrated": ("batch norms measured anew", 3),
    "pruned": ("pruned", 1),
}
_KINDS = {
    "flops": "of the FLOPs",
    "parameters": "of the parameters",
    "channels": "of the channels",
    "weights": "of the weights it may prune",
}


def write_vision_report(result: dict[str, Any], folder: Path | str) -> dict[str, Path]:
    """Write ``report.html``, ``report.md`` and ``report.json`` of a vision run into ``folder``."""
    from secateur.report.write import write_pages

    result = finite(result)
    context = {
        "result": result,
        "title": result["model"]["name"],
        "subtitle": subtitle(result),
        "verdicts": verdicts(result),
        "headlines": headlines(result),
        "stages": stages(result),
        "figures": {
            "accuracy": accuracy_chart(result),
            "widths": widths_chart(result),
            "costs": costs_chart(result),
            "speed": speed_chart(result),
            "time": time_chart(result),
        },
        "pictures": own_pictures(result),
        "protocol": facts.facts((result["quality"] or {}).get("protocol")),
        "training": _trained(result["training"] or result["method"].get("training")),
        "tuned": result["training"] is not None,
        "pretraining": _trained(result["pretraining"]),
        "machine": facts.facts(result["machine"]),
        "method": facts.facts({k: v for k, v in result["method"].items() if _plain(v)}),
        "recipe": yaml.safe_dump(result["recipe"], sort_keys=False, allow_unicode=True),
    }
    return write_pages(
        Path(folder), "vision", context, context | {"front_matter": card(result)}, result
    )


def _plain(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float | bool)


def _trained(record: dict[str, Any] | None) -> Any:
    """What a training did, counted in images."""
    if not record:
        return facts.facts(None)
    shown = {k: record[k] for k in ("steps", "first_loss", "last_loss", "seconds", "stopped")}
    return facts.facts({**shown, "images": record["tokens"], "parameters": record["trained"]})


def subtitle(result: dict[str, Any]) -> str:
    """Method, target, images."""
    totals, recipe = result["totals"], result["recipe"]
    asked = words.percent(totals["asked"], 1)
    return f"{recipe['method']}, {asked} {_KINDS[totals['kind']]}, on {result['images']['train']['name']}"


def headlines(result: dict[str, Any]) -> list[dict[str, str]]:
    """The figures a reader looks for first."""
    quality, flops, sizes = result["quality"], result["flops"], result["parameters"]
    out = []
    if quality:
        before, after = quality["dense"]["accuracy"], quality["pruned"]["accuracy"]
        change = f"dense {before:.2%}, {100 * (after - before):+.2f} points"
        if not _was_trained(result):
            change = f"{before:.2%} {_RANDOM}"
        out.append({"label": "accuracy", "value": f"{after:.2%}", "detail": change})
    out.append(
        {
            "label": "fewer FLOPs",
            "value": words.ratio(flops["ratio"]),
            "detail": f"{words.short(flops['before'])} to {words.short(flops['after'])} an image",
        }
    )
    out.append(
        {
            "label": "parameters",
            "value": words.short(sizes["after"]),
            "detail": f"of {words.short(sizes['before'])}",
        }
    )
    if result["speed"]:
        ratio = result["speed"]["forward"]["ratio"]
        spread = f"{words.ratio(ratio['low'])} to {words.ratio(ratio['high'])}"
        out.append(
            {"label": "speed, here", "value": words.ratio(ratio["median"]), "detail": spread}
        )
    return out


def verdicts(result: dict[str, Any]) -> list[tuple[str, str]]:
    """What was delivered, in sentences with a tone."""
    totals, masks = result["totals"], result["masks"]
    kind = _KINDS[totals["kind"]]
    text = f"{words.percent(totals['delivered'], 2)} {kind} went (asked: {words.percent(totals['asked'], 2)})"
    if masks["gone"]:
        share = masks["gone"] / max(1, masks["elements"])
        text += (
            f"; {words.count(masks['gone'])} single weights are zero, {words.percent(share, 1)} of "
            "the layers they are in"
        )
    out = [("good" if result["verified"] else "caution", text + ".")]
    reopened = result.get("reopened") or {}
    if reopened.get("loaded"):
        out.append(("good", "Opened again from disk and compared: it gives the same logits."))
    elif reopened:
        out.append(("caution", f"Not opened again: {reopened['why']}."))
    quality = result["quality"]
    if quality and not _was_trained(result):
        out.append(
            ("plain", "It was trained from random weights: there is no dense network's accuracy.")
        )
    elif quality:
        out.append(
            (
                "plain",
                f"Both networks give the same answer for {quality['agreement']:.1%} of images.",
            )
        )
    if result["speed"]:
        out.append(("plain", str(result["speed"]["verdict"])))
    fixed = [row for row in result["groups"] if not row["prunable"]]
    if fixed:
        named = "; ".join(f"{row['name']} {row['reason']}" for row in fixed[:6])
        out.append(("plain", f"Left whole: {named}{' ...' if len(fixed) > 6 else ''}."))
    return out + [("caution", note) for note in result["notes"]]


def stages(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Accuracy and loss after each stage there was."""
    quality = result["quality"] or {}
    start = {} if _was_trained(result) else {"dense": (_RANDOM, 5)}
    return [
        {"name": name, "tone": tone, **quality[key]}
        for key, (name, tone) in (_STAGES | start).items()
        if quality.get(key)
    ]


def _was_trained(result: dict[str, Any]) -> bool:
    """Whether the network a run began with had learned anything."""
    return bool(result["model"].get("trained", True))


def accuracy_chart(result: dict[str, Any]) -> Markup | None:
    """Accuracy after each stage with 95 % intervals."""
    bars = []
    for row in stages(result):
        value, far = row["accuracy"], 1.96 * row["stderr"]
        low, high = max(0.0, value - far), min(1.0, value + far)
        bars.append(Bar(row["name"], value, f"{value:.2%}", low, high, row["tone"]))
    if not bars:
        return None
    return charts.responsive(
        lambda width: charts.bar_chart(bars, title="Accuracy", width=width), charts.HALF
    )


def widths_chart(result: dict[str, Any]) -> Markup | None:
    """Units of every group, before and after."""
    columns = [
        Column(
            row["name"],
            row["before"],
            row["after"],
            f"{row['name']}: {row['after']} of {row['before']} {row['kind']}s"
            + (f", {row['reason']}" if row["reason"] else ""),
            not row["prunable"],
        )
        for row in result["groups"]
    ]
    return _columns(columns, "Units of each group", "units")


def costs_chart(result: dict[str, Any]) -> Markup | None:
    """FLOPs of every layer, before and after."""
    columns = [
        Column(
            row["name"],
            row["before"],
            row["after"],
            f"{row['name']} ({row['kind']}): {words.short(row['before'])} to {words.short(row['after'])}",
        )
        for row in result["costs"]
    ]
    return _columns(columns, "FLOPs of each layer", "FLOPs")


def _columns(columns: list[Column], title: str, label: str) -> Markup | None:
    if not columns:
        return None
    return charts.responsive(
        lambda width: charts.column_chart(
            columns, title=title, y_label=label, width=width, y_text=words.short
        )
    )


def speed_chart(result: dict[str, Any]) -> Markup | None:
    """Images a second of both networks."""
    if not result["speed"]:
        return None
    forward = result["speed"]["forward"]
    bars = [
        Bar(
            name,
            found["median"],
            f"{found['median']:.4g} images/s",
            found["low"],
            found["high"],
            tone,
        )
        for name, tone in (("dense", 5), ("pruned", 1))
        for found in [forward[name]]
    ]
    return charts.responsive(
        lambda width: charts.bar_chart(bars, title="Images a second", width=width), charts.HALF
    )


def time_chart(result: dict[str, Any]) -> Markup | None:
    """Where the run's time went."""
    bars = [Bar(k, v, words.duration(v)) for k, v in result["timing"].items() if v > 0]
    if not bars:
        return None
    return charts.responsive(
        lambda width: charts.bar_chart(bars, title="Time of each step", width=width), charts.HALF
    )


def own_pictures(result: dict[str, Any]) -> list[tuple[str, str, Markup]]:
    """What the method draws of itself."""
    where = PICTURES.get(result["recipe"]["method"])
    if where is None:
        return []
    module, _, name = where.partition(":")
    found: list[tuple[str, str, Markup]] = getattr(importlib.import_module(module), name)(result)
    return found


def card(result: dict[str, Any]) -> str:
    """The model card's YAML header."""
    header: dict[str, Any] = {
        "pipeline_tag": "image-classification",
        "tags": ["secateur", "pruning", str(result["recipe"]["method"])],
    }
    quality = result["quality"]
    if quality:
        protocol = quality["protocol"]
        metric = {
            "type": "accuracy",
            "value": quality["pruned"]["accuracy"],
            "name": f"accuracy (protocol {protocol['digest']})",
        }
        entry = {
            "task": {"type": "image-classification"},
            "dataset": {"name": protocol["dataset"], "type": protocol["dataset"]},
            "metrics": [metric],
        }
        header["model-index"] = [{"name": result["model"]["name"], "results": [entry]}]
    return yaml.safe_dump(header, sort_keys=False, allow_unicode=True)
