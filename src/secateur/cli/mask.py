"""Mask files: one frozen model, several N:M masks at 0.65 bits a weight (2:4).

[bold]Examples[/bold]

  secateur mask make run --out code.mask            # of any N:M run

  secateur mask apply HuggingFaceTB/SmolLM2-360M code.mask --out smollm-code

  secateur mask show code.mask
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from secateur.cli import common

app = typer.Typer(help=__doc__, no_args_is_help=True, rich_markup_mode="rich")

MaskArgument = Annotated[Path, typer.Argument(metavar="MASK", help="a mask file")]


@app.command("make")
def make(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="the folder of an N:M run")],
    out: Annotated[Path, typer.Option("--out", "-o", help="file to write, NAME.mask")],
    dense: Annotated[
        str | None, typer.Option(help="the model it was cut from, if not the recipe's")
    ] = None,
    trust_remote_code: common.TrustRemoteCode = False,
    as_json: common.Json = False,
) -> None:
    """Write the mask of an N:M run as a file for its dense model.

    A survivors' update is left behind: the mask goes onto dense weights.
    """
    from secateur.run.mask_files import make_mask

    _show(make_mask(run, out, dense=dense, trust_remote_code=trust_remote_code), as_json)


@app.command("apply")
def apply(
    model: common.ModelArgument,
    mask: MaskArgument,
    out: common.Out,
    no_check: Annotated[
        bool, typer.Option("--no-check", help="do not compare the weights' hashes")
    ] = False,
    trust_remote_code: common.TrustRemoteCode = False,
    as_json: common.Json = False,
) -> None:
    """Put a mask on the dense model it was made for, and save the sparse model.

    Weights other than those the mask was made for are refused.
    """
    from secateur.run.mask_files import apply_to_folder

    record = apply_to_folder(
        model,
        mask,
        out,
        check=not no_check,
        trust_remote_code=trust_remote_code,
        progress=common.progress(as_json),
    )
    if as_json:
        common.emit(record)
        return
    common.say(f"{record['zeros']:,} of {record['of']:,} weights are zero")
    common.say(f"model       {common.plain(record['folder'])}, re-opened and compared")


@app.command("show")
def show(mask: MaskArgument, as_json: common.Json = False) -> None:
    """Say what a mask file holds."""
    from secateur.run.mask_files import describe

    _show(describe(mask), as_json)


def _show(record: dict[str, Any], as_json: bool) -> None:
    if as_json:
        common.emit(record)
        return
    patterns = ", ".join(f"{n} matrices {p}" for p, n in record["patterns"].items())
    common.say(f"[bold]{common.plain(record['file'])}[/bold]: {patterns}")
    common.say(
        f"{record['bytes']:,} bytes for {record['weights']:,} weights, "
        f"{record['bits_per_weight']:.3f} bits a weight"
    )
    for key, value in record["metadata"].items():
        common.say(f"{common.plain(key)}  {common.plain(value)}")
