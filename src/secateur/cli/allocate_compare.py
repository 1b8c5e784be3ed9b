"""Allocators or saved plans side by side: where each takes from. Nothing is pruned.

What the allocators read off the model costs one dense pass for all of them together.

[bold]Examples[/bold]

  secateur allocate compare demo --sparsity 0.6

  secateur allocate compare demo -a als -a incremental -a plan.json --sparsity 0.6 --page plans
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from secateur.cli import common

NAME = "compare"


def command(
    model: common.ModelArgument,
    allocation: Annotated[
        list[str] | None,
        typer.Option(
            "--allocation",
            "-a",
            help="an allocator or a plan.json; default: all that need no search",
        ),
    ] = None,
    sparsity: common.Sparsity = None,
    method: common.MethodName = None,
    calibration: common.CalibrationText = None,
    samples: common.Samples = None,
    length: common.Length = None,
    seed: common.Seed = None,
    include: common.Include = None,
    exclude: common.Exclude = None,
    blocks: common.Blocks = None,
    device: common.Device = None,
    evidence: common.EvidenceFolder = None,
    page: Annotated[Path | None, typer.Option(help="folder for report.html, .md and .json")] = None,
    as_json: common.Json = False,
) -> None:
    """What the command does; its help is the module's docstring."""
    from secateur.allocation import allocators
    from secateur.allocation.summary import summary
    from secateur.cli.allocate_show import table
    from secateur.recipe import Recipe
    from secateur.run.allocating import compare_allocators

    names = allocation or [n for n in allocators if not allocators[n].with_options({}).tries]
    recipe = Recipe.build(
        {
            **common.given(
                model=model,
                sparsity=sparsity,
                method=method,
                include=include,
                exclude=exclude,
                blocks=blocks,
                device=device,
            ),
            "calibration": common.given(
                text=calibration, samples=samples, length=length, seed=seed
            ),
            "evaluation": None,
        }
    )
    plans = compare_allocators(recipe, names, evidence=evidence, progress=common.progress(as_json))
    told = {name: summary(plan) for name, plan in plans.items()}
    if page is not None:
        from secateur.report.allocation import write_allocations

        write_allocations(told, page, model=model, command=common.command_line())
    if as_json:
        common.emit({"plans": told})
        return
    table(told)
    for name, plan in plans.items():
        for note in plan.provenance.get("notes", []):
            common.say(f"[yellow]note[/yellow] {common.plain(name)}: {common.plain(note)}")
    if page is not None:
        common.say(f"page written to {common.plain(page)}/report.html")
