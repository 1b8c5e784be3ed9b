"""The counter-based generator behind every random weight: Philox4x32-10.

A random network is never stored. Each of its weights has an *address* (layer, role, pool,
neuron, column) and its value is a pure function of ``(seed, address)``, so any weight can be
regenerated alone, in any order, on any machine. Philox needs only 32-bit integer arithmetic,
which makes it the same on every platform and every version of numpy or torch.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
"""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.errors import UsageError

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
LOW32 = 0xFFFFFFFF

ROLE_IN = 0
"""Weights from a layer's inputs into its intermediate neurons."""
ROLE_OUT = 1
"""Weights from the intermediate neurons to the layer's outputs."""
ROLE_DATA = 2
"""Not a weight: the check points drawn by certificates."""


def check_seed(seed: int) -> int:
    """The seed itself, refused unless it is an unsigned 64-bit integer."""
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**64:
        raise UsageError(
            "a seed is an integer in [0, 2^64)", field="seed", value=seed, fix="seed=0"
        )
    return seed


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> list[Tensor]:
    """Four 32-bit words for each 128-bit counter.

    Args:
        counter: four int64 tensors of one shape (or broadcastable), each holding a 32-bit word.
        key: two 32-bit words.

    Returns:
        Four int64 tensors with values in [0, 2^32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        # int64 products wrap, but their 64 bits are those of the unsigned product.
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        high0, high1 = (p0 >> 32) & LOW32, (p1 >> 32) & LOW32
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, p1 & LOW32, high0 ^ c3 ^ k1, p0 & LOW32
        k0, k1 = (k0 + WEYL[0]) & LOW32, (k1 + WEYL[1]) & LOW32
    return [c0, c1, c2, c3]


def uniforms(
    seed: int, layer: int, role: int, pool: Tensor, neuron: Tensor, column: Tensor
) -> tuple[Tensor, Tensor]:
    """One uniform in (0, 1) (float64, a multiple of 2^-53) and one sign (+1 or -1) per address.

    ``pool``, ``neuron`` and ``column`` are int64 tensors that broadcast together. A Philox
    block serves two neighbouring columns, 64 bits each: 52 for the uniform, one for the sign.
    """
    pool, neuron, column = torch.broadcast_tensors(pool, neuron, column)
    tag = torch.full_like(neuron, layer * 4 + role)
    words = philox((neuron, pool, column >> 1, tag), (seed & LOW32, seed >> 32))
    odd = (column & 1).bool()
    high = torch.where(odd, words[2], words[0])
    low = torch.where(odd, words[3], words[1])
    unit = ((high << 20) + (low >> 12)).double().add(0.5).mul(2.0**-52)
    return unit, 1.0 - 2.0 * (low & 1).double()


def points(seed: int, count: int, low: Tensor, high: Tensor) -> Tensor:
    """``count`` reproducible points, uniform in the box [low, high]; float64 (count, *shape)."""
    size = low.numel()
    rows = torch.arange(count).unsqueeze(1)
    unit, _ = uniforms(seed, 0, ROLE_DATA, torch.zeros_like(rows), rows, torch.arange(size))
    flat = low.reshape(-1) + unit * (high - low).reshape(-1)
    return torch.minimum(flat, high.reshape(-1)).reshape(count, *low.shape)
