"""Show a plan as a table and a chart of its blocks.

[bold]Examples[/bold]

  secateur allocate show plan.json

  secateur allocate show plan.json --matrices --json
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from secateur.cli import common

NAME = "show"
_BARS = " ▁▂▃▄▅▆▇█"


def command(
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="a saved plan.json")],
    matrices: Annotated[bool, typer.Option("--matrices", help="every matrix on a line")] = False,
    as_json: common.Json = False,
) -> None:
    """What the command does; its help is the module's docstring."""
    from secateur.allocation.plan import Plan
    from secateur.allocation.summary import summary

    loaded = Plan.load(plan)
    told = summary(loaded)
    if as_json:
        common.emit({**told, **({"modules": loaded.record()["modules"]} if matrices else {})})
        return
    table({plan.name: told})
    blocks = told["blocks"]
    width = max(map(len, blocks))
    for name, ratio in blocks.items():
        bar = "█" * round(40 * ratio)
        common.say(f"{common.plain(name):<{width}}  {ratio:6.2%}  [green]{bar}[/green]")
    for name, unit in told["units"].items():
        common.say(f"{common.plain(name):<{width}}  {unit['removed']} of {unit['of']} go")
    if matrices:
        for name, ratio in loaded.ratios.items():
            pattern = f"  {loaded.pattern(name)}" if loaded.target.is_pattern else ""
            common.say(f"  {common.plain(name)}  {ratio:.2%}{pattern}")
    for note in (loaded.provenance.get("made_by") or {}).get("notes", []):
        common.say(f"[yellow]note[/yellow] {common.plain(note)}")


def table(summaries: Mapping[str, dict[str, Any]]) -> None:
    """Plans side by side: figures, and a small chart of the blocks' ratios."""
    from rich.console import Console
    from rich.table import Table

    values = [v for s in summaries.values() for v in s["blocks"].values()]
    low, high = min(values, default=0.0), max(values, default=0.0)
    out = Table(box=None, header_style="bold")
    out.add_column("plan")
    for heading in ("in all", "least", "most", "spread"):
        out.add_column(heading, justify="right")
    out.add_column(f"blocks, {low:.0%} to {high:.0%}", no_wrap=True)
    for label, told in summaries.items():
        out.add_row(
            str(label),
            f"{told['achieved']:.3%}",
            f"{told['lowest']:.1%}",
            f"{told['highest']:.1%}",
            f"{told['spread']:.1%}",
            "".join(_level(v, low, high) for v in told["blocks"].values()),
        )
    Console().print(out)


def _level(value: float, low: float, high: float) -> str:
    if high - low < 1e-9:
        return _BARS[4]
    return _BARS[1 + round((value - low) / (high - low) * (len(_BARS) - 2))]
