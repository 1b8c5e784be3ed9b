"""Samples with something to be right about: a text and its class, or a text and its target."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.errors import UsageError

IGNORED = -100
"""Label of a token that counts for nothing (padding), as in transformers."""


@dataclass(frozen=True)
class Samples:
    """Texts in order, with a class each (``labels``), a target each (``targets``), or neither."""

    texts: list[str]
    labels: list[int] | None = None
    targets: list[str] | None = None

    def __len__(self) -> int:
        return len(self.texts)

    def part(self, rows: slice) -> Samples:
        """Some of them."""
        labels = None if self.labels is None else self.labels[rows]
        return Samples(
            self.texts[rows], labels, None if self.targets is None else self.targets[rows]
        )


def read_samples(path: Path) -> Samples:
    """Read JSON lines ``{"text": ..., "label": 1}`` or ``{"text": ..., "target": "..."}``, or plain lines.

    Raises:
        UsageError: not readable, empty, or a row unlike the first; the line is named.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except OSError as error:
        raise UsageError(
            f"cannot be read: {error.strerror}", field="data", value=str(path)
        ) from None
    except UnicodeDecodeError:
        raise UsageError("not text in UTF-8", field="data", value=str(path)) from None
    rows = [(n, line.strip()) for n, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise UsageError("there is no sample in it", field="data", value=str(path))
    if path.suffix not in (".jsonl", ".json"):
        return Samples([line for _, line in rows])
    parsed = [_row(path, number, line) for number, line in rows]
    keys = set(parsed[0])
    for (number, _), row in zip(rows, parsed, strict=True):
        if set(row) != keys:
            raise UsageError(
                f"line {number} has {sorted(row)}, the first {sorted(keys)}",
                field="data",
                value=str(path),
                fix="give every line the same keys",
            )
    return Samples(
        [row["text"] for row in parsed],
        [row["label"] for row in parsed] if "label" in keys else None,
        [row["target"] for row in parsed] if "target" in keys else None,
    )


def _row(path: Path, number: int, line: str) -> dict[str, Any]:
    kinds: dict[str, type] = {"text": str, "label": int, "target": str}
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise UsageError(
            f"line {number} is no JSON object with a 'text'",
            field="data",
            value=str(path),
            fix='lines such as {"text": "...", "label": 1}',
        )
    found = {key: row[key] for key in kinds if key in row}
    for key, value in found.items():
        if not isinstance(value, kinds[key]) or isinstance(value, bool):
            raise UsageError(
                f"line {number}: '{key}' is not {kinds[key].__name__}",
                field="data",
                value=value,
            )
    if {"label", "target"} <= set(found):
        raise UsageError(
            f"line {number} has a label and a target", field="data", fix="give one of the two"
        )
    return found


def sample_batches(
    samples: Samples, tokenizer: Any, length: int = 128, size: int = 16
) -> list[dict[str, Tensor]]:
    """Token batches of samples of about one length: ``input_ids``, ``attention_mask``, ``labels``.

    ``labels`` are classes (B,), or a target's token ids (B, L) with ``IGNORED`` as padding.
    """
    ids = _tokens(tokenizer, samples.texts, length)
    targets = None if samples.targets is None else _tokens(tokenizer, samples.targets, length)
    pad = getattr(tokenizer, "pad_token_id", None) or 0
    order = sorted(range(len(ids)), key=lambda i: (len(ids[i]), i))
    out = []
    for first in range(0, len(order), size):
        rows = order[first : first + size]
        batch = {
            "input_ids": _padded([ids[i] for i in rows], pad),
            "attention_mask": _padded([[1] * len(ids[i]) for i in rows], 0),
        }
        if samples.labels is not None:
            batch["labels"] = torch.tensor([samples.labels[i] for i in rows])
        if targets is not None:
            batch["labels"] = _padded([targets[i] for i in rows], IGNORED)
        out.append(batch)
    return out


def _tokens(tokenizer: Any, texts: Sequence[str], length: int) -> list[list[int]]:
    found = tokenizer(list(texts), truncation=True, max_length=length)["input_ids"]
    return [list(row) or [getattr(tokenizer, "pad_token_id", None) or 0] for row in found]


def _padded(rows: Iterable[list[int]], value: int) -> Tensor:
    rows = list(rows)
    longest = max(len(row) for row in rows)
    return torch.tensor([row + [value] * (longest - len(row)) for row in rows])
