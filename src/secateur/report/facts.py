"""What a result says, in sentences and figures; the templates only arrange it."""

from __future__ import annotations

import math
import re
from typing import Any

from secateur.report import learning, pretraining, structure, words

_HASH = re.compile("[0-9a-f]{32,}")
Sentence = tuple[str, str]
"""Tone (``good``, ``plain`` or ``caution``) and text."""

Z95 = 1.96
NAMES = {
    "sparsegpt": "SparseGPT",
    "wanda": "Wanda",
    "gblm": "GBLM-Pruner",
    "ria": "RIA",
    "efficientllm": "EfficientLLM",
}
"""Methods whose proper name is not their word on the command line."""


def subtitle(result: dict[str, Any]) -> str:
    """``pruned to 50 % with SparseGPT`` in one line."""
    totals, recipe = result.get("totals") or {}, result.get("recipe") or {}
    asked = totals.get("pattern") or words.percent(totals.get("asked"))
    line = f"{asked} pruned"
    if recipe.get("method"):
        line += f" with {NAMES.get(recipe['method'], recipe['method'])}"
    update = recipe.get("update") or (result.get("resolved") or {}).get("update")
    if update and update != "none":
        line += f", survivors updated ({update})"
    return line


def verdicts(result: dict[str, Any]) -> list[Sentence]:
    """The honest summary: what was delivered, what it cost, what it brings."""
    return [
        *_delivered(result),
        *_quality(result),
        *learning.verdict(result),
        *pretraining.verdict(result),
        *_recovery(result),
        *_bytes(result),
        *_speed(result),
    ]


def _delivered(result: dict[str, Any]) -> list[Sentence]:
    totals = result.get("totals")
    if not totals:
        return []
    if result.get("structure"):
        return structure.delivered(result)
    zeros, elements = totals["zeros"], totals["elements"]
    wrong = [m for m in result.get("modules") or [] if m["asked_count"] != m["delivered_count"]]
    asked = totals.get("pattern") or words.percent(totals["asked"])
    text = f"Asked for {asked} of {words.count(elements)} weights"
    if wrong:
        return [("caution", f"{text}, but {len(wrong)} matrices got another count; see the table.")]
    text += f"; {words.count(zeros)} are gone, exact in every matrix"
    if result.get("verified"):
        return [("good", f"{text}. Checked again after writing.")]
    return [("caution", f"{text}, but the written files have not been verified.")]


def _quality(result: dict[str, Any]) -> list[Sentence]:
    quality = result.get("quality")
    if not quality or not quality.get("pruned"):
        return [("caution", "Quality was not measured, so nothing is known of what the cut cost.")]
    pruned = quality["pruned"]["perplexity"]
    if not quality.get("dense"):
        return [
            ("plain", f"Perplexity is {words.figure(pruned)}; the dense model was not measured.")
        ]
    dense = quality["dense"]["perplexity"]
    text = f"Perplexity goes from {words.figure(dense)} to {words.figure(pruned)}"
    text += f" ({words.change(dense, pruned)}), {loss_word(pruned / dense)}"
    agreement = quality.get("top1_agreement")
    if agreement is not None:
        text += (
            f"; the likeliest next token is the dense model's at {words.percent(agreement, 1)} "
            "of positions"
        )
    return [("plain" if pruned / dense <= 1.1 else "caution", text + ".")]


def _recovery(result: dict[str, Any]) -> list[Sentence]:
    recovery = result.get("recovery")
    if not recovery:
        return []
    what = f"{words.percent(recovery['share'], 3)} of the parameters"
    text = f"Recovery trained {what} in {words.duration(recovery['seconds'])}"
    if recovery["method"] == "adapter":
        text = f"An adapter of {what} was merged"
    before, after = recovery.get("before"), result.get("quality")
    if not before or not after:
        return [("plain", f"{text}; what it brought was not measured.")]
    cut, mended = before["pruned"]["perplexity"], after["pruned"]["perplexity"]
    text += f": perplexity {words.figure(cut)} after the cut, {words.figure(mended)} now"
    dense = (after.get("dense") or {}).get("perplexity")
    if dense and cut > dense:
        share = (math.log(cut) - math.log(mended)) / (math.log(cut) - math.log(dense))
        text += f", {words.percent(share, 0)} of the way back to the dense model (in nats)"
    return [("good" if mended < cut else "caution", text + ". No zero was lost.")]


def loss_word(ratio: float) -> str:
    """A fixed scale, so that no report can flatter itself."""
    if ratio <= 1:
        return "no loss by this measure"
    for limit, word in ((1.02, "hardly any loss"), (1.1, "a small loss"), (1.3, "a clear loss")):
        if ratio <= limit:
            return word
    return "a heavy loss" if ratio <= 3 else "a ruined model"


def _bytes(result: dict[str, Any]) -> list[Sentence]:
    disk = (result.get("size") or {}).get("disk") or {}
    dense, bitmask = disk.get("dense"), disk.get("bitmask")
    if not dense:
        return []
    pruned = disk.get("pruned")
    text = ""
    if pruned:
        text = (
            "The written folder is no smaller: zeros are stored like any other weight"
            if pruned > 0.98 * dense
            else f"The written folder takes {words.percent(pruned / dense, 1)} of the dense bytes"
        )
    if bitmask:
        text += "; " if text else ""
        text += (
            f"the bitmask container takes {words.percent(bitmask / dense, 1)} of the dense bytes"
        )
    return [("plain", _sentence(text + "."))] if text else []


