"""Re-open a run's folder and prove it: masks, zeros, counts, files, logits.

[bold]Example[/bold]

  secateur verify out
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from secateur.cli import common

NAME = "verify"


def command(
    folder: Annotated[Path, typer.Argument(help="a run's folder")],
    quick: Annotated[bool, typer.Option("--quick", help="do not load the model")] = False,
    as_json: common.Json = False,
) -> None:
    """What the command does; its help is the module's docstring."""
    from secateur.run.verifying import verify_run

    record = verify_run(folder, load_model=not quick, progress=common.progress(as_json))
    if as_json:
        common.emit(record)
        return
    for line in record["checks"]:
        common.say(f"[green]ok[/green]  {common.plain(line)}")
