"""Run a YAML recipe: everything 'prune' does, written down.

[bold]Example[/bold]

  secateur run recipe.yaml --out results/first
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from secateur.cli import common
from secateur.cli.prune import show

NAME = "run"


def command(
    recipe: Annotated[Path, typer.Argument(help="a YAML file; see docs/recipes.md")],
    out: common.Out,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="throw an earlier run in DIR away")
    ] = False,
    as_json: common.Json = False,
) -> None:
    """What the command does; its help is the module's docstring."""
    from secateur.recipe import Recipe, read_recipe
    from secateur.recipe_vision import VisionRecipe
    from secateur.run.runner import execute

    values = read_recipe(recipe)
    if "images" in values:
        from secateur.cli import vision

        vision.run(VisionRecipe.build(values), out, fresh, as_json)
        return
    result = execute(
        Recipe.build(values),
        out=out,
        fresh=fresh,
        progress=common.progress(as_json),
        command=common.command_line(),
    )
    if result.report.get("pretraining"):
        from secateur.cli.pretrain import show as show_pretraining

        show_pretraining(result.report, as_json)
    else:
        show(result.report, as_json)
