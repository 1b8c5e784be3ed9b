"""Drawing many random weights by address: compiled where that pays, torch otherwise."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from secateur.lottery.laws import Law

FEW = 20_000
"""Below this many weights, loading compiled code costs more than it saves."""


@cache
def have_numba() -> bool:
    """Whether compiled kernels can run."""
    try:
        import numba  # noqa: F401
    except ImportError:
        return False
    return True


def draw(
    law: Law, seed: int, layer: int, role: int, pool: Any, neuron: Any, column: Any
) -> NDArray[np.float32]:
    """The weights at these addresses (integers or integer arrays that broadcast)."""
    addresses = np.broadcast_arrays(pool, neuron, column)
    if addresses[0].size < FEW or not have_numba():
        tensors = (torch.from_numpy(np.array(x, np.int64)) for x in addresses)
        return np.asarray(law.values(seed, layer, role, *tensors).numpy())
    from secateur.lottery import compiled

    flat = [np.ascontiguousarray(x, np.uint64).reshape(-1) for x in addresses]
    out = np.empty(addresses[0].shape, np.float32)
    constants = (law.code, float(law.scale), float(law.span))
    compiled.values(constants, np.uint64(seed), layer, role, tuple(flat), out.reshape(-1))
    return out
