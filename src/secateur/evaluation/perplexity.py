"""Perplexity, and how far a pruned model's predictions are from the dense one's.

A model is given as a function from token ids (B, L) to logits (B, L, V), so that anything
that predicts can be measured: a module, a replay of stored states, an exported runtime.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from secateur.data.windows import Windows
from secateur.errors import NumericsError, UsageError
from secateur.evaluation.protocol import Protocol
from secateur.progress import SILENT, Progress

Logits = Callable[[Tensor], Tensor]
"""Token ids (B, L) to logits (B, L, V)."""
BATCH_TOKENS = 1024
CHUNK = 2**23
"""Logits handled at once in float32: 32 MiB, whatever the vocabulary."""


@dataclass(frozen=True)
class Measurement:
    """A perplexity, with the mean cross-entropy of each window to judge its spread.

    Attributes:
        value: exp of the mean cross-entropy over all predicted tokens.
        per_window: (N,) float64, mean cross-entropy in nats.
    """

    value: float
    protocol: Protocol
    per_window: Tensor

    @property
    def stderr(self) -> float:
        """Standard error of ``value`` over windows (delta method); NaN for a single window."""
        if len(self.per_window) < 2:
            return math.nan
        return self.value * float(self.per_window.std()) / math.sqrt(len(self.per_window))

    def interval(
        self, level: float = 0.95, draws: int = 2000, seed: int = 0
    ) -> tuple[float, float]:
        """Bootstrap interval of the perplexity over windows, at ``level``."""
        random = torch.Generator().manual_seed(seed)
        n = len(self.per_window)
        means = self.per_window[torch.randint(n, (draws, n), generator=random)].mean(1)
        tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=means.dtype)
        low, high = means.quantile(tails)
        return _exp(float(low)), _exp(float(high))

    def record(self) -> dict[str, Any]:
        """For JSON."""
        low, high = self.interval()
        return {"perplexity": self.value, "stderr": self.stderr, "interval": [low, high]}


def perplexity(logits_of: Logits, windows: Windows, progress: Progress = SILENT) -> Measurement:
    """Perplexity over ``windows``: exp of the mean cross-entropy of each token given those before.

    With windows of equal length this is the published protocol (GBLM-Pruner, Wanda and
    SparseGPT's evaluation): the mean of window means.

    Raises:
        NumericsError: logits that are not finite, with the window.
        UsageError: token ids outside the vocabulary, or padding on the left.
    """
    tally = _Tally(windows)
    with progress.stage("perplexity", total=len(windows), unit="windows") as advance:
        for ids, mask in windows.batches(BATCH_TOKENS):
            logits = logits_of(ids)
            for chunk, targets in tally.chunks(ids, mask, logits):
                tally.add(_cross_entropy(_log_softmax(chunk), targets))
            advance(len(ids))
    return tally.measurement()


def fidelity(
    dense_logits_of: Logits,
    pruned_logits_of: Logits,
    windows: Windows,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Both models' perplexity and how well they agree, from one pass.

    Returns:
        ``dense`` and ``pruned`` (perplexity, stderr, interval, window_losses), ``kl``: mean
        KL(dense || pruned) in nats per predicted token, ``top1_agreement``: the share of
        predicted tokens for which both put the same token first, ``protocol``.

    Raises:
        NumericsError, UsageError: see ``perplexity``.
    """
    dense, pruned = _Tally(windows), _Tally(windows, "the pruned model's")
    divergence, same = 0.0, 0
    with progress.stage("comparing", total=len(windows), unit="windows") as advance:
        for ids, mask in windows.batches(BATCH_TOKENS):
            ours, theirs = pruned_logits_of(ids), dense_logits_of(ids)
            if ours.shape[-1] != theirs.shape[-1]:
                raise UsageError(
                    f"the dense model has {theirs.shape[-1]} tokens, the pruned {ours.shape[-1]}",
                    field="dense",
                    value="vocabulary",
                    fix="compare a model with the dense one it was pruned from",
                )
            pairs = zip(
                dense.chunks(ids, mask, theirs), pruned.chunks(ids, mask, ours), strict=True
            )
            for (chunk, targets), (other, _) in pairs:
                p, q = _log_softmax(chunk), _log_softmax(other.to(chunk.device))
                dense.add(_cross_entropy(p, targets))
                pruned.add(_cross_entropy(q, targets))
                same += int((p.argmax(-1) == q.argmax(-1)).sum())
                # p -> 0 makes p log p vanish; log-softmax of finite logits is finite.
                divergence += float((p.exp() * (p - q)).sum(-1).double().sum())
            advance(len(ids))
    before, after = dense.measurement(), pruned.measurement()
    tokens = before.protocol.tokens
    return {
        "dense": before.record() | {"window_losses": before.per_window.tolist()},
        "pruned": after.record() | {"window_losses": after.per_window.tolist()},
        "kl": max(0.0, divergence / tokens),
        "top1_agreement": same / tokens,
        "protocol": before.protocol.record(),
    }


class _Tally:
    """Cross-entropies of all windows, gathered chunk by chunk in reading order."""

    def __init__(self, windows: Windows, whose: str = "the model's") -> None:
        if windows.length < 2:
            raise UsageError("a window needs two tokens", field="length", value=windows.length)
        mask = windows.mask
        if mask is not None and not bool(mask[:, :1].all()):
            raise UsageError(
                "windows are padded on the left, where every later token would be misplaced",
                field="attention_mask",
                value="left padding",
                fix="pad on the right",
            )
        self.windows, self.whose = windows, whose
        self.predicted = (
            torch.full((len(windows),), windows.length - 1)
            if mask is None
            else (mask[:, 1:] & mask[:, :-1]).sum(1)
        )
        self.losses: list[Tensor] = []
        self.dtype: torch.dtype | None = None

    def chunks(
        self, ids: Tensor, mask: Tensor | None, logits: Tensor
    ) -> list[tuple[Tensor, Tensor]]:
        """(logits (n, V), targets (n,)) pieces of a batch, small enough for float32."""
        size = logits.shape[-1]
        if int(ids.max()) >= size or int(ids.min()) < 0:
            self.windows.check_vocabulary(size)
        self.dtype = logits.dtype
        keep = None if mask is None else mask[:, 1:] & mask[:, :-1]
        targets = ids[:, 1:][keep] if keep is not None else ids[:, 1:].reshape(-1)
        pieces = []
        start = 0
        for row, window in enumerate(logits[:, :-1]):
            chosen = window if keep is None else window[keep[row].to(window.device)]
            for piece in chosen.split(max(1, CHUNK // size)):
                pieces.append((piece, targets[start : start + len(piece)].to(piece.device)))
                start += len(piece)
        return pieces

    def add(self, losses: Tensor) -> None:
        """Append the next tokens' cross-entropies (n,)."""
        self.losses.append(losses.double().cpu())

    def measurement(self) -> Measurement:
        """The perplexity over everything added."""
        losses = torch.cat(self.losses)
        per_window = losses.split(self.predicted.tolist())
        for index, window in enumerate(per_window):
            if not bool(torch.isfinite(window).all()):
                raise NumericsError(
                    f"{self.whose} logits in window {index + 1} of {len(per_window)} "
                    "are not finite, so there is no perplexity",
                    fix="evaluate in float32 (--dtype float32), or look for broken weights",
                )
        means = torch.stack([window.mean() for window in per_window if len(window)])
        protocol = Protocol.of(self.windows, self.dtype, int(losses.numel()))
        return Measurement(_exp(float(losses.mean())), protocol, means)


def _log_softmax(logits: Tensor) -> Tensor:
    return torch.log_softmax(logits.float(), dim=-1)


def _cross_entropy(log_probabilities: Tensor, targets: Tensor) -> Tensor:
    return -log_probabilities.gather(-1, targets[:, None])[:, 0]


def _exp(nats: float) -> float:
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf
