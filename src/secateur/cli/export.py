"""Export a run's model: bitmask container, GGUF, ONNX or 2:4, re-opened and compared.

Vision networks: [cyan]onnx[/cyan] or [cyan]state-dict[/cyan].

[bold]Examples[/bold]

  secateur export out --format bitmask --dtype bfloat16 --out out-bitmask

  secateur export out --format gguf --out model.gguf

  secateur export out --format onnx --out model.onnx

  secateur export out --format 2:4                # measured on this GPU, or told why not
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from secateur.cli import common

NAME = "export"


def command(
    folder: Annotated[Path, typer.Argument(help="a run's folder")],
    format: Annotated[
        str, typer.Option("--format", "-f", help="bitmask, gguf, onnx, 2:4, state-dict")
    ] = "bitmask",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="file or folder to write")] = None,
    dtype: Annotated[str | None, typer.Option(help="bfloat16, float16, float32")] = None,
    as_json: common.Json = False,
) -> None:
    """What the command does; its help is the module's docstring."""
    from secateur.run.exporting import export

    record = export(folder, format, out, dtype=dtype, progress=common.progress(as_json))
    if as_json:
        common.emit(record)
        return
    for line in record["lines"]:
        common.say(common.plain(line))
