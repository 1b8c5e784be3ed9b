"""Do two sets of token windows share text? Nothing is chosen on what it is later judged by."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from secateur.data.windows import Windows
from secateur.errors import UsageError

RUN = 48
"""Tokens in a row that two texts do not share by chance or common phrases."""
_BASE = np.uint64(0x9E3779B97F4A7C15)


def shared_runs(one: Windows, other: Windows, run: int = RUN) -> int:
    """How many runs of ``run`` tokens of ``one`` also occur in ``other`` (shorter windows whole)."""
    run = min(run, one.length, other.length)
    return int(np.isin(_runs(one.ids, run), np.unique(_runs(other.ids, run))).sum())


def refuse_overlap(search: Windows, evaluation: Windows) -> None:
    """Stop when what is searched on is part of what is measured on.

    Raises:
        UsageError: both are windows of one text (disjoint only until more of it is measured
            on), or they share a run of tokens.
    """
    text = search.record.get("text")
    if text is not None and text == evaluation.record.get("text"):
        raise UsageError(
            "the search would try plans on the very text that quality is measured on",
            field="search.text",
            value=text["name"],
            fix="search on another text, or another part of it (a corpus: NAME:train)",
        )
    if shared := shared_runs(search, evaluation):
        raise UsageError(
            f"the search's text and the evaluation's share {shared} runs of tokens, "
            "so the measured quality would be that of the text searched on",
            field="search.text",
            value=search.record.get("text", {}).get("name", "tokens"),
            fix="search on another text, or another part of it (a corpus: NAME:train)",
        )


def _runs(ids: Tensor, run: int) -> NDArray[np.uint64]:
    """A hash of every ``run`` consecutive tokens of each window (arithmetic modulo 2^64)."""
    tokens = ids.numpy().astype(np.uint64) + np.uint64(1)
    total = np.zeros((tokens.shape[0], tokens.shape[1] - run + 1), dtype=np.uint64)
    with np.errstate(over="ignore"):
        for offset in range(run):
            total = total * _BASE + tokens[:, offset : offset + total.shape[1]]
    return total.reshape(-1)
