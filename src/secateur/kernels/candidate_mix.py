"""MaskLLM's mixed mask of N:M patterns, with noise that is made again instead of kept.

A group of M weights has logits over its K = C(M, N) patterns. Training multiplies the weights by
the mixture ``M~ = softmax((kappa pi + g) / tau) S`` of the patterns S, with Gumbel noise g
(arXiv 2409.17481, section 3). Noise comes from a hash of (key, group, pattern), so that forward
and backward, a resumed run and a re-computed activation all see the same draw and nothing has to
be stored but the logits. Backward makes the probabilities again: with ``u = (dL/dW^ * W) S^T``,
``d pi = kappa / tau * y * (u - <u, y>)``.

On a CPU with numba (extra ``kernels``) both directions are one fused pass each, on a GPU with Triton
torch.compile makes them so; elsewhere the same formulas run as torch operations over chunks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from secateur.kernels.threads import as_many_as_torch
from secateur.masks.nm import candidates

_CHUNK = 1 << 17  # groups the torch form works on at a time
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


class CandidateMix:
    """The mixture of all patterns of ``keep``:``group``; one logit a pattern.

    Weights and gradients are (G, M) views of a matrix's rows, logits (G, C(M, N)), float32.
    """

    def __init__(self, keep: int, group: int) -> None:
        self.keep, self.group = keep, group
        self.patterns = candidates(keep, group)
        self.logits_per_group = len(self.patterns)

    def prior(self, mask: Tensor) -> Tensor:
        """How much each pattern agrees with a mask (G, M; True = pruned), less the mean N^2/M."""
        agreement = (~mask).float() @ self.patterns.float().T.to(mask.device)
        return agreement - self.keep**2 / self.group

    def choose(self, logits: Tensor) -> Tensor:
        """The most likely mask, (G, M) bool, True = pruned; ties go to the first pattern."""
        return ~self.patterns.to(logits.device)[logits.argmax(-1)]

    def masked(self, weight: Tensor, logits: Tensor, draw: Draw) -> Tensor:
        """``W * M~``, float32 (G, M)."""
        out = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
        fused = _fused(weight, logits)
        if fused is not None:
            fused.masked(*_numpy(self, logits, draw), weight.numpy(), out.numpy())
            return out
        table = self._table(logits.device)
        generated = _generated(logits, self.logits_per_group)
        if generated is not None:
            made: Tensor = generated[0](weight, logits, table, *_tensors(draw, logits.device))
            return made
        for at in range(0, len(logits), _CHUNK):
            part = slice(at, at + _CHUNK)
            out[part] = weight[part] * (probabilities(logits[part], draw, at) @ table)
        return out

    def backward(
        self, weight: Tensor, logits: Tensor, grad: Tensor, square: float, draw: Draw
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
                np.float32(square),
                d_logits.reshape(-1).numpy(),
                out.numpy(),
            )
            return d_logits, out
        table = self._table(logits.device)
        generated = _generated(logits, self.logits_per_group)
        if generated is not None:
            slope = torch.tensor(square, device=logits.device)
            how = (table, *_tensors(draw, logits.device))
            d_logits, out = generated[1](weight, logits, grad, slope, *how)
            return d_logits, out
        for at in range(0, len(logits), _CHUNK):
            part = slice(at, at + _CHUNK)
            y, w = probabilities(logits[part], draw, at), weight[part].float()
            out[part] = w * (y @ table)
            u = ((grad[part].float() + 2 * square * out[part]) * w) @ table.T
            d_logits[part] = draw.kappa / draw.tau * y * (u - (u * y).sum(-1, keepdim=True))
        return d_logits, out

    def _table(self, device: torch.device) -> Tensor:
        return self.patterns.to(device, torch.float32)


def _numpy(mix: CandidateMix, logits: Tensor, draw: Draw) -> tuple[Any, ...]:
    low, high = draw.key or (0, 0)
    return (
        logits.reshape(-1).numpy(),
        mix.patterns.float().numpy(),
        np.uint32(low),
        np.uint32(high),
        draw.key is not None,
        np.float32(draw.kappa),
        np.float32(draw.tau),
    )


def _tensors(draw: Draw, device: torch.device) -> tuple[Tensor, Tensor, bool]:
    """Key and (kappa, tau) in tensors, so that a new draw compiles nothing anew."""
    key = torch.tensor(draw.key or (0, 0), device=device)
    return key, torch.tensor((draw.kappa, draw.tau), device=device), draw.key is not None


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
