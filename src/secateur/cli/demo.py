"""Prune the packaged SmolLM2-135M-Instruct and open the way to its report.

The same as: secateur prune demo --quality good --sparsity 0.5 --samples 24 --out demo
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from secateur.cli import common

NAME = "demo"


def command(
    out: Annotated[Path, typer.Option("--out", "-o", help="folder to write")] = Path("demo"),
    as_json: common.Json = False,
) -> None:
    """What the command does; its help is the module's docstring."""
    from secateur.cli.prune import show
    from secateur.recipe import Recipe
    from secateur.run.runner import execute

    recipe = Recipe.build(
        {
            "model": "demo",
            "quality": "good",
            "sparsity": 0.5,
            "calibration": {"samples": 24, "length": 512},
            "evaluation": {"windows": 8, "length": 512},
        }
    )
    result = execute(
        recipe,
        out=out,
        progress=common.progress(as_json),
        command="secateur prune demo --quality good --sparsity 0.5 --samples 24 --length 512 "
        f"--eval-windows 8 --out {out}",
    )
    show(result.report, as_json)
    if not as_json:
        common.say()
        common.say(f"[bold]Open {common.plain(out.resolve() / 'report.html')}[/bold] in a browser.")
