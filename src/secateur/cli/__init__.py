"""The command line: one file a command, no logic, only words.

Exit codes: 0 done, 1 the work failed, 2 the request is wrong, 130 interrupted.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from secateur import __version__
from secateur.errors import SecateurError

# typer carries its own click, whose base error it does not export by name.
CLICK_ERROR: type[Any] = typer.BadParameter.__mro__[2]

# In the order --help shows them; none imports torch before it is called.
COMMANDS = (
    "prune",
    "recover",
    "pretrain",
    "run",
    "plan",
    "evaluate",
    "compare",
    "report",
    "verify",
    "why",
    "heads",
    "export",
    "demo",
)
INTERRUPTED = 130
# Commands with commands of their own.
GROUPS = ("allocate", "mask", "forest", "lottery")

app = typer.Typer(
    name="secateur",
    help="Makes trained models smaller and faster, and proves it.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        print(f"secateur {__version__}")
        raise typer.Exit()


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", "-V", callback=_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Makes trained models smaller and faster, and proves it."""


for name in COMMANDS:
    module = importlib.import_module(f"secateur.cli.{name}")
    app.command(module.NAME, help=module.__doc__)(module.command)
importlib.import_module("secateur.cli.listing").add_to(app)
for name in GROUPS:
    app.add_typer(importlib.import_module(f"secateur.cli.{name}").app, name=name)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code. User errors show no traceback."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        code = int(app(arguments, standalone_mode=False) or 0)
        return _interrupted() if code == INTERRUPTED else code  # typer makes Ctrl-C a code
    except SecateurError as error:
        if "--json" in arguments:
            print(json.dumps(error.record(), ensure_ascii=False))
        else:
            print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except (typer.Abort, KeyboardInterrupt):
        return _interrupted()
    except CLICK_ERROR as error:
        if "--json" in arguments:
            record = {"error": error.format_message(), "exit_code": error.exit_code}
            print(json.dumps(record, ensure_ascii=False))
        else:
            error.show()
        return error.exit_code
    except BrokenPipeError:
        return 1


def _interrupted() -> int:
    print("interrupted; the same command goes on where it stopped", file=sys.stderr)
    return INTERRUPTED
