"""Train a small part of a pruned model, keep its zeros, and get quality back.

Give a run's folder (its masks are used), or any sparse model with [cyan]--mask-from-zeros[/cyan].
The same command run again after a crash or Ctrl-C goes on with the same losses.

[bold]Examples[/bold]

  secateur recover demo-50 --out demo-50-recovered

  secateur recover demo-50 --with mask-lora --train norms --steps 200 --out better

  secateur recover ./sparse-model --mask-from-zeros --train norms,biases --text my.txt --out out

  secateur recover small-dense --no-mask --with lora --dense HuggingFaceTB/SmolLM2-360M --out out

  secateur recover demo-50 --adapter ./my-peft-adapter --out merged
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from secateur.cli import common
from secateur.errors import UsageError

NAME = "recover"


def command(
    model: Annotated[str, typer.Argument(metavar="RUN_OR_MODEL", help="a run's folder or a model")],
    out: common.Out,
    method: common.RecoverWith = None,
    train: common.Train = None,
    steps: Annotated[int | None, typer.Option(help="optimizer steps")] = None,
    lr: Annotated[float | None, typer.Option(help="highest learning rate")] = None,
    batch: Annotated[int | None, typer.Option(help="windows in a step")] = None,
    length: common.Length = None,
    text: Annotated[
        str | None, typer.Option(help="file or named corpus to train on ('secateur texts')")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="order of the windows")] = None,
    distil: Annotated[
        float | None, typer.Option(help="share of the loss learnt from the dense model")
    ] = None,
    add_biases: Annotated[
        bool, typer.Option("--add-biases", help="give linears biases where they have none")
    ] = False,
    setting: common.RecoverSettings = None,
    masks: Annotated[Path | None, typer.Option(help="mask file (masks.safetensors)")] = None,
    mask_from_zeros: Annotated[
        bool, typer.Option("--mask-from-zeros", help="what is zero now must stay zero")
    ] = False,
    no_mask: Annotated[
        bool, typer.Option("--no-mask", help="nothing must stay zero (after structured cuts)")
    ] = False,
    adapter: Annotated[
        Path | None, typer.Option(help="merge this adapter of PEFT's, and train nothing")
    ] = None,
    dense: Annotated[
        str | None, typer.Option(help="the model it was cut from; of a run, the recipe's")
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
    from secateur.recipe import Evaluation, Recovery, build_part
    from secateur.run.recovering import recover_model

    spec = build_part(
        Recovery,
        "recovery",
        (common.read_options(setting) or {})
        | common.given(
            method=method,
            train=common.names(train),
            steps=steps,
            lr=lr,
            batch=batch,
            length=length,
            text=text,
            seed=seed,
            distil=distil,
            add_biases=add_biases or None,
        ),
    )
    if adapter is not None and spec.model_fields_set:
        raise UsageError(
            "an adapter is merged as it is, and nothing is trained",
            field=sorted(spec.model_fields_set)[0],
            value=str(adapter),
            fix="leave the settings of training out, or --adapter",
        )
    measured = common.given(text=eval_text, length=eval_length, windows=eval_windows)
    result = recover_model(
        model,
        spec,
        out=out,
        masks=masks,
        mask_from_zeros=mask_from_zeros,
        no_mask=no_mask,
        adapter=adapter,
        dense=dense,
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
    recovery = report["recovery"]
    common.say()
    common.say(f"[bold]{common.plain(report['model']['name'])}[/bold]: {told(report)}")
    common.say(f"zeros       {recovery['zeros']:,} before and after, verified")
    if report.get("folder"):
        common.say(f"report      {common.plain(report['folder'])}/report.html")


def told(report: dict[str, Any]) -> str:
    """``perplexity 34.4 -> 29.1 (dense 27.0), 0.09 % trained in 12 s``."""
    recovery, quality = report["recovery"], report.get("quality")
    cost = f"{recovery['share']:.3%} of the parameters trained in {recovery['seconds']:.0f} s"
    if recovery["method"] == "adapter":
        lost = recovery["lost_on_zeros"]
        cost = f"an adapter of {recovery['share']:.3%} of the parameters merged"
        cost += f" ({lost:.0%} of its update lay on zeros and is lost)" if lost else ""
    before = recovery.get("before")
    if not quality or not before:
        return cost
    text = f"perplexity {before['pruned']['perplexity']:.2f} cut -> "
    text += f"{quality['pruned']['perplexity']:.2f} recovered"
    if quality.get("dense"):
        text += f" (dense {quality['dense']['perplexity']:.2f})"
    return f"{text}, {cost}"
