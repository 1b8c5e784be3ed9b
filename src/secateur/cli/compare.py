"""Several methods and targets from one calibration: a table, a plot, a leaderboard.

The evidence is gathered once, on the dense model; then each method is minutes of algebra.

[bold]Examples[/bold]

  secateur compare demo --methods magnitude,wanda,sparsegpt --sparsity 0.5,0.6,2:4 --out table

  secateur compare tiny --methods wanda,wanda+exact,sparsegpt,sparsegpt+best -s 0.5 -o table

  secateur compare tiny --methods wanda,wanda@owl,wanda@als,wanda@incremental -s 0.6,0.7 -o table
"""

from __future__ import annotations

from typing import Annotated

import typer

from secateur.cli import common

NAME = "compare"


def command(
    model: common.ModelArgument,
    out: common.Out,
    methods: Annotated[
        str,
        typer.Option(
            "--methods", "-m", help="comma-separated; also METHOD+UPDATE and METHOD@ALLOCATOR"
        ),
    ] = "magnitude,wanda,sparsegpt",
    sparsity: Annotated[str, typer.Option("--sparsity", "-s", help="comma-separated")] = "0.5",
    allocation: common.Allocation = None,
    allocation_option: common.AllocationOptions = None,
    calibration: common.CalibrationText = None,
    samples: common.Samples = None,
    length: common.Length = None,
    seed: common.Seed = None,
    eval_text: Annotated[str | None, typer.Option(help="held-out text")] = None,
    eval_length: Annotated[int | None, typer.Option(help="tokens in a window")] = None,
    eval_windows: Annotated[int | None, typer.Option(help="how many windows")] = None,
    propagate: Annotated[
        str, typer.Option(help="dense: one calibration for all; pruned: a calibration each")
    ] = "dense",
    device: common.Device = None,
    dtype: common.Dtype = None,
    as_json: common.Json = False,
) -> None:
    """What the command does; its help is the module's docstring."""
    from secateur.recipe import Recipe
    from secateur.run.compare import compare

    recipe = Recipe.build(
        {
            **common.given(
                model=model,
                device=device,
                dtype=dtype,
                propagate=propagate,
                allocation=common.allocation(allocation, allocation_option),
            ),
            "calibration": common.given(
                text=calibration, samples=samples, length=length, seed=seed
            ),
            "evaluation": common.given(text=eval_text, length=eval_length, windows=eval_windows),
        }
    )
    record = compare(
        recipe,
        [m.strip() for m in methods.split(",") if m.strip()],
        [s.strip() for s in sparsity.split(",") if s.strip()],
        out,
        progress=common.progress(as_json),
        command=common.command_line(),
    )
    if as_json:
        common.emit(record)
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    table.add_column("method")
    targets = record["targets"]
    for target in targets:
        table.add_column(target, justify="right")
    for method in record["methods"]:
        cells = [f"{record['perplexity'][method][t]:.2f}" for t in targets]
        table.add_row(method, *cells)
    Console().print(table)
    common.say(f"dense {record['dense']:.2f}; protocol {record['protocol']['digest']}")
    common.say(f"report {common.plain(out)}/report.html")
