"""Write (again) the report of a finished run; print where it lies.

[bold]Example[/bold]

  secateur report out
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from secateur.cli import common

NAME = "report"


def command(
    folder: Annotated[Path, typer.Argument(help="a run's folder")], as_json: common.Json = False
) -> None:
    """What the command does; its help is the module's docstring."""
    from secateur.report import write_report
    from secateur.run.results import read_result

    paths = write_report(read_result(folder), folder)
    if as_json:
        common.emit({name: str(path) for name, path in paths.items()})
        return
    for path in paths.values():
        common.say(common.plain(path))
