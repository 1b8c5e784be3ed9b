"""Several methods at several targets on one page: a plot, a table, one protocol."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from markupsafe import Markup

from secateur.errors import UsageError
from secateur.files import finite
from secateur.masks.target import Target
from secateur.report import charts, facts, words
from secateur.report.charts import Series
from secateur.report.write import write_pages


def write_comparison(
    results: dict[str, Any] | Sequence[dict[str, Any]], folder: Path | str
) -> dict[str, Path]:
    """Write ``report.html``, ``report.md`` and ``report.json`` of a comparison.

    Args:
        results: the record of ``secateur compare`` (``methods``, ``targets`` and
            ``perplexity[method][target]``, ...), or several runs' results.
        folder: created if need be.

    Returns:
        ``html``, ``markdown`` and ``json`` paths.

    Raises:
        UsageError: the runs were measured under different protocols, or not at all.
    """
    record = finite(results if isinstance(results, dict) else gather(results))
    methods, targets = record["methods"], record["targets"]
    rows = [_row(record, method) for method in methods]
    context = {
        "result": record,
        "title": record.get("model") or "a model",
        "subtitle": f"{len(methods)} methods compared at {', '.join(targets)}",
        "targets": targets,
        "rows": rows,
        "dense": record.get("dense"),
        "summary": _summary(record),
        "protocol": facts.facts(record.get("protocol")),
        "calibration": facts.facts(record.get("calibration")),
        "figures": {
            "perplexity": _chart(record, "perplexity", "perplexity (log scale)", log=True),
            "kl": _chart(record, "kl", "KL from the dense model, nats per token", log=False),
        },
    }
    tags = ["secateur", "pruning", "comparison"]
    card = {"front_matter": yaml.safe_dump({"tags": tags}, sort_keys=False), **context}
    return write_pages(Path(folder), "comparison", context, card, record)


def gather(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One record from several runs' results, all of one model and one protocol."""
    if not results:
        raise UsageError("there is nothing to compare", field="results", value=[])
    digests: dict[Any, str] = {}
    record: dict[str, Any] = {"methods": [], "targets": []}
    for key in ("perplexity", "stderr", "kl", "top1_agreement"):
        record[key] = {}
    for result in results:
        name, target = _label(result), _target(result)
        quality = result.get("quality")
        if not quality or not quality.get("pruned"):
            raise UsageError(
                "its quality was not measured", field="run", value=f"{name} at {target}"
            )
        protocol = quality.get("protocol") or {}
        digests.setdefault(protocol.get("digest") or repr(sorted(protocol.items())), name)
        if name not in record["methods"]:
            record["methods"].append(name)
        if target not in record["targets"]:
            record["targets"].append(target)
        figures = {
            "perplexity": quality["pruned"]["perplexity"],
            "stderr": quality["pruned"].get("stderr"),
            "kl": quality.get("kl"),
            "top1_agreement": quality.get("top1_agreement"),
        }
        for key, value in figures.items():
            record[key].setdefault(name, {})[target] = value
    if len(digests) > 1:
        told = ", ".join(f"{name} under {digest}" for digest, name in digests.items())
        raise UsageError(
            f"the runs were measured under different protocols ({told})",
            field="protocol",
            fix="evaluate them again with the same text, length and windows",
        )
    first = results[0]
    quality = first["quality"]
    return record | {
        "secateur": first.get("secateur"),
        "model": (first.get("model") or {}).get("name"),
        "dense": (quality.get("dense") or {}).get("perplexity"),
        "protocol": quality.get("protocol"),
        "calibration": first.get("calibration"),
        "command": "\n".join(str(r["command"]) for r in results if r.get("command")),
    }


def _label(result: dict[str, Any]) -> str:
    recipe = result.get("recipe") or {}
    update = recipe.get("update")
    return str(recipe.get("method") or "?") + (f"+{update}" if update else "")


def _target(result: dict[str, Any]) -> str:
    totals = result["totals"]
    return str(totals.get("pattern") or f"{totals['asked']:g}")


def _row(record: dict[str, Any], method: str) -> dict[str, Any]:
    cells = []
    for target in record["targets"]:
        value = record["perplexity"][method].get(target)
        rivals = [
            record["perplexity"][m][target]
            for m in record["methods"]
            if record["perplexity"][m].get(target) is not None
        ]
        error = (record.get("stderr") or {}).get(method, {}).get(target)
        agreement = (record.get("top1_agreement") or {}).get(method, {}).get(target)
        detail = [f"± {words.figure(error, 2)}"] if error else []
        detail += [f"top-1 {words.percent(agreement, 1)}"] if agreement is not None else []
        best = value is not None and len(rivals) > 1 and value == min(rivals)
        cells.append({"value": value, "detail": ", ".join(detail), "best": best})
    return {"method": method, "cells": cells}


def _summary(record: dict[str, Any]) -> list[str]:
    """The best method of each target, and whether its lead is larger than the noise."""
    lines = []
    for target in record["targets"]:
        ranked = sorted(
            (values[target], method)
            for method, values in record["perplexity"].items()
            if values.get(target) is not None
        )
        if not ranked:
            continue
        best, name = ranked[0]
        line = f"At {target}, {name} is best with {words.figure(best)}"
        if record.get("dense"):
            line += f" ({words.change(record['dense'], best)} over dense)"
        if len(ranked) > 1:
            second, rival = ranked[1]
            line += f"; {rival} follows with {words.figure(second)}"
        lines.append(line + ".")
    return lines


def _chart(record: dict[str, Any], key: str, label: str, *, log: bool) -> Markup | None:
    """A line per method over sparsity; N:M targets stand alone as diamonds."""
    series = []
    for tone, method in enumerate(record["methods"]):
        points, marks = [], []
        for target, value in (record.get(key) or {}).get(method, {}).items():
            if value is None:
                continue
            parsed = Target.parse(target)
            if parsed.is_pattern:
                marks.append((100 * parsed.sparsity, value, target))
            else:
                points.append((100 * parsed.sparsity, value))
        if points or marks:
            series.append(Series(method, sorted(points), marks, tone))
    if not series:
        return None
    dense = record.get("dense") if key == "perplexity" else None
    patterns = any(s.marks for s in series)
    return charts.responsive(
        lambda width: charts.line_chart(
            series,
            title=f"{label} over sparsity, by method",
            x_label="pruned, %" + (" (diamonds: N:M patterns)" if patterns else ""),
            y_label=label,
            width=width,
            height=380,
            log_y=log,
            from_zero=not log,
            reference=(dense, "dense") if dense else None,
            y_text=words.level,
        )
    )
