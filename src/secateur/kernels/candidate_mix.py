"""MaskLLM's mixed mask of N:M patterns, with noise that is made again instead of kept.

A group of M weights has logits over its K = C(M, N) patterns. Training multiplies the weights by
the mixture ``M~ = softmax((kappa pi + g) / tau) S`` of the patterns S, with Gumbel noise g
(arXiv 2409.17481, section 3). Noise comes from a hash of (key, group, logit), so that forward
and backward, a resumed run and a re-computed activation all see the same draw and nothing has to
be stored but the logits. Backward makes the probabilities again: with ``u = (dL/dW^ * W) S^T``,
``d pi = kappa / tau * y * (u - <u, y>)``. A group may also choose among a few patterns of its own
(``likeliest``), which is ours: S is then another for every group, named by numbers of patterns.

On a CPU with numba (extra ``kernels``) both directions are one fused pass each, on a GPU with Triton
torch.compile makes them so; elsewhere the same formulas run as torch operations over chunks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from secateur.kernels.threads import as_many_as_torch
from secateur.masks.nm import candidates

_CHUNK = 1 << 19  # numbers the torch form works on at a time on a CPU, which a cache holds
_LAUNCH = 1 << 26  # and elsewhere, where a chunk is a launch of each operation
NAMED = 256
"""Most patterns of which a group may have a choice of its own: their numbers fit a byte."""
_M32 = 0xFFFFFFFF
_M64 = 0xFFFFFFFFFFFFFFFF


@dataclass(frozen=True)
class Draw:
    """One sampling of all masks of a layer.

    Attributes:
        key: names the noise (``key_of``); None for none.
        kappa: scale of the logits. tau: temperature.
    """

    key: tuple[int, int] | None
    kappa: float
    tau: float


def key_of(*words: int) -> tuple[int, int]:
    """A 64-bit key, as two 32-bit halves, of a seed and whatever else names the draw."""
    x = 0x9E3779B97F4A7C15
    for word in words:
        x = ((x ^ (word & _M64)) * 0xBF58476D1CE4E5B9) & _M64
        x ^= x >> 31
    return x & _M32, x >> 32


def gumbel(start: int, shape: tuple[int, ...], key: Any, device: Any = "cpu") -> Tensor:
    """Standard Gumbel draws number ``start``, ``start + 1`` ... of ``key``, float32 of ``shape``."""
    x = torch.arange(start, start + prod(shape), device=device) & _M32
    x = x ^ key[0]
    for add in (key[1], 0):
        x = ((x ^ (x >> 16)) * 0x7FEB352D) & _M32
        x = ((x ^ (x >> 15)) * 0x846CA68B) & _M32
        x = ((x ^ (x >> 16)) + add) & _M32
    u = ((x >> 8).float() + 0.5) / 2**24
    return -torch.log((-torch.log(u)).clamp_min(2.0**-25)).reshape(shape)


def probabilities(logits: Tensor, draw: Draw, start: int = 0) -> Tensor:
    """softmax((kappa pi + g) / tau) of (G, K) logits whose first group is number ``start``."""
    return softened(logits, draw.key, draw.kappa, draw.tau, start)


def softened(logits: Tensor, key: Any, kappa: Any, tau: Any, start: int = 0) -> Tensor:
    """``probabilities`` of a draw in parts, which may be tensors."""
    scores = kappa * logits.float()
    if key is not None:
        first = start * logits.shape[-1]
        scores = scores + gumbel(first, tuple(logits.shape), key, logits.device)
    return torch.softmax(scores / tau, -1)


def likeliest(keep: int, group: int, weight: Tensor, mask: Tensor, count: int) -> Tensor:
    """The ``count`` patterns of each group that are nearest to its mask, nearest first.

    Those that keep the most weights which the mask keeps; of equals those with the larger sum of
    kept |w|, then the first. The same on every machine: sums of so few float32 are exact in float64.

    Args:
        weight: (G, M). mask: (G, M) bool, True = pruned.

    Returns:
        Numbers of patterns, (G, count) uint8: there are at most ``NAMED``.
    """
    patterns = candidates(keep, group).T.double()
    number = torch.arange(patterns.shape[1])
    out = torch.empty(len(weight), count, dtype=torch.uint8)
    step = max(1, _CHUNK // len(number))
    for at in range(0, len(weight), step):
        part = slice(at, at + step)
        size, kept = weight[part].double().abs().cpu(), (~mask[part]).double().cpu()
        second = size @ patterns / size.sum(-1, keepdim=True).clamp_min(1e-300)  # at most 1
        out[part] = (kept @ patterns + second / 2 - number * 2.0**-40).topk(count, -1).indices
    return out


class CandidateMix:
    """The mixture of all patterns of ``keep``:``group``, or of some; one logit a pattern.

    Weights and gradients are (G, M) views of a matrix's rows, logits (G, K), float32.

    Args:
        index: the numbers of the K patterns each group chooses among, (G, K) as ``likeliest``
            gives them; None: all C(M, N).
    """

    def __init__(self, keep: int, group: int, index: Tensor | None = None) -> None:
        self.keep, self.group, self.index = keep, group, index
        self.patterns = candidates(keep, group)
        self.logits_per_group = len(self.patterns) if index is None else index.shape[-1]
        self._placed: dict[torch.device, tuple[Tensor, Tensor | None]] = {}

    def placed(self, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Patterns as float32 and ``index``, copied to a device once."""
        if device not in self._placed:
            index = None if self.index is None else self.index.to(device)
            self._placed[device] = self.patterns.to(device, torch.float32), index
        return self._placed[device]

    def prior(self, mask: Tensor) -> Tensor:
        """How much each pattern agrees with a mask (G, M; True = pruned), less the mean N^2/M."""
        kept, patterns = ~mask, self.patterns.to(mask.device)
        if self.index is None:
            agreement = kept.float() @ patterns.float().T
        else:
            chosen = patterns[self.index.to(mask.device).long()]
            agreement = (chosen & kept.unsqueeze(-2)).sum(-1, dtype=torch.float32)
        return agreement - self.keep**2 / self.group

    def choose(self, logits: Tensor) -> Tensor:
        """The most likely mask, (G, M) bool, True = pruned; ties go to the first pattern."""
        number = logits.argmax(-1)
        if self.index is not None:
            chosen = self.index.to(logits.device).gather(-1, number.unsqueeze(-1))
            number = chosen.squeeze(-1).long()
        return ~self.patterns.to(logits.device)[number]

    def masked(self, weight: Tensor, logits: Tensor, draw: Draw) -> Tensor:
        """``W * M~``, float32 (G, M)."""
        out = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
        fused = _fused(weight, logits)
        if fused is not None:
            fused.masked(*_numpy(self, logits, draw), weight.numpy(), out.numpy())
            return out
        generated = _generated(logits, self.logits_per_group)
        if generated is not None:
            made: Tensor = generated[0](weight, logits, *_tensors(self, draw, logits.device))
            return made
        for part, table in self._parts(logits):
            out[part] = weight[part] * _mixed(probabilities(logits[part], draw, part.start), table)
        return out

    def backward(
        self, weight: Tensor, logits: Tensor, grad: Tensor, square: float | Tensor, draw: Draw
    ) -> tuple[Tensor, Tensor]:
        """Gradient of the logits, and ``W * M~`` once more (for the gradient of the input).

        Args:
            grad: dL/d(W * M~), (G, M).
            square: dL/d||W * M~||^2, the coefficient of the weights' regularisation.
        """
        d_logits = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
        out = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
        fused = _fused(weight, logits, grad)
        if fused is not None:
            fused.masked_backward(
                *_numpy(self, logits, draw),
                weight.numpy(),
                grad.numpy(),
                np.float32(float(square)),
                d_logits.reshape(-1).numpy(),
                out.numpy(),
            )
            return d_logits, out
        generated = _generated(logits, self.logits_per_group)
        if generated is not None:
            slope = torch.as_tensor(square, dtype=torch.float32, device=logits.device)
            how = _tensors(self, draw, logits.device)
            d_logits, out = generated[1](weight, logits, grad, slope, *how)
            return d_logits, out
        for part, table in self._parts(logits):
            y, w = probabilities(logits[part], draw, part.start), weight[part].float()
            out[part] = w * _mixed(y, table)
            u = _mixed((grad[part].float() + 2 * square * out[part]) * w, table.mT)
            d_logits[part] = draw.kappa / draw.tau * y * (u - (u * y).sum(-1, keepdim=True))
        return d_logits, out

    def _parts(self, logits: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Some groups at a time, and their patterns: (K, M) for all, or else (g, K, M)."""
        table = self.patterns.to(logits.device, torch.float32)
        most = _CHUNK if logits.device.type == "cpu" else _LAUNCH
        step = max(1, most // (self.logits_per_group * self.group))
        for at in range(0, len(logits), step):
            part = slice(at, at + step)
            own = None if self.index is None else self.index[part].to(logits.device).long()
            yield part, table if own is None else table[own]


def _mixed(y: Tensor, table: Tensor) -> Tensor:
    """(g, K) times (K, M) or (g, K, M) -> (g, M)."""
    return (y.unsqueeze(-2) @ table).squeeze(-2)


def _numpy(mix: CandidateMix, logits: Tensor, draw: Draw) -> tuple[Any, ...]:
    low, high = draw.key or (0, 0)
    return (
        logits.reshape(-1).numpy(),
        mix.patterns.float().numpy(),
        None if mix.index is None else mix.index.numpy(),
        np.uint32(low),
        np.uint32(high),
        draw.key is not None,
        np.float32(draw.kappa),
        np.float32(draw.tau),
    )


def _tensors(mix: CandidateMix, draw: Draw, device: torch.device) -> tuple[Any, ...]:
    """Patterns, key and (kappa, tau) in tensors, so that a new draw compiles nothing anew."""
    table, index = mix.placed(device)
    key = _sent(torch.tensor(draw.key or (0, 0)), device)
    heat = _sent(torch.tensor((draw.kappa, draw.tau)), device)
    return table, index, key, heat, draw.key is not None


def _sent(small: Tensor, device: torch.device) -> Tensor:
    """On the device, without waiting for the work that is queued there."""
    return small.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else small


def _generated(logits: Tensor, patterns: int) -> Any:
    """The kernels that torch.compile makes, where there is a GPU it makes them for."""
    if logits.device.type == "cpu":
        return None
    from secateur.kernels import _candidate_compiled as form

    return form.compiled() if patterns <= form.MOST and form.serves(logits.device) else None


def _fused(*tensors: Tensor) -> Any:
    """The compiled kernels where they serve: float32 on a CPU, numba there, counters of 32 bits."""
    for tensor in tensors:
        plain = tensor.device.type == "cpu" and tensor.dtype is torch.float32
        if not plain or not tensor.is_contiguous() or tensor.numel() >= 2**32:
            return None
    kernels = _compiled()
    if kernels is not None:
        as_many_as_torch()
    return kernels


@lru_cache(maxsize=1)
def _compiled() -> Any:
    try:
        from secateur.kernels import _candidate_numba
    except ImportError:
        return None
    return _candidate_numba
