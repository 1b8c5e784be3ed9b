"""Explain one matrix of a run: its scores, the threshold, what was kept and what went.

[bold]Examples[/bold]

  secateur why model.layers.3.mlp.down_proj --run out

  secateur why layers.3.mlp --run out          # any part of a name: lists what matches
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from secateur.cli import common

NAME = "why"


def command(
    module: Annotated[str, typer.Argument(metavar="MODULE", help="a matrix, or part of its name")],
    run: Annotated[Path, typer.Option("--run", "-r", help="a run's folder")],
    as_json: common.Json = False,
) -> None:
    """What the command does; its help is the module's docstring."""
    from secateur.run.results import explain

    record = explain(run, module)
    if as_json:
        common.emit(record)
        return
    if "matches" in record:
        for row in record["matches"]:
            common.say(
                f"{common.plain(row['name']):<48} {row['sparsity']:.4f}  error {_error(row['error'])}"
            )
        return
    _explain(record)


def _error(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _explain(record: dict[str, Any]) -> None:
    m = record["module"]
    rows, columns = m["shape"]
    common.say(
        f"[bold]{common.plain(m['name'])}[/bold]  {rows} x {columns}, block {m['block']}, {m['role']}"
    )
    common.say(
        f"removed {m['delivered_count']:,} of {rows * columns:,} "
        f"({m['delivered_count'] / (rows * columns):.4%}), ranked by {record['method']} "
        f"in scope {m['scope']}, update {m['update']}"
    )
    if m.get("output_error") is not None:
        common.say(
            f"output error {m['output_error']:.4f} of the output's norm "
            f"(rank {record['rank']} of {record['modules']}, 1 = worst)"
        )
    for label in ("row", "column"):
        low, middle, high = m[f"{label}_sparsity"]
        common.say(
            f"{label:<7} sparsity {low:.3f} .. {middle:.3f} .. {high:.3f} (min, median, max)"
        )
    histogram = m.get("histogram")
    if histogram:
        common.say(
            f"scores, log10, of {histogram['sampled']:,} weights ([red]x gone[/red], [green]# kept[/green]):"
        )
        edges, gone, kept = histogram["edges"], histogram["pruned"], histogram["kept"]
        top = max(g + k for g, k in zip(gone, kept, strict=True)) or 1
        for i, (g, k) in enumerate(zip(gone, kept, strict=True)):
            if g + k:
                bars = f"[red]{'x' * round(50 * g / top)}[/red][green]{'#' * round(50 * k / top)}[/green]"
                common.say(f"{edges[i]:>8.2f}  {bars}")
    for note in m.get("notes", []):
        common.say(f"[yellow]note[/yellow] {common.plain(note)}")
