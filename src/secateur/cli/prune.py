"""Prune a language model or, with --images, a vision network; measure it, and write a report.

The folder afterwards loads with [cyan]AutoModelForCausalLM.from_pretrained(DIR)[/cyan], a vision
network with [cyan]secateur.load_vision(DIR)[/cyan].
Run the same command again after a crash or Ctrl-C: it goes on where it stopped.

[bold]Examples[/bold]

  secateur prune demo --sparsity 0.5 --out demo-50

  secateur prune HuggingFaceTB/SmolLM2-360M --method wanda --sparsity 2:4 -c my.txt -o out

  secateur prune demo --sparsity 2:4 --recover perp --train norms,mask-lora -R steps=200 -o out

  secateur prune demo --method unit-magnitude -s 0.25 -S kinds=[ffn] -S round_to=8 -o demo-ffn

  secateur prune ./llama-70b --quality best --sparsity 0.6 --stream --out llama-60

  secateur prune mobilenet --images digits --pretrain epochs=8 --target 50% -R epochs=3 -o digits-50
"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from secateur.cli import common

NAME = "prune"


def command(
    model: common.ModelArgument,
    out: common.Out,
    sparsity: common.Sparsity = None,
    method: common.MethodName = None,
    pattern: common.Pattern = None,
    quality: common.Quality = None,
    update: common.Update = None,
    scope: common.Scope = None,
    allocation: common.Allocation = None,
    allocation_option: common.AllocationOptions = None,
    calibration: common.CalibrationText = None,
    samples: common.Samples = None,
    length: common.Length = None,
    seed: common.Seed = None,
    recover: Annotated[
        str | None,
        typer.Option(help="train after the cut: perp, full, imp, reconstruct, mask-lora ..."),
    ] = None,
    train: common.Train = None,
    recover_setting: common.RecoverSettings = None,
    eval_text: Annotated[str | None, typer.Option(help="held-out text to measure on")] = None,
    eval_length: Annotated[int | None, typer.Option(help="tokens in an evaluation window")] = None,
    eval_windows: Annotated[int | None, typer.Option(help="how many windows")] = None,
    no_eval: Annotated[bool, typer.Option("--no-eval", help="measure no quality or speed")] = False,
    no_speed: Annotated[bool, typer.Option("--no-speed", help="measure no speed")] = False,
    propagate: Annotated[
        str | None, typer.Option(help="later blocks see activations of the: pruned or dense model")
    ] = None,
    granularity: Annotated[str | None, typer.Option(help="block or true_sequential")] = None,
    reconstruct: Annotated[
        str | None, typer.Option(help="fit survivors to the outputs of the: block or dense model")
    ] = None,
    option: common.Options = None,
    include: common.Include = None,
    exclude: common.Exclude = None,
    blocks: common.Blocks = None,
    structure: Annotated[
        list[str] | None,
        typer.Option("--structure", "-S", help="what whole units go: NAME=VALUE, e.g. kinds=[ffn]"),
    ] = None,
    images: Annotated[
        str | None,
        typer.Option(help="for a vision network: digits, fashion-mnist or a folder"),
    ] = None,
    target: Annotated[
        str | None, typer.Option("--target", help="of a vision network: the share that goes, 50%")
    ] = None,
    model_option: Annotated[
        list[str] | None, typer.Option(help="of a vision network: NAME=VALUE, e.g. width=16")
    ] = None,
    pretrain: Annotated[
        list[str] | None,
        typer.Option(help="train the dense vision network first: NAME=VALUE, e.g. epochs=5"),
    ] = None,
    preprocess: common.Preprocess = None,
    eval_images: Annotated[str | None, typer.Option(help="images to measure on")] = None,
    device: common.Device = None,
    dtype: common.Dtype = None,
    stream: common.Stream = False,
    trust_remote_code: common.TrustRemoteCode = False,
    evidence: common.EvidenceFolder = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="throw an earlier run in DIR away")
    ] = False,
    as_json: common.Json = False,
) -> None:
    """What the command does; its help is the module's docstring."""
    from secateur.cli import vision
    from secateur.models.vision.names import is_vision

    if images is not None or is_vision(model):
        wanted = vision.recipe_of(
            model=model,
            images=images,
            target=target or sparsity,
            method=method,
            options=option,
            structure=structure,
            model_option=model_option,
            pretrain=pretrain,
            recover=recover_setting,
            preprocess=preprocess,
            eval_images=eval_images,
            no_eval=no_eval,
            no_speed=no_speed,
            seed=seed,
            device=device,
            refused={
                "pattern": pattern,
                "quality": quality,
                "update": update,
                "scope": scope,
                "allocation": allocation,
                "calibration": calibration,
                "recover": recover,
                "train": train,
                "eval_text": eval_text,
                "propagate": propagate,
                "granularity": granularity,
                "reconstruct": reconstruct,
                "include": include,
                "exclude": exclude,
                "blocks": blocks,
                "stream": stream,
                "evidence": evidence,
            },
        )
        vision.run(wanted, out, fresh, as_json)
        return
    common.refuse_for_text(target=target, model_option=model_option, pretrain=pretrain)
    from secateur.recipe import Recipe
    from secateur.run.runner import execute

    evaluation: dict[str, Any] | None = common.given(
        text=eval_text,
        length=eval_length,
        windows=eval_windows,
        speed=False if no_speed else None,
    )
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
                allocation=common.allocation(allocation, allocation_option),
                propagate=propagate,
                granularity=granularity,
                reconstruct=reconstruct,
                options=common.read_options(option),
                structure=common.read_options(structure),
                include=include,
                exclude=exclude,
                blocks=blocks,
                device=device,
                dtype=dtype,
                stream=stream or None,
                trust_remote_code=trust_remote_code or None,
            ),
            "calibration": common.given(
                text=calibration, samples=samples, length=length, seed=seed
            ),
            "evaluation": None if no_eval else evaluation,
            **common.given(recovery=_recovery(recover, train, recover_setting)),
        }
    )
    result = execute(
        recipe,
        out=out,
        fresh=fresh,
        evidence=evidence,
        progress=common.progress(as_json),
        command=common.command_line(),
    )
    show(result.report, as_json)


