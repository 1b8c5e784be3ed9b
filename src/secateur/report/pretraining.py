"""What a pruning-aware pretraining's report says: which units went when, and what that brought."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from markupsafe import Markup

from secateur.report import charts, words
from secateur.report.charts import Series

NAMES = {"head": "attention heads", "ffn": "FFN channels", "stem": "hidden size"}
_POINTS = 200


def told(result: dict[str, Any]) -> list[str]:
    """The outcome in a few lines, for the command line."""
    record, structure = result["pretraining"], result["structure"]
    before, after = structure["parameters"]["before"], structure["parameters"]["after"]
    lines = [
        f"{before:,} parameters -> {after:,} ({after / before:.1%}; budget {record['budget']:,}), "
        f"{structure['flops']['prefill']['ratio']:.2f}x fewer FLOPs, verified",
        "went        " + ", ".join(_went(result)),
        f"trained on  {words.short(record['tokens'])} tokens in "
        f"{words.duration(record['seconds'])}; saliency {_share(record, 'saliency'):.1%}, "
        f"events {_share(record, 'events'):.1%} of the steps' time",
    ]
    quality = result.get("quality")
    if quality:
        dense = quality.get("dense")
        start = f"{dense['perplexity']:.2f} before -> " if dense else ""
        lines.append(f"perplexity  {start}{quality['pruned']['perplexity']:.2f} after")
    form = structure["form"]
    opens = "stock transformers" if form["stock"] else "secateur.load_pruned"
    lines.append(f"opens with  {opens}")
    return lines


def _share(record: dict[str, Any], what: str) -> float:
    return float(record["spent"][what] / max(1e-9, record["spent"]["steps"]))


def _went(result: dict[str, Any]) -> list[str]:
    """``13 of 32 attention heads``, a phrase a type, for the first group of it."""
    out = []
    for kind, name in NAMES.items():
        rows = [r for r in result["structure"]["groups"] if _type(r["kind"]) == kind]
        if not rows:
            continue
        gone = {r["removed"] * r["finest"] for r in rows}
        of = rows[0]["before"] * rows[0]["finest"]
        if len(gone) == 1:
            out.append(f"{gone.pop()} of {of} {name}")
        else:
            out.append(f"{min(gone)} to {max(gone)} of {of} {name}")
    return out


def _type(kind: str) -> str:
    return "head" if kind == "kv_group" else kind


def facts(result: dict[str, Any]) -> list[tuple[str, str]]:
    """How it went, as label and text pairs; empty where nothing was pretrained."""
    record = result.get("pretraining")
    if not record:
        return []
    schedule, spec = record["schedule"], result["recipe"]["pretraining"]
    rows = [
        ("budget", f"{words.count(record['budget'])} parameters"),
        ("tokens", words.count(record["tokens"])),
        (
            "units went between",
            f"{words.short(schedule['start'])} and {words.short(schedule['stop'])} tokens",
        ),
        ("choices", words.count(len(record["events"]))),
        ("went", ", ".join(_went(result))),
        ("saliency", f"{spec['saliency']}, compared per {_PER[spec['normalize']]}"),
        ("survivors", "updated by second moments" if spec["second_order"] else "left as they were"),
        (
            "rate",
            f"{words.figure(spec['lr'])}, {spec['schedule']}, {spec['batch']} windows a step",
        ),
        ("learnt from the dense model", words.percent(spec["distil"]) if spec["distil"] else ""),
        ("time", words.duration(record["seconds"])),
        ("saliency's share of the steps", words.percent(_share(record, "saliency"), 1)),
        ("events' share of the steps", words.percent(_share(record, "events"), 1)),
    ]
    return [(label, text) for label, text in rows if text]


_PER = {"param": "parameter", "raw": "unit", "cost": "unit of cost"}


def verdict(result: dict[str, Any]) -> list[tuple[str, str]]:
    """Whether throughput followed the FLOPs, as the page's summary says it."""
    reached = follows(result)
    if reached is None:
        return []
    ratio, speed = reached
    text = (
        f"While the model shrank, a token's FLOPs fell {words.ratio(ratio)} and the training's "
        f"speed rose {words.ratio(speed)}: {words.percent(speed / ratio, 0)} of that ratio"
    )
    return [("good" if speed >= 0.8 * ratio else "caution", text + ".")]


def follows(result: dict[str, Any]) -> tuple[float, float] | None:
    """(FLOPs of the first shape over the last's, speed in the last over the first's), measured."""
    spans = _timed(result)
    if len(spans) < 2 or spans[0]["flops"] <= spans[-1]["flops"]:
        return None
    return (
        spans[0]["flops"] / spans[-1]["flops"],
        spans[0]["fastest"] / spans[-1]["fastest"],
    )


