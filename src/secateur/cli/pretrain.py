"""Train a model on while it shrinks to a budget of parameters (EfficientLLM).

The least salient heads, MLP channels and channels of the residual stream go again and again
while training goes on; the small model's shape is found, not given. The folder afterwards loads
with [cyan]AutoModelForCausalLM.from_pretrained(DIR)[/cyan]. The same command run again after a crash
or Ctrl-C goes on with the same losses.

[bold]Examples[/bold]

  secateur pretrain demo --keep-params 0.5 --tokens 100k --out demo-half

  secateur pretrain HuggingFaceTB/SmolLM2-360M --keep-params 134M --tokens 500M --text corpus.jsonl -o out

  secateur pretrain demo --keep-params 0.7 -t my.txt -R kinds=[ffn,head] -R round_to=8 -o out

  torchrun --nproc-per-node 2 -m secateur pretrain ./model --keep-params 0.5 --tokens 1B -t c.jsonl -o out
"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from secateur.cli import common

NAME = "pretrain"


def command(
    model: common.ModelArgument,
    out: common.Out,
    keep_params: Annotated[
        str | None,
        typer.Option("--keep-params", "-k", help="share of the parameters, or a number: 0.5, 100M"),
    ] = None,
    tokens: Annotated[str | None, typer.Option(help="tokens to train on: 200k, 2M, 1.5B")] = None,
    text: Annotated[
        list[str] | None,
        typer.Option("--text", "-t", help="file, named corpus or hf:DATASET; may be repeated"),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(help="times the text may be gone through [1]")
    ] = None,
    batch: Annotated[int | None, typer.Option(help="windows in a step")] = None,
    length: common.Length = None,
    lr: Annotated[float | None, typer.Option(help="highest learning rate")] = None,
    saliency: Annotated[str | None, typer.Option(help="taylor1, obd or vector")] = None,
    seed: Annotated[int | None, typer.Option(help="order of the windows")] = None,
    distil: Annotated[
        float | None, typer.Option(help="share of the loss learnt from the model as it was")
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", "-R", help="any other key of a recipe's pretraining, NAME=VALUE"),
    ] = None,
    eval_text: Annotated[str | None, typer.Option(help="held-out text to measure on")] = None,
    eval_length: Annotated[int | None, typer.Option(help="tokens in an evaluation window")] = None,
    eval_windows: Annotated[int | None, typer.Option(help="how many windows")] = None,
    no_eval: Annotated[bool, typer.Option("--no-eval", help="measure no quality")] = False,
    device: common.Device = None,
    dtype: common.Dtype = None,
    trust_remote_code: common.TrustRemoteCode = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="throw an earlier attempt in DIR away")
    ] = False,
    as_json: common.Json = False,
) -> None:
    """What the command does; its help is the module's docstring."""
    from secateur.recipe import Evaluation, build_part
    from secateur.recipe_parts import Pretraining
    from secateur.run.pretraining import pretrain_model

    spec = build_part(
        Pretraining,
        "pretraining",
        (common.read_options(setting) or {})
        | common.given(
            keep_params=keep_params,
            tokens=tokens,
            text=text[0] if text and len(text) == 1 else text,
            epochs=epochs,
            batch=batch,
            length=length,
            lr=lr,
            saliency=saliency,
            seed=seed,
            distil=distil,
        ),
    )
    measured = common.given(text=eval_text, length=eval_length, windows=eval_windows)
    result = pretrain_model(
        model,
        spec,
        out=out,
        evaluation=None if no_eval else build_part(Evaluation, "evaluation", measured),
        device=device or "auto",
        dtype=dtype or "auto",
        trust_remote_code=trust_remote_code,
        fresh=fresh,
        progress=common.progress(as_json),
        command=common.command_line(),
    )
    show(result.report, as_json)


def show(report: dict[str, Any], as_json: bool) -> None:
    """The outcome, for a person or a machine."""
    if not report:  # a rank that only helped
        return
    if as_json:
        common.emit({k: v for k, v in report.items() if k not in ("modules", "blocks")})
        return
    from secateur.report.pretraining import told

    common.say()
    name = common.plain(report["model"]["name"])
    for number, line in enumerate(told(report)):
        common.say(f"[bold]{name}[/bold]: {line}" if not number else common.plain(line))
    for note in report.get("notes", []):
        common.say(f"[yellow]note[/yellow]        {common.plain(note)}")
    if report.get("folder"):
        common.say(f"report      {common.plain(report['folder'])}/report.html")
