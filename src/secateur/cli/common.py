"""Options that several commands share, spelt once."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from secateur.errors import UsageError
from secateur.progress import SILENT, Progress, RichProgress

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="hub id, local folder, GGUF file, 'demo' or 'tiny' (both packaged)"
    ),
]
Sparsity = Annotated[
    str | None, typer.Option("--sparsity", "-s", help="in [0, 1), or N:M (keep N of every M)")
]
Pattern = Annotated[str | None, typer.Option(help="N:M; may confirm --sparsity, not contradict it")]
MethodName = Annotated[str | None, typer.Option("--method", "-m", help="see 'secateur methods'")]
Scope = Annotated[str | None, typer.Option(help="row, layer, block[:WIDTH] or global")]
Update = Annotated[str | None, typer.Option(help="what survivors become: none, obs, exact or best")]
Quality = Annotated[str | None, typer.Option(help="preset: fast, good or best")]
Allocation = Annotated[
    str | None,
    typer.Option("--allocation", "-a", help="see 'secateur allocators', or a plan.json"),
]
AllocationOptions = Annotated[
    list[str] | None,
    typer.Option("--allocation-option", "-A", help="the allocator's option, NAME=VALUE"),
]
EvidenceFolder = Annotated[
    Path | None, typer.Option("--evidence", help="folder where evidence is kept for other runs")
]
CalibrationText = Annotated[
    str | None, typer.Option("--calibration", "-c", help="file or named corpus ('secateur texts')")
]
Samples = Annotated[int | None, typer.Option(help="calibration sequences")]
Length = Annotated[int | None, typer.Option(help="tokens in a sequence")]
Seed = Annotated[int | None, typer.Option(help="which windows are drawn")]
Include = Annotated[list[str] | None, typer.Option(help="only matrices matching this glob")]
Exclude = Annotated[list[str] | None, typer.Option(help="no matrix matching this glob")]
Blocks = Annotated[str | None, typer.Option(help="path of the list of blocks, e.g. model.layers")]
Options = Annotated[
    list[str] | None, typer.Option("--option", "-O", help="method option, NAME=VALUE")
]
RecoverWith = Annotated[
    str | None,
    typer.Option("--with", help="perp, full, imp, reconstruct, or an adapter such as mask-lora"),
]
Train = Annotated[
    list[str] | None,
    typer.Option(help="any of biases, norms, head, rescale, all and one adapter; by commas"),
]
RecoverSettings = Annotated[
    list[str] | None,
    typer.Option("--set", "-R", help="any other key of a recipe's recovery, NAME=VALUE"),
]
Preprocess = Annotated[
    list[str] | None,
    typer.Option(help="how images become input: NAME=VALUE, of mean, std, resize, crop, filter"),
]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1")]
Dtype = Annotated[str | None, typer.Option(help="auto, float32, bfloat16, float16")]
Stream = Annotated[bool, typer.Option("--stream", help="hold one block's weights at a time")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="run Python code shipped with the model")
]
Json = Annotated[bool, typer.Option("--json", help="one JSON object on standard output")]
Out = Annotated[Path, typer.Option("--out", "-o", help="folder to write")]


def progress(as_json: bool) -> Progress:
    """Bars on standard error, unless a machine is reading or another rank draws them."""
    if os.environ.get("RANK", "0") != "0":
        return SILENT
    return SILENT if as_json and not sys.stderr.isatty() else RichProgress()


def emit(record: dict[str, Any]) -> None:
    """The one JSON object of a ``--json`` command."""
    from secateur.files import finite

    print(json.dumps(finite(record), ensure_ascii=False))


def say(text: str = "") -> None:
    """A line of the result, on standard output; ``[bold]`` and the like are rich's markup."""
    from rich.console import Console

    Console(highlight=False, soft_wrap=True).print(text)


def plain(value: object) -> str:
    """A path, name or note as it is: brackets in it are no markup."""
    from rich.markup import escape

    return escape(str(value))


def read_options(pairs: list[str] | None) -> dict[str, Any] | None:
    """``["alpha=10", "norm=l2"]`` -> ``{"alpha": 10, "norm": "l2"}`` (values are YAML)."""
    if not pairs:
        return None
    import yaml

    from secateur.recipe import read_yaml

    options: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise UsageError("an option is NAME=VALUE", field="option", value=pair)
        try:
            options[name] = read_yaml(value)
        except yaml.YAMLError:
            raise UsageError("the value is not YAML", field=name, value=value) from None
    return options


def names(lists: list[str] | None) -> list[str] | None:
    """``["norms,biases", "head"]`` -> ``["norms", "biases", "head"]``.

    Raises:
        UsageError: the option is there and names nothing.
    """
    if not lists:
        return None
    found = [name.strip() for part in lists for name in part.split(",") if name.strip()]
    if not found:
        raise UsageError(
            "nothing is to be trained",
            field="train",
            value=",".join(lists),
            fix="name something (norms, mask-lora ...), or leave --train out for the usual",
        )
    return found


def allocation(name: str | None, options: list[str] | None) -> str | dict[str, Any] | None:
    """``--allocation`` and its options as a recipe has them.

    Raises:
        UsageError: options of no allocator.
    """
    found = read_options(options)
    if not found:
        return name
    if name is None:
        raise UsageError("whose option?", field="allocation-option", value=options, fix="-a NAME")
    return {"name": name, **found}


def given(**values: Any) -> dict[str, Any]:
    """The flags the user set: those left alone stay at the recipe's defaults."""
    return {key: value for key, value in values.items() if value is not None and value != []}


def refuse_for_text(**values: Any) -> None:
    """Options of vision networks that were given with a language model.

    Raises:
        UsageError: naming the first.
    """
    for name, value in given(**values).items():
        raise UsageError(
            "is for vision networks",
            field=name,
            value=value,
            fix="--images SPEC with a vision network, or leave it out",
        )


def command_line() -> str:
    """This command as it can be typed again."""
    return "secateur " + shlex.join(sys.argv[1:])
