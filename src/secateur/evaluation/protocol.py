"""What a figure was measured on; figures of different protocols are never compared."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

from secateur.data.windows import Windows
from secateur.errors import UsageError


@dataclass(frozen=True)
class Protocol:
    """Everything a perplexity depends on besides the model.

    Attributes:
        dataset: name of the text, or ``tokens``.
        sha256: of the text's documents, or of the tokens where there was no text.
        split: part of the text.
        length: tokens in a window; longer windows give lower figures.
        windows: how many, from the start.
        tokens: predicted tokens.
        bos: whether the first token is BOS.
        dtype: of the logits (the softmax is always float32).
        tokenizer: short hash of its vocabulary; a perplexity is per token.
    """

    dataset: str
    sha256: str
    split: str
    length: int
    windows: int
    tokens: int
    bos: bool
    dtype: str
    tokenizer: str | None
    metric: str = "exp of the mean token cross-entropy; windows without overlap, remainder dropped"

    @classmethod
    def of(cls, windows: Windows, dtype: object, tokens: int, **others: Any) -> Protocol:
        """The protocol of measuring on ``windows``, of which ``tokens`` are predicted."""
        text = windows.record.get("text") or {}
        return cls(
            dataset=text.get("name", "tokens"),
            sha256=text.get("sha256", windows.fingerprint),
            split=text.get("split", "all"),
            length=windows.length,
            windows=len(windows),
            tokens=tokens,
            bos=bool(windows.record.get("bos", False)),
            dtype=str(dtype).removeprefix("torch."),
            tokenizer=windows.record.get("tokenizer"),
            **others,
        )

    @property
    def digest(self) -> str:
        """Eight hex digits over all fields: equal digests, comparable figures."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:8]

    def record(self) -> dict[str, Any]:
        """All fields and the digest, for JSON."""
        return asdict(self) | {"digest": self.digest}

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Protocol:
        """The inverse of ``record``."""
        return cls(**{key: value for key, value in record.items() if key != "digest"})


def compare(a: Protocol, b: Protocol) -> None:
    """Refuse to set two figures side by side that were measured differently.

    Raises:
        UsageError: naming every field that differs, with both values.
    """
    left, right = asdict(a), asdict(b)
    differing = [key for key in left if left[key] != right[key]]
    if differing:
        shown = "; ".join(f"{key}: {left[key]} and {right[key]}" for key in differing)
        raise UsageError(
            f"two different protocols cannot be compared ({shown})",
            field="protocol",
            value=f"{a.digest} and {b.digest}",
            fix=f"measure both with the same {', '.join(differing)}",
        )
