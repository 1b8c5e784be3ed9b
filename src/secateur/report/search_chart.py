"""A search drawn: every plan tried, and the best so far."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from secateur.report.charts import Series, line_chart, standalone

__all__ = ["search_chart", "standalone"]


def search_chart(record: Mapping[str, Any], width: float = 928) -> Markup:
    """Value against plans tried: those evaluated in full, and the best so far.

    Args:
        record: what ``search.json`` holds.
    """
    full = [line for line in record["history"] if line["full"] and _finite(line["value"])]
    best = [(line["n"] + 1, line["best"]) for line in record["history"] if _finite(line["best"])]
    improved = [
        (line["n"] + 1, line["value"], line["candidate"])
        for before, line in zip([{"best": float("inf")}, *full], full, strict=False)
        if line["value"] <= line["best"] < before["best"]
    ]
    first = record["start"]
    unit = "KL to the dense model, nats a token" if record["fitness"] == "kl" else "nats a token"
    series = [
        Series("best so far", best, tone=0),
        Series("evaluated in full", (), [(n["n"] + 1, n["value"], "") for n in full], tone=1),
        Series("improvements", (), improved, tone=2),
    ]
    return line_chart(
        series,
        title=f"Search of {record['space']}: {record['model']} at {record['target']}",
        x_label="plans tried",
        y_label=unit,
        width=width,
        reference=(float(first), "uniform") if _finite(first) else None,
        y_text=lambda y: f"{y:.4g}",
        description=f"{len(record['history'])} plans tried, best {record['best']['value']:.6g}",
    )


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) < float("inf")
