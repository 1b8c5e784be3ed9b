"""Prune the attention heads of any transformer on samples of its task.

For encoders, encoder-decoders and decoders. DATA is JSON lines: [cyan]{"text": ..., "label": 1}[/cyan] for
a classifier, [cyan]{"text": ..., "target": ...}[/cyan] for an encoder-decoder, [cyan]{"text": ...}[/cyan]
(or plain lines) for an encoder's features or a language model. The last fifth measures, the rest ranks.

[bold]Examples[/bold]

  secateur heads ./classifier --data reviews.jsonl --share 0.3 --out smaller

  secateur heads ./t5 --data pairs.jsonl --share 0.5 --kind encoder --kind decoder --out smaller

  secateur heads ./bert --data lines.txt --share 0.3 --rescore --uniform --out smaller
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, cast

import typer

from secateur.cli import common

NAME = "heads"


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="hub id or local folder")],
    data: Annotated[Path, typer.Option("--data", "-d", help="file of samples")],
    out: common.Out,
    share: Annotated[
        float, typer.Option("--share", "-s", help="of the heads that go, in [0, 1)")
    ] = 0.3,
    kind: Annotated[
        list[str] | None, typer.Option("--kind", help="encoder, decoder or cross; default all")
    ] = None,
    ranking: Annotated[str, typer.Option(help="gradient, ablation or random")] = "gradient",
    rescore: Annotated[bool, typer.Option("--rescore", help="rank anew before every step")] = False,
    step: Annotated[float, typer.Option(help="share of the heads in a step")] = 0.1,
    at_least: Annotated[int, typer.Option(help="heads that stay in every layer")] = 1,
    multiple_of: Annotated[int, typer.Option(help="heads that stay are a multiple of this")] = 1,
    uniform: Annotated[
        bool, typer.Option("--uniform", help="the same number from each layer")
    ] = False,
    length: Annotated[int | None, typer.Option(help="tokens a text is cut to [128]")] = None,
    seed: Annotated[int, typer.Option(help="of a random order")] = 0,
    device: common.Device = None,
    as_json: common.Json = False,
) -> None:
    """What the command does; its help is the module's docstring."""
    from secateur.methods.head_selection import HeadRules
    from secateur.run.heads import HeadRun, run_heads

    job = HeadRun(
        model,
        data,
        share,
        tuple(kind or ()),
        cast(Any, ranking),
        rescore,
        step,
        HeadRules(at_least, multiple_of, uniform),
        length,
        seed,
        device or "auto",
    )
    record = run_heads(job, out, common.progress(as_json), command=common.command_line())
    if as_json:
        common.emit(record)
        return
    heads, sizes = record["heads"], record["parameters"]
    common.say(
        f"[bold]{common.plain(record['model'])}[/bold]: {heads['removed']} of {heads['of']} heads "
        f"removed, {sizes['before']:,} parameters -> {sizes['after']:,}"
    )
    for layer in record["layers"]:
        common.say(f"  {common.plain(layer['name'])}: {layer['kept']} of {layer['heads']} stay")
    held_out = record["held_out"]
    if held_out and "dense" in held_out:
        common.say(
            f"held-out    {held_out['what']}: {held_out['dense']:.4f} dense -> "
            f"{held_out['pruned']:.4f} pruned ({held_out['samples']} samples)"
        )
    elif held_out:
        common.say(f"held-out    {held_out['what']}: {held_out['mean']:.4f}")
    how = "any transformers" if record["stock"] else "secateur.load_pruned"
    common.say(f"written     {common.plain(record['folder'])}, opens with {how}")
    common.say(f"report      {common.plain(out / 'report.html')}")
