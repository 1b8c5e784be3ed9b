"""Explain one matrix of a run (or one group of units): scores, threshold, what was kept and went.

[bold]Examples[/bold]

  secateur why model.layers.3.mlp.down_proj --run out

  secateur why layers.3.mlp --run out          # any part of a name: lists what matches
"""

from __future__ import annotations

from pathlib import Path
from statistics import median
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
    if "group" in record:
        _explain_group(record)
        return
    _explain(record)


def _error(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _explain_group(record: dict[str, Any]) -> None:
    g = record["group"]
    place = "" if g["block"] is None else f", block {g['block']}"
    common.say(f"[bold]{common.plain(g['name'])}[/bold]  {g['before']} {g['unit']}{place}")
    common.say(
        f"removed {g['removed']} ({g['removed'] / g['before']:.2%}), {g['after']} stay; "
        f"ranked by {record['method']}"
    )
    if record["gone"]:
        common.say(f"gone    {_ranges(record['gone'])} (numbers of the original model)")
    if g.get("scores"):
        low, middle, high = min(g["scores"]), median(g["scores"]), max(g["scores"])
        common.say(f"scores  {low:.4g} .. {middle:.4g} .. {high:.4g} (min, median, max)")
    for name, value in (g.get("notes") or {}).items():
        common.say(f"{common.plain(name):<7} {value:.6g}")


def _ranges(numbers: list[int], most: int = 12) -> str:
    """``0-3, 7, 9-10``; cut off after ``most`` runs."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    words = [str(a) if a == b else f"{a}-{b}" for a, b in runs[:most]]
    return ", ".join(words + (["..."] if len(runs) > most else []))


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
