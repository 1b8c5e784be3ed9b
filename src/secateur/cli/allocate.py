"""How much to take from each layer: make a plan, look at it, compare allocators.

[bold]Examples[/bold]

  secateur allocate make demo --allocation als --sparsity 0.6 --out plan.json

  secateur allocate show plan.json

  secateur allocate compare demo -a uniform -a als -a incremental --sparsity 0.6
"""

from __future__ import annotations

import importlib

import typer

# Commands of the group, in the order --help shows them.
COMMANDS = ("make", "show", "compare", "search")

app = typer.Typer(
    help=__doc__, no_args_is_help=True, rich_markup_mode="rich", pretty_exceptions_enable=False
)

for name in COMMANDS:
    module = importlib.import_module(f"secateur.cli.allocate_{name}")
    app.command(module.NAME, help=module.__doc__)(module.command)
