"""Dry run: what would be cut, how exactly, at what cost in memory, time and bytes.

Reads configuration and weight headers only; nothing is pruned or written (unless --save).

[bold]Examples[/bold]

  secateur plan demo --method sparsegpt --sparsity 0.5

  secateur plan ./model --sparsity 2:4 --json

  secateur plan demo --sparsity 0.6 --save plan.json     # edit it, then: prune --allocation plan.json
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from secateur.cli import common

NAME = "plan"


def command(
    model: common.ModelArgument,
    sparsity: common.Sparsity = None,
    method: common.MethodName = None,
    pattern: common.Pattern = None,
    quality: common.Quality = None,
    update: common.Update = None,
    scope: common.Scope = None,
    samples: common.Samples = None,
    length: common.Length = None,
    option: common.Options = None,
    include: common.Include = None,
    exclude: common.Exclude = None,
    blocks: common.Blocks = None,
    device: common.Device = None,
    save: Annotated[Path | None, typer.Option(help="write the plan as JSON")] = None,
    as_json: common.Json = False,
) -> None:
    """What the command does; its help is the module's docstring."""
    from secateur.recipe import Recipe
    from secateur.run.forecast import forecast

    recipe = Recipe.build(
        {
            **common.given(
                model=model,
                sparsity=sparsity,
                method=method,
                pattern=pattern,
                quality=quality,
                update=update,
                scope=scope,
                options=common.read_options(option),
                include=include,
                exclude=exclude,
                blocks=blocks,
                device=device,
            ),
            "calibration": common.given(samples=samples, length=length),
            "evaluation": None,
        }
    )
    record = forecast(recipe, progress=common.progress(as_json))
    if save is not None:
        from secateur.files import write_json

        write_json(save, record["plan"])
    if as_json:
        common.emit(record)
        return
    _table(record)
    if save is not None:
        common.say(f"plan written to {common.plain(save)}")


def _table(record: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    for heading, side in (("matrices", "left"), ("how many", "right"), ("shape", "right")):
        table.add_column(heading, justify=side)  # type: ignore[arg-type]
    table.add_column("zeros in each", justify="right")
    table.add_column("of", justify="right")
    for row in record["rows"]:
        table.add_row(
            row["role"],
            str(row["count"]),
            "x".join(map(str, row["shape"])),
            row["zeros"],
            f"{row['elements']:,}",
        )
    Console().print(table)
    plan = record["plan"]
    common.say(
        f"[bold]{plan['removed']:,}[/bold] of {plan['elements']:,} weights in blocks go "
        f"({plan['removed'] / plan['elements']:.4%}); {record['left_alone']:,} parameters are left alone"
    )
    for name, why in list(record["excluded"].items())[:5]:
        common.say(f"  not pruned: {common.plain(name)} ({common.plain(why)})")
    cost = record["cost"]
    common.say(
        f"about {cost['seconds'] / 60:.1f} min here ({cost['forwards']} forwards of "
        f"{cost['tokens']:,} tokens, measured {cost['gflops']:.0f} GFLOP/s), "
        f"{cost['memory'] / 2**30:.1f} GiB of memory ({cost['memory_stream'] / 2**30:.1f} with --stream)"
    )
    size = record["bytes"]
    common.say(
        f"on disk {size['dense'] / 1e6:.0f} MB now; {size['bitmask'] / 1e6:.0f} MB as bitmask export"
    )
    common.say(f"speed: {common.plain(record['speed'])}")
    for note in record["notes"]:
        common.say(f"[yellow]note[/yellow] {common.plain(note)}")
