"""The torch.compile form of ``kernels.candidate_mix``, for GPUs: one generated kernel a direction.

The same formulas as the plain form, written without matrix products so that the compiler can fuse
noise, softmax and mixture; what changes from step to step comes in tensors, so nothing is compiled
again.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from secateur.kernels.candidate_mix import softened

MOST = 16
"""Patterns up to which the sums over them are unrolled into the one kernel."""


def serves(device: torch.device) -> bool:
    """Whether kernels can be generated for ``device``: a GPU that Triton knows."""
    if device.type not in ("cuda", "xpu") or importlib.util.find_spec("triton") is None:
        return False
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (7, 0)


def _mixed(y: Tensor, table: Tensor) -> Tensor:
    return (y.unsqueeze(-1) * table).sum(-2)


def masked(
    weight: Tensor, logits: Tensor, table: Tensor, index: Tensor | None, key: Tensor, heat: Tensor,
    noisy: bool,
) -> Tensor:  # fmt: skip
    """``W * M~``; ``key`` int64 (2,), ``heat`` = (kappa, tau) float32."""
    y = softened(logits, key if noisy else None, heat[0], heat[1])
    return weight * _mixed(y, table if index is None else table[index.long()])


def backward(
    weight: Tensor, logits: Tensor, grad: Tensor, square: Tensor, table: Tensor,
    index: Tensor | None, key: Tensor, heat: Tensor, noisy: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``CandidateMix.backward``."""
    y = softened(logits, key if noisy else None, heat[0], heat[1])
    own = table if index is None else table[index.long()]
    out = weight * _mixed(y, own)
    u = _mixed((grad.float() + 2 * square * out) * weight, own.mT)
    return heat[0] / heat[1] * y * (u - (u * y).sum(-1, keepdim=True)), out


@lru_cache(maxsize=1)
def compiled() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """(masked, backward), compiled for any number of groups."""
    return torch.compile(masked, dynamic=True), torch.compile(backward, dynamic=True)
