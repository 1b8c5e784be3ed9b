"""Measure a model: perplexity under a recorded protocol, and agreement with a dense one.

[bold]Examples[/bold]

  secateur eval out --text pydoc:test --length 512 --json

  secateur eval out --dense demo --text wikitext-2 --length 1024 --windows 8

  secateur eval out --task piqa --limit 200

  secateur eval digits-50 --images digits          # a vision run's network: accuracy
"""

from __future__ import annotations

from typing import Annotated

import typer

from secateur.cli import common

NAME = "eval"


def command(
    model: common.ModelArgument,
    text: Annotated[str, typer.Option(help="file or named corpus")] = "pydoc:test",
    length: Annotated[
        int | None, typer.Option(help="tokens in a window; default 512, or the model's positions")
    ] = None,
    windows: Annotated[
        int | None, typer.Option(help="the first so many windows (default: all)")
    ] = None,
    dense: Annotated[str | None, typer.Option(help="also compare with this model")] = None,
    task: Annotated[str | None, typer.Option(help="multiple choice instead: piqa or blimp")] = None,
    limit: Annotated[int | None, typer.Option(help="only so many questions")] = None,
    speed: Annotated[bool, typer.Option("--speed", help="also tokens/s, against --dense")] = False,
    images: Annotated[
        str | None, typer.Option(help="of a vision network: digits, fashion-mnist or a folder")
    ] = None,
    device: common.Device = None,
    dtype: common.Dtype = None,
    as_json: common.Json = False,
) -> None:
    """What the command does; its help is the module's docstring."""
    if images is not None:
        from secateur.cli.vision import show_accuracy
        from secateur.run.vision_commands import evaluate_vision

        found = evaluate_vision(
            model,
            images,
            dense=dense,
            limit=limit,
            speed=speed,
            device=device or "auto",
            progress=common.progress(as_json),
        )
        show_accuracy(found, as_json)
        return
    from secateur.run.evaluate import evaluate_model

    record = evaluate_model(
        model,
        text=text,
        length=length,
        windows=windows,
        dense=dense,
        task=task,
        limit=limit,
        speed=speed,
        device=device or "auto",
        dtype=dtype or "auto",
        progress=common.progress(as_json),
    )
    if as_json:
        common.emit(record)
        return
    if "accuracy" in record:
        common.say(
            f"{common.plain(record['task'])}: {record['accuracy']:.1%} of {record['questions']} "
            f"(+- {record['stderr']:.1%})"
        )
        return
    common.say(f"perplexity {record['perplexity']:.3f} (+- {record['stderr']:.3f})")
    if dense:
        common.say(f"dense      {record['dense_perplexity']:.3f}")
        common.say(
            f"KL(dense || model) {record['kl']:.4f} nats/token, "
            f"same top token {record['top1_agreement']:.1%}"
        )
    if record.get("speed"):
        common.say(f"speed      {common.plain(record['speed']['verdict'])}")
    protocol = record["protocol"]
    common.say("protocol   " + common.plain(", ".join(f"{k}={v}" for k, v in protocol.items())))
