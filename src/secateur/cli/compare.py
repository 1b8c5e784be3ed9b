"""Several methods and targets from one calibration: a table, a plot, a leaderboard.

The evidence is gathered once, on the dense model; then each method is minutes of algebra.

[bold]Examples[/bold]

  secateur compare demo --methods magnitude,wanda,sparsegpt --sparsity 0.5,0.6,2:4 --out table

  secateur compare tiny --methods wanda,wanda+exact,sparsegpt,sparsegpt+best -s 0.5 -o table

  secateur compare tiny --methods wanda,wanda@owl,wanda@als,wanda@incremental -s 0.6,0.7 -o table

  secateur compare mobilenet --images digits --pretrain epochs=8 -s 30%,50% -R epochs=3 -o vision-table
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
            "--methods",
            "-m",
            help="comma-separated; also METHOD+UPDATE and METHOD@ALLOCATOR; by default magnitude, "
            "wanda, sparsegpt (vision: channel-l1, channel-l2, channel-fpgm)",
        ),
    ] = "",
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
    images: Annotated[
        str | None, typer.Option(help="for a vision network: digits, fashion-mnist or a folder")
    ] = None,
    pretrain: Annotated[
        list[str] | None, typer.Option(help="train the dense vision network first: NAME=VALUE")
    ] = None,
    recover_setting: common.RecoverSettings = None,
    structure: Annotated[
        list[str] | None, typer.Option("--structure", "-S", help="of a vision network: NAME=VALUE")
    ] = None,
    model_option: Annotated[
        list[str] | None, typer.Option(help="of a vision network: NAME=VALUE")
    ] = None,
    preprocess: common.Preprocess = None,
    no_speed: Annotated[bool, typer.Option("--no-speed", help="measure no speed (vision)")] = False,
    device: common.Device = None,
    dtype: common.Dtype = None,
    as_json: common.Json = False,
) -> None:
    """What the command does; its help is the module's docstring."""
    names = [m.strip() for m in methods.split(",") if m.strip()]
    targets = [s.strip() for s in sparsity.split(",") if s.strip()]
    if images is not None:
        from secateur.cli import vision

        wanted = vision.recipe_of(
            model=model,
            images=images,
            target=None,
            method=None,
            options=None,
            structure=structure,
            model_option=model_option,
            pretrain=pretrain,
            recover=recover_setting,
            preprocess=preprocess,
            eval_images=None,
            no_eval=False,
            no_speed=no_speed,
            seed=seed,
            device=device,
            refused={"allocation": allocation, "calibration": calibration, "eval_text": eval_text},
        )
        vision.compare(wanted, names or list(vision.BASELINES), targets, out, as_json)
        return
    common.refuse_for_text(pretrain=pretrain, model_option=model_option, structure=structure)
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
        names or ["magnitude", "wanda", "sparsegpt"],
        targets,
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
    shown = record["targets"]
    for target in shown:
        table.add_column(target, justify="right")
    for method in record["methods"]:
        cells = [f"{record['perplexity'][method][t]:.2f}" for t in shown]
        table.add_row(method, *cells)
    Console().print(table)
    common.say(f"dense {record['dense']:.2f}; protocol {record['protocol']['digest']}")
    common.say(f"report {common.plain(out)}/report.html")
