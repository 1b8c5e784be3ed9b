"""Writing a run's report: one HTML page, one Markdown model card, one JSON file."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from secateur.files import finite, write_json, write_text
from secateur.report import (
    allocation_charts,
    facts,
    figures,
    learning,
    pretraining,
    search_chart,
    structure,
    words,
)


def write_report(result: dict[str, Any], folder: Path | str) -> dict[str, Path]:
    """Write ``report.html``, ``report.md`` and ``report.json`` into ``folder``.

    The page is self-contained: no network, no external font or script, and a content policy
    that forbids them. Parts of ``result`` that are null are left out or said to be missing.

    Args:
        result: a run's record (``result.json``).
        folder: created if need be.

    Returns:
        ``html``, ``markdown`` and ``json`` paths.
    """
    if result.get("kind") == "vision":
        from secateur.report.vision import write_vision_report

        return write_vision_report(result, folder)
    if result.get("kind") == "heads":
        from secateur.report.heads import write_heads_report

        return write_heads_report(result, folder)
    result = _PARTS | finite(result)
    context = {
        "result": result,
        "title": (result.get("model") or {}).get("name") or "a model",
        "subtitle": facts.subtitle(result),
        "verdicts": facts.verdicts(result),
        "headlines": facts.headlines(result),
        "recipe": yaml.safe_dump(result.get("recipe") or {}, sort_keys=False, allow_unicode=True),
        "protocol": facts.facts((result.get("quality") or {}).get("protocol")),
        "calibration": facts.facts(result.get("calibration")),
        "recovery": facts.recovery(result),
        "learning": learning.facts(result),
        "pretraining": pretraining.facts(result),
        "fingerprint": facts.plain((result.get("model") or {}).get("fingerprint")),
        "machine": facts.facts(result.get("machine")),
        "figures": {
            "quality": figures.quality_chart(result),
            "recovery": figures.recovery_chart(result),
            "learned": learning.quality_chart(result),
            "learning": learning.loss_chart(result),
            "movement": learning.movement_chart(result),
            "removed": pretraining.removed_chart(result),
            "prices": pretraining.saliency_chart(result),
            "parameters": pretraining.parameters_chart(result),
            "loss": pretraining.loss_chart(result),
            "training_speed": pretraining.speed_chart(result),
            "errors": figures.error_chart(result),
            "sparsity": figures.sparsity_chart(result),
            "allocation": allocation_charts.of_run(result),
            "search": search_chart.of_run(result),
            "widths": structure.widths_chart(result),
            "output_errors": figures.output_error_chart(result),
            "bytes": figures.bytes_chart(result),
            "speed": figures.speed_charts(result),
            "time": figures.time_chart(result),
        },
        "masks": figures.mask_panels(result),
        "structure_rows": structure.rows(result),
        "structure_parts": structure.parts_table(result),
    }
    card = {"front_matter": front_matter(result), **context}
    return write_pages(Path(folder), "report", context, card, result)


def write_pages(
    folder: Path, template: str, page: dict[str, Any], card: dict[str, Any], record: Any
) -> dict[str, Path]:
    """Render ``<template>.html.j2`` and ``<template>.md.j2`` to ``report.*`` in ``folder``."""
    paths = {kind: folder / f"report.{end}" for kind, end in _ENDINGS.items()}
    script = read_template("script.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    page = page | {
        "style": Markup(read_template("style.css")),
        "script": Markup(script),
        "script_hash": digest,
        "version": record.get("secateur") if isinstance(record, dict) else None,
    }
    write_text(paths["html"], _environment(True).get_template(f"{template}.html.j2").render(page))
    write_text(
        paths["markdown"], _environment(False).get_template(f"{template}.md.j2").render(card)
    )
    write_json(paths["json"], record)
    return paths


def front_matter(result: dict[str, Any]) -> str:
    """The model card's YAML header, as the Hugging Face hub reads it."""
    model, recipe = result.get("model") or {}, result.get("recipe") or {}
    quality, totals = result.get("quality") or {}, result.get("totals") or {}
    tags = ["secateur", "pruning", "sparse", recipe.get("method"), totals.get("pattern")]
    header: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": [str(tag) for tag in tags if tag],
    }
    name = str(model.get("name") or "")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        header["base_model"] = name
        header["base_model_relation"] = "finetune"
    if quality.get("pruned"):
        protocol = quality.get("protocol") or {}
        text = str(protocol.get("dataset") or protocol.get("text") or "held-out text")
        metric = {"type": "perplexity", "value": quality["pruned"]["perplexity"]}
        if protocol.get("digest"):
            metric["name"] = f"perplexity (protocol {protocol['digest']})"
        entry = {
            "task": {"type": "text-generation"},
            "dataset": {"name": text, "type": "text"},
            "metrics": [metric],
        }
        header["model-index"] = [{"name": name or "pruned model", "results": [entry]}]
    return yaml.safe_dump(header, sort_keys=False, allow_unicode=True)


def read_template(name: str) -> str:
    """A file of the package's ``templates`` folder."""
    return (resources.files("secateur.report") / "templates" / name).read_text("utf-8")


def markdown_text(value: Any) -> str:
    """Text that Markdown and the HTML it becomes show as it is, also inside a table."""
    text = re.sub(r"\s+", " ", str(value))
    return re.sub(r"([\\`*_{}\[\]<>#|~$])", r"\\\1", text)


def _environment(html: bool) -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(read_template),
        autoescape=html,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    for name in ("count", "short", "percent", "size", "duration", "figure", "ratio", "change"):
        environment.filters[f"as_{name}"] = getattr(words, name)
    environment.filters["md"] = markdown_text
    return environment


_PARTS: dict[str, Any] = dict.fromkeys(
    (
        "secateur", "command", "recipe", "created", "modules", "blocks", "totals", "quality", "recovery",
        "learning",
        "size", "speed", "timing", "memory_peak", "machine", "notes", "calibration", "verified",
    )
) | {"model": {"name": None, "parameters": None, "fingerprint": None}}  # fmt: skip
"""Every part a page may ask for, as if it had not been recorded."""
_ENDINGS = {"html": "html", "markdown": "md", "json": "json"}
