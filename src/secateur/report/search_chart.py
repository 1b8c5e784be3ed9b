"""A search drawn: every plan tried, and the best so far."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from secateur.report.charts import WIDE, Series, line_chart, responsive, standalone

__all__ = ["of_run", "search_chart", "standalone"]


def search_chart(record: Mapping[str, Any], width: float = WIDE) -> Markup:
    """Value against plans tried: those evaluated in full, and the best so far.

    Args:
        record: what ``search.json`` holds, or a plan's provenance of its search.
    """
    full = [line for line in record["history"] if line["full"] and _finite(line["value"])]
    best = [(line["n"] + 1, line["best"]) for line in record["history"] if _finite(line["best"])]
    lowest, improved = float("inf"), []
    for line in full:
        if line["value"] < lowest:
            lowest = line["value"]
            improved.append((line["n"] + 1, lowest, line.get("candidate", "")))
    start, fitness = record.get("start"), record.get("fitness")
    units = {
        "kl": "KL to the dense model, nats a token",
        "perplexity": "cross-entropy, nats a token",
    }
    series = [
        Series("best so far", best, tone=0),
        Series("evaluated in full", (), [(n["n"] + 1, n["value"], "") for n in full], tone=1),
        Series("improvements", (), improved, tone=2),
    ]
    about = " at ".join(str(record[k]) for k in ("model", "target") if k in record)
    return line_chart(
        series,
        title=f"Search of {record['space']}" + (f": {about}" if about else ""),
        x_label="plans tried",
        y_label=units.get(str(fitness), "nats a token"),
        width=width,
        reference=(float(start), "uniform") if _finite(start) and start is not None else None,
        y_text=lambda y: f"{y:.4g}",
        description=f"{len(full)} plans evaluated in full, the best {lowest:.6g}",
    )


def of_run(result: Mapping[str, Any]) -> Markup | None:
    """The search a run's plan came from, made in the run or read with the plan; None: no search."""
    provenance = (result.get("allocation") or {}).get("provenance") or {}
    search = provenance.get("search") or (provenance.get("made_by") or {}).get("search")
    if not isinstance(search, dict) or not search.get("history"):
        return None
    return responsive(lambda width: search_chart(search, width))


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) < float("inf")
