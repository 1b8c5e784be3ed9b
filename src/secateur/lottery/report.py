"""Pages for tickets and experiments: one self-contained HTML file, and JSON beside it."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from secateur.files import write_json, write_text
from secateur.lottery.certificate import Certificate
from secateur.lottery.experiments.base import Experiment, Table
from secateur.lottery.ticket import Ticket
from secateur.report.charts import Bar, bar_chart, standalone
from secateur.report.write import read_template


def write_experiment(experiment: Experiment, folder: Path, name: str, command: str) -> list[Path]:
    """Write ``<name>.html``, ``<name>.json`` and one SVG per chart; returns the paths."""
    record = {"command": command, "findings": experiment.findings} | experiment.record
    page, data = folder / f"{name}.html", folder / f"{name}.json"
    write_text(page, _page(experiment, "an experiment on strong lottery tickets", command))
    write_json(data, record)
    pictures = []
    for label, chart in experiment.charts.items():
        pictures.append(folder / f"{label}.svg")
        write_text(pictures[-1], standalone(chart))
    return [page, data, *pictures]


def write_ticket_page(
    ticket: Ticket, certificate: Certificate, path: Path, command: str = ""
) -> None:
    """One page about a ticket: what it is, how large, what is proved about it."""
    write_text(path, _page(describe(ticket, certificate), f"seed {ticket.seed}", command))


def describe(ticket: Ticket, certificate: Certificate) -> Experiment:
    """A ticket in findings, tables and charts."""
    size = ticket.size()
    found: tuple[str, ...] = (
        f"{size.kept:,} of {size.random:,} random parameters reproduce {size.target:,} trained ones",
        f"proved: no input of the box has an error above {certificate.bound:.4g} "
        f"({certificate.method} arithmetic, our own re-derivation)",
        f"found: an input with error {certificate.empirical:.4g}",
    )
    if certificate.float32_measured is not None:
        found += (
            f"run in float32, the masked network departs by {certificate.float32_measured:.2g} "
            f"from its exact function ({certificate.samples} inputs)",
        )
    history = ticket.history.get("layers", [{}] * len(ticket.layers))
    rows = []
    for number, (layer, kept) in enumerate(zip(ticket.target.layers, ticket.layers, strict=True)):
        outputs, columns = layer.matrix.shape
        rows.append(
            (
                str(number),
                f"{outputs} x {columns}",
                f"{int(kept.sizes.sum()):,}",
                f"{len(kept.output):,}",
                f"{ticket.weight_eps[number]:.3g}",
                f"{certificate.weight_error[number]:.3g}",
                str(history[number].get("empty_slots", "")),
                str(history[number].get("grown_pools", "")),
            )
        )
    head = (
        "layer", "outputs x columns", "random neurons", "kept out-edges", "weight error asked",
        "weight error", "empty slots", "grown pools",
    )  # fmt: skip
    return Experiment(
        f"A {ticket.construction['name']} ticket",
        found,
        (Table("Layers", head, tuple(rows)),),
        {"bracket": _bracket(certificate), "edges": _edges(ticket)},
    )


def _bracket(certificate: Certificate) -> Markup:
    bars = [
        Bar("found (an input attains it)", certificate.empirical, f"{certificate.empirical:.4g}"),
        Bar("proved (no input exceeds it)", certificate.bound, f"{certificate.bound:.4g}", tone=1),
    ]
    return bar_chart(bars, title="The sup error lies between", width=640)


def _edges(ticket: Ticket) -> Markup:
    """Kept edges per target weight."""
    counts = np.concatenate(
        [
            np.bincount(
                kept.output * layer.matrix.shape[1] + kept.column,
                minlength=layer.matrix.shape[0] * kept.copies * layer.matrix.shape[1],
            )
            for layer, kept in zip(ticket.target.layers, ticket.layers, strict=True)
        ]
    )
    height = np.bincount(counts)
    bars = [
        Bar(f"{number} edges", float(n), f"{int(n):,} weights") for number, n in enumerate(height)
    ]
    return bar_chart(bars, title="Kept random edges per target weight", width=640)


def _heading(svg: Markup) -> Markup:
    """The chart's own title (escaped already)."""
    found = re.search(r"<title>(.*?)</title>", svg)
    return Markup(found[1]) if found else Markup("")


def _page(experiment: Experiment, subtitle: str, command: str) -> str:
    here = Path(__file__).parent / "templates"
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader(
            [jinja2.FileSystemLoader(here), jinja2.FunctionLoader(read_template)]
        ),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = read_template("script.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    context: dict[str, Any] = {
        "title": experiment.title,
        "subtitle": subtitle,
        "findings": experiment.findings,
        "charts": [(name, _heading(svg), svg) for name, svg in experiment.charts.items()],
        "tables": experiment.tables,
        "command": command,
        "style": Markup(read_template("style.css")),
        "script": Markup(script),
        "script_hash": digest,
        "version": None,
    }
    return environment.get_template("lottery.html.j2").render(context)
