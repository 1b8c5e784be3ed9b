"""What 'prune', 'run' and 'eval' say and ask for where the model is a vision network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from secateur.cli import common
from secateur.errors import UsageError


def recipe_of(
    *,
    model: str,
    images: str | None,
    target: str | None,
    method: str | None,
    options: list[str] | None,
    structure: list[str] | None,
    model_option: list[str] | None,
    pretrain: list[str] | None,
    recover: list[str] | None,
    preprocess: list[str] | None,
    eval_images: str | None,
    no_eval: bool,
    no_speed: bool,
    seed: int | None,
    device: str | None,
    refused: dict[str, Any],
) -> Any:
    """A vision recipe from the words of ``secateur prune``.

    Args:
        refused: options of language models that were given.

    Raises:
        UsageError: no images; options that mean nothing here.
    """
    from secateur.recipe_vision import VisionRecipe

    if images is None:
        raise UsageError(
            "a vision network is pruned and measured with images",
            field="images",
            fix="--images digits, fashion-mnist, or a folder",
        )
    for name, value in refused.items():
        if value not in (None, False, []):
            raise UsageError(
                "is for language models, and this is a vision network",
                field=name,
                value=value,
                fix="leave it out; see docs/vision.md",
            )
    evaluation = common.given(images=eval_images, speed=False if no_speed else None)
    trained = None if pretrain is None else common.read_options(pretrain) or {}
    tuned = None if recover is None else common.read_options(recover) or {}
    return VisionRecipe.build(
        {
            **common.given(
                model=model,
                images=images,
                target=target,
                method=method,
                options=common.read_options(options),
                structure=common.read_options(structure),
                model_options=common.read_options(model_option),
                preprocess=common.read_options(preprocess),
                seed=seed,
                device=device,
            ),
            "pretraining": trained,
            "training": tuned,
            "evaluation": None if no_eval else evaluation,
        }
    )


def run(recipe: Any, out: Path, fresh: bool, as_json: bool) -> None:
    """Execute a vision recipe and tell what came of it."""
    from secateur.run.vision import execute_vision

    result = execute_vision(
        recipe,
        out=out,
        fresh=fresh,
        progress=common.progress(as_json),
        command=common.command_line(),
    )
    show(result.report, as_json)


def show(report: dict[str, Any], as_json: bool) -> None:
    """The outcome of a vision run, for a person or a machine."""
    if not report:  # a rank that only helped
        return
    from secateur.report.vision import stages, verdicts

    if as_json:
        common.emit({k: v for k, v in report.items() if k not in ("layers", "costs")})
        return
    flops, sizes = report["flops"], report["parameters"]
    common.say()
    common.say(
        f"[bold]{common.plain(report['model']['name'])}[/bold]: {sizes['before']:,} parameters -> "
        f"{sizes['after']:,}, {flops['ratio']:.2f}x fewer FLOPs, verified"
    )
    for row in stages(report):
        common.say(f"accuracy    {row['accuracy']:.2%} {row['name']} (+- {row['stderr']:.2%})")
    for tone, text in verdicts(report):
        colour = {"good": "green", "caution": "yellow"}.get(tone)
        line = common.plain(text)
        common.say(f"[{colour}]{line}[/{colour}]" if colour else line)
    if report.get("folder"):
        common.say(f"report      {common.plain(report['folder'])}/report.html")


BASELINES = ("channel-l1", "channel-l2", "channel-fpgm")
"""What is compared when nothing is named."""


def compare(recipe: Any, names: list[str], targets: list[str], out: Path, as_json: bool) -> None:
    """Several methods and targets, as a table."""
    from secateur.report.vision_comparison import rows
    from secateur.run.vision_compare import compare_vision

    record = compare_vision(
        recipe,
        names,
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
    for heading in ("method", "asked", "went", "after the cut", "accuracy", "FLOPs", "speed"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for row in rows(record):
        table.add_row(
            row["method"],
            row["target"],
            f"{row['delivered']:.1%} of {row['kind']}",
            f"{row['cut']:.2%}",
            f"{row['accuracy']:.2%}",
            f"{row['flops']:.2f}x",
            row["time"],
        )
    Console().print(table)
    common.say(f"dense {record['dense']:.2%}; protocol {record['protocol']['digest']}")
    common.say(f"report {common.plain(out)}/report.html")


def show_accuracy(record: dict[str, Any], as_json: bool) -> None:
    """The outcome of ``secateur eval --images``."""
    if as_json:
        common.emit(record)
        return
    top5 = "" if record["top5"] is None else f", top-5 {record['top5']:.2%}"
    common.say(
        f"accuracy {record['accuracy']:.2%} (+- {record['stderr']:.2%}){top5}, "
        f"loss {record['loss']:.4f}, {record['images']} images"
    )
    if "dense_accuracy" in record:
        common.say(
            f"dense    {record['dense_accuracy']:.2%}; same answer for {record['agreement']:.1%}"
        )
    if record.get("speed"):
        common.say(f"speed    {common.plain(record['speed']['verdict'])}")
    protocol = record["protocol"]
    common.say("protocol " + common.plain(", ".join(f"{k}={v}" for k, v in protocol.items())))
