"""Lists: methods, allocators, and named texts."""

from __future__ import annotations

from typing import Any

import typer

from secateur.cli import common


def methods_command(as_json: common.Json = False) -> None:
    """List the methods: what each ranks by, what it needs, where it comes from.

    [bold]Example[/bold]

      secateur methods --json
    """
    from dataclasses import fields

    from secateur.methods import methods

    rows: list[dict[str, Any]] = []
    for name in methods:
        kind = methods[name]
        rows.append(
            {
                "name": name,
                "summary": kind.summary,
                "needs": sorted(kind().requirements()),
                "scope": _scope(kind),
                "update": kind.update,
                "options": {f.name: f.default for f in fields(kind)},
                "paper": kind.paper,
            }
        )
    if as_json:
        common.emit({"methods": rows})
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    for heading in ("method", "ranks by", "needs", "scope", "update", "options"):
        table.add_column(heading)
    for row in rows:
        options = ", ".join(f"{k}={v}" for k, v in row["options"].items())
        table.add_row(
            row["name"],
            row["summary"],
            ", ".join(row["needs"]) or "nothing",
            row["scope"],
            row["update"],
            options,
        )
    Console().print(table)


def _scope(kind: Any) -> str:
    """Within what a method's choices compete, in one word."""
    from secateur.methods.structured_base import StructuredMethod
    from secateur.methods.vision_base import VisionMethod

    if issubclass(kind, VisionMethod):
        return "channels"
    return "units" if issubclass(kind, StructuredMethod) else str(kind.scope)


def allocators_command(as_json: common.Json = False) -> None:
    """List the allocators: how each shares a target out, what it reads, where it comes from.

    [bold]Example[/bold]

      secateur allocators --json
    """
    from dataclasses import fields

    from secateur.allocation import allocators

    rows: list[dict[str, Any]] = []
    for name in allocators:
        kind = allocators[name]
        readings = kind.with_options({}).readings()
        needs = {"weights"} if readings or kind.ranks_weights else set()
        needs |= {"input norms" for r in readings if r.inputs}
        needs |= {"token sample" for r in readings if r.sample}
        needs |= {"the method's scores"} if kind.ranks_scores else set()
        needs |= {"trials on text"} if kind.searches else set()
        rows.append(
            {
                "name": name,
                "summary": kind.summary,
                "needs": sorted(needs),
                "options": {f.name: f.default for f in fields(kind)},
                "paper": kind.paper,
            }
        )
    if as_json:
        common.emit({"allocators": rows})
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    for heading in ("allocator", "shares out by", "needs", "options"):
        table.add_column(heading)
    for row in rows:
        common_options = ("min_sparsity", "max_sparsity")
        options = ", ".join(
            f"{k}={v}" for k, v in row["options"].items() if k not in common_options
        )
        table.add_row(row["name"], row["summary"], ", ".join(row["needs"]) or "nothing", options)
    Console().print(table)
    common.say("every allocator also takes min_sparsity and max_sparsity, the bounds of a ratio")


def texts_command(as_json: common.Json = False) -> None:
    """List the named texts for calibration and evaluation, with licence and source.

    [bold]Example[/bold]

      secateur texts
    """
    from secateur.data.corpora import CORPORA

    rows = [{"name": c.name, "licence": c.licence, "source": c.source} for c in CORPORA.values()]
    if as_json:
        common.emit({"texts": rows})
        return
    for row in rows:
        common.say(f"[bold]{row['name']:<16}[/bold] {row['licence']:<28} {row['source']}")


def add_to(app: typer.Typer) -> None:
    """Mount the lists."""
    app.command("methods")(methods_command)
    app.command("allocators")(allocators_command)
    app.command("texts")(texts_command)
