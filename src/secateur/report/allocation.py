"""Plans of several allocators side by side on one page."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from secateur.report.allocation_charts import allocation_chart, allocation_map
from secateur.report.write import write_pages


def write_allocations(
    summaries: Mapping[str, dict[str, Any]], folder: Path, *, model: str, command: str
) -> dict[str, Path]:
    """Write ``report.html``, ``report.md`` and ``report.json`` of plans side by side."""
    first = next(iter(summaries.values()))
    record = {"model": model, "command": command, "plans": dict(summaries)}
    context = {
        "result": record,
        "title": model,
        "subtitle": f"{len(summaries)} plans for {first['target']}",
        "rows": [{"label": label, **s} for label, s in summaries.items()],
        "roles": list(first["roles"]),
        "figures": {"lines": allocation_chart(summaries), "map": allocation_map(summaries)},
    }
    return write_pages(folder, "allocation", context, context, record)
