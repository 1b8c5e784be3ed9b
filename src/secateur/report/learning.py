"""What a learned mask's report says: how far the mask moved, and what it is worth by itself."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from secateur.report import charts, words
from secateur.report.charts import Bar, Series


def facts(result: dict[str, Any]) -> list[tuple[str, str]]:
    """How the learning went, as label and text pairs; empty where nothing was learned."""
    record = result.get("learning")
    if not record:
        return []
    file = record.get("mask_file")
    rows = [
        ("started from", str((record.get("prior") or {}).get("name"))),
        ("logits trained", words.count(record["trained"])),
        ("steps", f"{record['steps']} of {record['batch']} x {record['length']} tokens"),
        ("time", words.duration(record["seconds"])),
        ("groups whose mask changed", words.percent(record["changed"], 1)),
        ("memory beyond the frozen model", f"{record['bytes_per_weight']:g} bytes a weight"),
        (
            "mask file",
            f"{file['name']}, {words.size(file['bytes'])}, {file['bits_per_weight']:.3f} bits a weight"
            if file
            else "",
        ),
    ]
    return [(label, text) for label, text in rows if text]


def verdict(result: dict[str, Any]) -> list[tuple[str, str]]:
    """The learned mask against the one it started from, as the page's summary says it."""
    found = _compared(result)
    if found is None:
        return []
    name, before, after = found
    better = after < before
    text = (
        f"The learned mask is {'better' if better else 'no better'} than the {name} mask it "
        f"started from: perplexity {words.figure(before)} there, {words.figure(after)} here, "
        "with the same weights"
    )
    return [("good" if better else "caution", text + ("." if better else "; it wants more steps."))]


def quality_chart(result: dict[str, Any]) -> Markup | None:
    """Perplexity of the dense model, under the one-shot mask and under the learned one."""
    found = _compared(result)
    if found is None:
        return None
    name, before, after = found
    dense = (result["quality"].get("dense") or {}).get("perplexity")
    shown = [("dense", dense, 5), (name, before, 4), ("learned", after, 1)]
    bars = [Bar(n, v, words.figure(v), tone=tone) for n, v, tone in shown if v is not None]
    return charts.responsive(
        lambda width: charts.bar_chart(
            bars, title="Perplexity under each mask, lower is better", width=width
        )
    )


def loss_chart(result: dict[str, Any]) -> Markup | None:
    """Loss under the mask as it would be exported, over the steps."""
    looks = (result.get("learning") or {}).get("validations") or []
    points = [(float(step), float(value)) for step, value in looks]
    if len(points) < 2:
        return None
    return charts.responsive(
        lambda width: charts.line_chart(
            [Series("likeliest mask", points, tone=1)],
            title="Loss on windows set aside, under the mask as it would be exported",
            x_label="step",
            y_label="nats a token",
            width=width,
            height=300,
            reference=(points[0][1], "at the start"),
            y_text=lambda y: f"{y:.3g}",
        )
    )


def movement_chart(result: dict[str, Any]) -> Markup | None:
    """Share of groups whose mask is another than at the start, and how settled the mixture is."""
    moved = (result.get("learning") or {}).get("moved") or []
    if len(moved) < 2:
        return None
    changed = [(float(step), float(share)) for step, share, _ in moved]
    settled = [(float(step), float(share)) for step, _, share in moved]
    return charts.responsive(
        lambda width: charts.line_chart(
            [
                Series("groups changed", changed, tone=0),
                Series("mixture on kept weights", settled, tone=2),
            ],
            title="How the masks move and settle",
            x_label="step",
            y_label="share",
            width=width,
            height=300,
            y_text=lambda y: words.percent(y, 0),
        )
    )


def _compared(result: dict[str, Any]) -> tuple[str, float, float] | None:
    """(prior's name, perplexity under it, perplexity under the learned mask)."""
    prior = (result.get("learning") or {}).get("prior") or {}
    recovery = result.get("recovery") or {}
    after = recovery.get("before") or result.get("quality")
    if not prior.get("quality") or not after:
        return None
    before = prior["quality"]["pruned"]["perplexity"]
    return str(prior["name"]), float(before), float(after["pruned"]["perplexity"])
