"""Several methods at several targets on one vision network: a plot and a table on one page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from markupsafe import Markup

from secateur.files import finite
from secateur.report import charts, facts, words
from secateur.report.charts import Series
from secateur.report.write import write_pages


def write_vision_comparison(record: dict[str, Any], folder: Path | str) -> dict[str, Path]:
    """Write ``report.html``, ``report.md`` and ``report.json`` of a comparison into ``folder``."""
    record = finite(record)
    context = {
        "result": record,
        "title": record["model"],
        "subtitle": f"{len(record['methods'])} methods compared at {', '.join(record['targets'])}",
        "rows": rows(record),
        "figure": chart(record),
        "protocol": facts.facts(record["protocol"]),
    }
    tags = {"tags": ["secateur", "pruning", "comparison"]}
    card = {"front_matter": yaml.safe_dump(tags, sort_keys=False), **context}
    return write_pages(Path(folder), "vision_comparison", context, card, record)


def rows(record: dict[str, Any]) -> list[dict[str, Any]]:
    """One line for each method and target, the best accuracy of each target marked."""
    cells = record["cells"]
    best = {t: max(cells[m][t]["accuracy"] for m in record["methods"]) for t in record["targets"]}
    return [
        {
            "method": method,
            "target": target,
            "best": cell["accuracy"] == best[target],
            "time": "" if cell["speed"] is None else words.ratio(cell["speed"]["median"]),
            **cell,
        }
        for target in record["targets"]
        for method in record["methods"]
        for cell in [cells[method][target]]
    ]


def chart(record: dict[str, Any]) -> Markup:
    """Accuracy against what went, a line for each method."""
    series = [
        Series(
            method,
            sorted((c["delivered"], c["accuracy"]) for c in record["cells"][method].values()),
            tone=i,
        )
        for i, method in enumerate(record["methods"])
    ]
    return charts.responsive(
        lambda width: charts.line_chart(
            series,
            title="Accuracy against what went",
            x_label="share that went",
            y_label="accuracy",
            width=width,
            reference=(record["dense"], "dense"),
            x_text=lambda x: f"{x:.0%}",
            y_text=lambda y: f"{y:.1%}",
        )
    )