def _timed(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [s for s in (result.get("pretraining") or {}).get("spans") or [] if s["fastest"] > 0]


def removed_chart(result: dict[str, Any]) -> Markup | None:
    """Share of each type that is gone, over tokens (the paper's staircase)."""
    record = result.get("pretraining")
    if not record or not record["events"]:
        return None
    totals: dict[str, int] = {}
    for row in result["structure"]["groups"]:
        kind = _type(row["kind"])
        totals[kind] = totals.get(kind, 0) + row["before"] * row["finest"]
    series = []
    for tone, (kind, name) in enumerate(NAMES.items()):
        if kind not in totals:
            continue
        gone, points = 0, [(0.0, 0.0)]
        for event in record["events"]:
            if event["type"] == kind:
                points.append((event["tokens"], gone / totals[kind]))
                gone += sum(len(numbers) for _, numbers in event["units"])
                points.append((event["tokens"], gone / totals[kind]))
        points.append((float(record["tokens"]), gone / totals[kind]))
        series.append(Series(name, _thinned(points), tone=tone))
    return _chart(series, "Removed of each type", "share gone", from_zero=True, percent=True)


def saliency_chart(result: dict[str, Any]) -> Markup | None:
    """The price (saliency per parameter, unless chosen otherwise) of what went, by type."""
    record = result.get("pretraining")
    if not record or not record["events"]:
        return None
    series = []
    for tone, (kind, name) in enumerate(NAMES.items()):
        points = [
            (float(e["tokens"]), float(e["price"])) for e in record["events"] if e["type"] == kind
        ]
        if points:
            series.append(Series(name, _thinned(points), tone=tone))
    if not any(y > 0 for s in series for _, y in s.points):
        return None
    return _chart(series, "Saliency of what went", "price, log scale", log_y=True)


def parameters_chart(result: dict[str, Any]) -> Markup | None:
    """Parameters over tokens."""
    record = result.get("pretraining")
    if not record or not record["events"]:
        return None
    points = [(0.0, float(record["initial"]))]
    for event in record["events"]:
        points += [
            (float(event["tokens"]), points[-1][1]),
            (float(event["tokens"]), float(event["parameters"])),
        ]
    points.append((float(record["tokens"]), points[-1][1]))
    return _chart(
        [Series("parameters", _thinned(points), tone=1)],
        "Parameters",
        "parameters",
        from_zero=True,
        reference=(float(record["budget"]), "budget"),
    )


def loss_chart(result: dict[str, Any]) -> Markup | None:
    """Training loss, and the loss on held-out text, over tokens."""
    record = result.get("pretraining")
    if not record or len(record["losses"]) < 2:
        return None
    step = record["tokens_per_step"]
    series = [Series("training", [(s * step, v) for s, v in record["losses"]], tone=4)]
    looks = [(s * step, v) for s, v in record["validations"]]
    if looks:
        series.append(Series("held-out text", looks, tone=1))
    return _chart(series, "Loss", "nats a token")


def speed_chart(result: dict[str, Any]) -> Markup | None:
    """Speed of the steps and what FLOPs alone would give, both against the first shape's."""
    if not _timed(result):
        return None
    merged = list(_merged(_timed(result), result["pretraining"]["tokens_per_step"]))
    if len(merged) < 2:
        return None
    first = merged[0][1] / merged[0][2]
    speed = [(tokens, seen / spent / first) for tokens, seen, spent, _ in merged]
    flops = [(tokens, merged[0][3] / work) for tokens, _, _, work in merged]
    return _chart(
        [Series("training speed", speed, tone=1), Series("FLOPs, inverse", flops, tone=5)],
        "Speed of training against FLOPs",
        "times the first shape's",
        from_zero=True,
    )


def _merged(spans: list[dict[str, Any]], step: int) -> Iterable[tuple[float, float, float, float]]:
    """Neighbouring spans joined to about 40: (tokens at the start, seen, seconds, FLOPs a token).

    Seconds are those of each span's fastest step: other work on the machine makes no step faster.
    """
    most = max(1.0, sum(s["seen"] for s in spans) / 40)
    part: list[dict[str, Any]] = []
    for span in [*spans, None]:
        if span is not None:
            part.append(span)
        seen = sum(s["seen"] for s in part)
        if part and (span is None or seen >= most):
            work = sum(s["flops"] * s["seen"] for s in part) / seen
            spent = sum(s["fastest"] * s["seen"] / step for s in part)
            yield float(part[0]["tokens"]), seen, spent, work
            part = []


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    step = -(-len(points) // _POINTS)
    kept = points[::step]
    return kept if kept[-1] == points[-1] else [*kept, points[-1]]


def _chart(
    series: list[Series],
    title: str,
    y_label: str,
    *,
    from_zero: bool = False,
    log_y: bool = False,
    percent: bool = False,
    reference: tuple[float, str] | None = None,
) -> Markup:
    def text(y: float) -> str:
        if percent:
            return words.percent(y, 0)
        return words.short(y) if y >= 1000 else f"{y:.3g}"

    return charts.responsive(
        lambda width: charts.line_chart(
            series,
            title=title,
            x_label="tokens",
            y_label=y_label,
            width=width,
            height=280,
            from_zero=from_zero,
            log_y=log_y,
            reference=reference,
            x_text=words.short,
            y_text=text,
        )
    )
