"""Make a plan: how much of each matrix goes, exact to the budget. Nothing is pruned.

[bold]Examples[/bold]

  secateur allocate make demo --allocation als --sparsity 0.6 --out plan.json

  secateur allocate make demo -a incremental -A shape=linear -s 4:8 --out plan.json

  secateur prune demo --allocation plan.json --sparsity 0.6 --out demo-60     # after editing it
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from secateur.cli import common

NAME = "make"


def command(
    model: common.ModelArgument,
    out: Annotated[Path, typer.Option("--out", "-o", help="the plan's file (.json)")],
    allocation: common.Allocation = "uniform",
    allocation_option: common.AllocationOptions = None,
    sparsity: common.Sparsity = None,
    method: common.MethodName = None,
    option: common.Options = None,
    calibration: common.CalibrationText = None,
    samples: common.Samples = None,
    length: common.Length = None,
    seed: common.Seed = None,
    include: common.Include = None,
    exclude: common.Exclude = None,
    blocks: common.Blocks = None,
    device: common.Device = None,
    dtype: common.Dtype = None,
    stream: common.Stream = False,
    evidence: common.EvidenceFolder = None,
    as_json: common.Json = False,
) -> None:
    """What the command does; its help is the module's docstring."""
    from secateur.allocation.summary import summary
    from secateur.cli.allocate_show import table
    from secateur.errors import UsageError
    from secateur.files import write_json
    from secateur.recipe import Recipe
    from secateur.run.allocating import allocate_plan

    if out.suffix != ".json":
        raise UsageError("a plan is a .json file", field="out", value=str(out), fix="plan.json")
    recipe = Recipe.build(
        {
            **common.given(
                model=model,
                sparsity=sparsity,
                method=method,
                options=common.read_options(option),
                allocation=common.allocation(allocation, allocation_option),
                include=include,
                exclude=exclude,
                blocks=blocks,
                device=device,
                dtype=dtype,
                stream=stream or None,
            ),
            "calibration": common.given(
                text=calibration, samples=samples, length=length, seed=seed
            ),
            "evaluation": None,
        }
    )
    plan = allocate_plan(recipe, evidence=evidence, progress=common.progress(as_json))
    write_json(out, plan.record())
    if as_json:
        common.emit({"file": str(out), **summary(plan)})
        return
    table({plan.provenance.get("allocator", out.name): summary(plan)})
    common.say(f"plan written to {common.plain(out)}")