def _speed(result: dict[str, Any]) -> list[Sentence]:
    speed, totals = result.get("speed"), result.get("totals") or {}
    if speed and speed.get("verdict"):
        verdict = ("plain", _sentence(str(speed["verdict"])))
        return [verdict, *(structure.speed(result) if result.get("structure") else ())]
    if result.get("structure"):
        return [("plain", "Speed was not measured.")]
    text = "Speed was not measured."
    if not totals.get("pattern") and totals.get("delivered"):
        text += (
            " Scattered zeros bring none with dense kernels: a 2:4 pattern on an Ampere or newer"
            " GPU, or removing whole channels, can."
        )
    return [("plain", text)]


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def headlines(result: dict[str, Any]) -> list[dict[str, str]]:
    """The few figures at the top of the page: label, value, detail."""
    out = []
    totals = result.get("totals")
    if totals:
        detail = f"{words.short(totals['zeros'])} of {words.short(totals['elements'])} weights"
        label = "pruned" + (f", {totals['pattern']}" if totals.get("pattern") else "")
        out.append({"label": label, "value": words.percent(totals["delivered"]), "detail": detail})
    quality = result.get("quality") or {}
    if quality.get("pruned"):
        pruned, dense = quality["pruned"]["perplexity"], quality.get("dense")
        detail = ""
        if dense:
            before = dense["perplexity"]
            detail = f"dense {words.figure(before)}, {words.change(before, pruned)}"
        out.append({"label": "perplexity", "value": words.figure(pruned), "detail": detail})
    if quality.get("top1_agreement") is not None:
        kl = quality.get("kl")
        detail = f"KL {words.figure(kl, 3)} nats per token" if kl is not None else ""
        value = words.percent(quality["top1_agreement"], 1)
        out.append({"label": "same next token", "value": value, "detail": detail})
    disk = (result.get("size") or {}).get("disk") or {}
    if disk.get("bitmask") and disk.get("dense"):
        value = words.percent(disk["bitmask"] / disk["dense"], 1)
        detail = f"{words.size(disk['bitmask'])} as bitmask, dense {words.size(disk['dense'])}"
        out.append({"label": "of the dense bytes", "value": value, "detail": detail})
    speed = result.get("speed") or {}
    kind = next((k for k in ("decode", "prefill") if speed.get(k)), None)
    if kind and speed[kind].get("ratio"):
        out.append({"label": f"dense {kind} speed", **_speed_figure(speed[kind]["ratio"])})
    return out


def recovery(result: dict[str, Any]) -> list[tuple[str, str]]:
    """How a recovery went, as label and text pairs."""
    record = result.get("recovery")
    if not record:
        return []
    adapter = record.get("adapter") or {}
    rows = [
        ("method", plain(record.get("method"))),
        ("trained", plain(record.get("train"))),
        (
            "parameters trained",
            f"{words.count(record['trained'])} of {words.count(record['total'])}",
        ),
        (
            "adapter",
            plain(adapter.get("kind")) + f", rank {adapter.get('rank')}" if adapter else "",
        ),
        ("steps", plain(record.get("steps"))),
        (
            "rate",
            f"{words.figure(record['lr'])}, {record.get('schedule')}" if record.get("lr") else "",
        ),
        ("tokens seen", words.count(record["tokens"]) if record.get("tokens") else ""),
        ("time", words.duration(record.get("seconds"))),
        (
            "first and last loss",
            ""
            if record.get("first_loss") is None
            else f"{words.figure(record['first_loss'])} → {words.figure(record['last_loss'])}",
        ),
        (
            "of its update lost on zeros",
            words.percent(record["lost_on_zeros"], 0) if record.get("lost_on_zeros") else "",
        ),
        ("text", plain(((record.get("text") or {}).get("text") or {}).get("name"))),
        ("zeros before and after", words.count(record.get("zeros"))),
    ]
    return [(label, text) for label, text in rows if text]


def _speed_figure(ratio: dict[str, float]) -> dict[str, str]:
    """The ratio as a headline; one that the spread does not tell from 1 is not shown as a gain."""
    measured, low, high = (words.ratio(ratio.get(k)) for k in ("median", "low", "high"))
    if ratio.get("low", 1.0) <= 1 <= ratio.get("high", 1.0):
        return {"value": "≈ 1×", "detail": f"measured {measured}, from {low} to {high}"}
    return {"value": measured, "detail": f"{low} to {high}"}


def interval(measured: dict[str, Any]) -> tuple[float | None, float | None]:
    """The 95 % interval of a perplexity from its standard error."""
    error = measured.get("stderr")
    if not error:
        return None, None
    return measured["perplexity"] - Z95 * error, measured["perplexity"] + Z95 * error


def facts(record: Any) -> list[tuple[str, str]]:
    """A record as label and text pairs for a definition list; nested ones are laid flat."""
    out: list[tuple[str, str]] = []
    for key, value in record.items() if isinstance(record, dict) else ():
        label = str(key).replace("_", " ")
        if isinstance(value, dict):
            out += [(f"{label} {name}", text) for name, text in facts(value)]
        else:
            out.append((label, plain(value)))
    return out


def plain(value: Any) -> str:
    """A value as text; hashes shortened."""
    if isinstance(value, list):
        return ", ".join(plain(v) for v in value) or words.NOTHING
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: words.NOTHING}[value]
    if isinstance(value, float):
        return f"{value:g}"
    text = str(value)
    # A hash is recognised by its first digits; all of them are in report.json.
    return f"{text[:16]}…" if _HASH.fullmatch(text) else text
