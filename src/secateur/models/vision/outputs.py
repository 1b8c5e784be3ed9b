"""What a vision network gives: logits, bare or inside what other libraries wrap around them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from secateur.errors import UsageError


def logits_of(output: Any) -> Tensor:
    """Logits (B, classes) in a network's output: a tensor, or something with ``logits`` in it.

    Raises:
        UsageError: neither.
    """
    found = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(found, Tensor):
        raise UsageError(
            f"gives a {type(output).__name__} for images, and no logits in it",
            field="model",
            fix="a classifier, or a function that wraps it in one",
        )
    return found
