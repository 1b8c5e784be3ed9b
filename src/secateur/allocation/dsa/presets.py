"""Functions by name, and functions found by a search read back from their file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from secateur.allocation.dsa.expression import Expression
from secateur.errors import UsageError
from secateur.files import write_json

FORMAT = "secateur-dsa-1"

PRESETS = {
    "paper": "W:(ABSLOG,ABSLOG)-(GEOMETRIC_MEAN)-(COS,EXP)-(8)",
    "released": "W:(ABSLOG)-(VAR)-(ATAN,ASIN)-(7)",
    "owl": "W:(NO_OP)-(OUTLIER:5)-(NEG)-(8)",
    "uniform": "W:(NO_OP)-(MEAN)-(NO_OP)-(0)",
}
"""``paper``: exp(cos(geomean |ln|ln S||)), the function printed in the paper. ``released``: the
one in the README of the code, found on LLaMA-1-7B; not finite where a block's variance of ln S
passes tan 1. ``owl`` and ``uniform``: those allocators written as functions of this kind."""


def find_preset(name: str) -> tuple[Expression, str | None]:
    """A preset's function, and the scores it was found on if it says so.

    Args:
        name: one of ``PRESETS``, or the path of a found.json.

    Raises:
        UsageError: neither, or the file holds no function.
    """
    if name in PRESETS:
        return Expression.parse(PRESETS[name]), None
    path = Path(name)
    if path.suffix != ".json":
        raise UsageError(
            "there is no preset of that name",
            field="preset",
            value=name,
            fix=f"one of {', '.join(PRESETS)}, or the path of a file a search wrote",
        )
    try:
        record = json.loads(path.read_text("utf-8"))
        if record["format"] != FORMAT:
            raise ValueError(f"format {record['format']!r}, not {FORMAT!r}")
        text, scores = str(record["expression"]), record.get("scores")
        if scores not in (None, "wanda", "magnitude", "method"):
            raise ValueError(f"scores {scores!r}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"not a DSA function's file: {error}",
            field="preset",
            value=name,
            fix="give the found.json that 'secateur allocate search' wrote",
        ) from None
    return Expression.parse(text), scores


def save_preset(
    path: Path, expression: Expression, scores: str, provenance: dict[str, Any]
) -> None:
    """Write a function so that ``preset=PATH`` finds it again, on the same kind of scores."""
    write_json(
        path,
        {
            "format": FORMAT,
            "expression": str(expression),
            "scores": scores,
            "provenance": provenance,
        },
    )
