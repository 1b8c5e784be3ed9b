"""The page of a forest run: figures, Pareto curve, what is asked of whom."""

from __future__ import annotations

import base64
import hashlib
import json
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from secateur.errors import UsageError
from secateur.files import finite, write_text
from secateur.report.charts import Bar, Series, bar_chart, line_chart, responsive
from secateur.report.write import read_template

MOST_BARS = 15


def read_record(folder: Path) -> dict[str, Any]:
    """The ``result.json`` of a forest run.

    Raises:
        UsageError: there is none.
    """
    file = folder / "result.json"
    if not file.exists():
        raise UsageError("no result.json in it", field="folder", value=str(folder))
    record: dict[str, Any] = json.loads(file.read_text("utf-8"))
    if "forest" not in record:
        raise UsageError(
            "not the folder of a forest run", field="folder", value=str(folder),
            fix="secateur report",
        )  # fmt: skip
    return record


def write_forest_report(record: dict[str, Any], folder: Path) -> Path:
    """Write ``report.html`` into ``folder``: one file that loads nothing from the network."""
    record = finite(record)
    script = read_template("script.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    data = Path(record["recipe"]["data"]).name
    page = {
        "record": record,
        "title": {"prune": "Forest on a budget", "path": "Price path"}.get(
            record["forest"], "Forest methods compared"
        ),
        "subtitle": f"{data}: {record['rows']['all']} rows, {record['features']} features",
        "pareto": _pareto(record),
        "usage": _usage(record),
        "nodes": _nodes(record),
        "recipe": yaml.safe_dump(record["recipe"], sort_keys=False, allow_unicode=True),
        "style": Markup(read_template("style.css")),
        "script": Markup(script),
        "script_hash": digest,
        "version": record.get("secateur"),
    }
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_template),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    path = folder / "report.html"
    write_text(path, environment.get_template("forest.html.j2").render(page))
    return path


def _template(name: str) -> str:
    own = resources.files("secateur.forests") / "templates" / name
    return own.read_text("utf-8") if own.is_file() else read_template(name)


def _pareto(record: dict[str, Any]) -> Markup | None:
    """Score on test examples against mean cost: one line, or one for each method."""
    if record["forest"] == "compare":
        series = [
            Series(name, [(cost, score) for cost, score in points], tone=i)
            for i, (name, points) in enumerate(record["curves"].items())
        ]
    else:
        points = sorted((p["test_cost"], p["test_score"]) for p in record["path"])
        marks = [(record["before"]["cost"], record["before"]["score"], "unpruned")]
        if "after" in record:
            marks.append((record["after"]["cost"], record["after"]["score"], "chosen"))
        series = [Series("optimal prunings", points, marks)]

    def draw(width: float) -> Markup:
        return line_chart(
            series,
            title="Score against cost",
            x_label="mean feature cost of a test example",
            y_label=f"{record['score']} on test examples",
            width=width,
            x_text=lambda x: f"{x:.3g}",
            y_text=lambda y: f"{y:.3f}",
        )

    return responsive(draw)


def _nodes(record: dict[str, Any]) -> Markup | None:
    """How large the optimal prunings are, against what they cost, and the forest before."""
    if record["forest"] == "compare":
        return None
    trees = record["recipe"]["trees"]
    points = sorted((p["test_cost"], 2 * p["internal"] + trees) for p in record["path"])
    marks = [
        (record[state]["cost"], record[state]["nodes"], label)
        for state, label in (("before", "unpruned"), ("after", "chosen"))
        if state in record
    ]
    series = [Series("optimal prunings", points, marks)]

    def draw(width: float) -> Markup:
        return line_chart(
            series,
            title="Nodes against cost",
            x_label="mean feature cost of a test example",
            y_label="nodes of all trees",
            width=width,
            x_text=lambda x: f"{x:.3g}",
            y_text=lambda y: f"{y:,.0f}",
        )

    return responsive(draw)


def _usage(record: dict[str, Any]) -> Markup | None:
    """How many test examples ask for each feature, before and after."""
    if "after" not in record:
        return None
    before, after = record["before"]["usage"], record["after"]["usage"]
    order = sorted(before, key=lambda name: (-after[name], -before[name]))[:MOST_BARS]
    bars = [
        Bar(name, after[name], f"{after[name]:.0%}, unpruned {before[name]:.0%}") for name in order
    ]
    title = "Share of examples that ask for a feature"
    return responsive(lambda width: bar_chart(bars, title=title, width=width))