def _recovery(
    method: str | None, train: list[str] | None, settings: list[str] | None
) -> dict[str, Any] | None:
    """The recipe's part, if any of its options is given."""
    values = (common.read_options(settings) or {}) | common.given(
        method=method, train=common.names(train)
    )
    return values or None


def show(report: dict[str, Any], as_json: bool) -> None:
    """The outcome of a run, for a person or a machine."""
    if not report:  # a rank that only helped
        return
    if as_json:
        common.emit({k: v for k, v in report.items() if k not in ("modules", "blocks")})
        return
    totals, quality, size = report["totals"], report.get("quality"), report.get("size")
    common.say()
    name = common.plain(report["model"]["name"])
    if report.get("structure"):
        flops = report["structure"]["flops"]["prefill"]["ratio"]
        target = report["structure"]["target"]
        protected = report["recipe"]["structure"]["protect"]
        asked = f"{target['asked']:.2%}"
        if target["kind"] != "ratio":
            asked += f" of the {target['kind']}"
        elif protected:
            asked += " of those outside protected blocks"
        if (target["kind"] != "ratio" or protected) and target["delivered"] is not None:
            asked += f", delivered {target['delivered']:.2%}"
        common.say(
            f"[bold]{name}[/bold]: {totals['elements']:,} parameters -> "
            f"{totals['elements'] - totals['zeros']:,}; {totals['delivered']:.2%} of the units' "
            f"weights cut out (asked {asked}), {flops:.2f}x fewer FLOPs, verified"
        )
    else:
        common.say(
            f"[bold]{name}[/bold]: "
            f"{totals['zeros']:,} of {totals['elements']:,} weights removed "
            f"({totals['delivered']:.2%}; asked {totals['asked']:.2%}), verified"
        )
    if quality:
        dense, pruned = quality["dense"]["perplexity"], quality["pruned"]["perplexity"]
        common.say(
            f"perplexity  {dense:.2f} dense -> {pruned:.2f} pruned   "
            f"(KL {quality['kl']:.3f} nats, same top token {quality['top1_agreement']:.1%}; "
            f"protocol {quality['protocol']['digest']})"
        )
    if report.get("recovery"):
        from secateur.cli.recover import told

        common.say(f"recovery    {told(report)}")
    if size:
        disk = size["disk"]
        bitmask = disk.get("bitmask")
        common.say(
            f"on disk     {disk['dense'] / 1e6:.0f} MB dense, {disk['pruned'] / 1e6:.0f} MB here"
            + (f", {bitmask / 1e6:.0f} MB as bitmask ('secateur export')" if bitmask else "")
        )
    if report.get("speed"):
        common.say(f"speed       {common.plain(report['speed']['verdict'])}")
    for note in report.get("notes", []):
        common.say(f"[yellow]note[/yellow]        {common.plain(note)}")
    if report.get("folder"):
        common.say(f"report      {common.plain(report['folder'])}/report.html")
