"""Setting to zero what a mask says, in place and in one pass over the matrix.

torch multiplies by a uint8 mask through a copy of the mask in floats. With numba (extra
``kernels``) the copy is never made; otherwise it is made a few rows at a time, so that it stays in
the processor's cache.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from secateur.kernels.threads import as_many_as_torch

ROWS = 256
"""Rows of a mask turned into floats at a time on a CPU without numba."""


def keep_only(matrix: Tensor, keep: Tensor | None) -> Tensor:
    """``matrix`` (d_out, d_in), set to zero in place where ``keep`` (uint8; None: all) is 0."""
    if keep is None:
        return matrix
    if matrix.device.type != "cpu":
        return matrix.mul_(keep)
    kernel = _compiled()
    plain = matrix.dtype is torch.float32 and matrix.is_contiguous() and keep.is_contiguous()
    if kernel is not None and plain and not matrix.requires_grad:
        as_many_as_torch()
        kernel(matrix.numpy(), keep.numpy())
        return matrix
    for rows, kept in zip(matrix.split(ROWS), keep.split(ROWS), strict=True):
        rows.mul_(kept.to(matrix.dtype))
    return matrix


@lru_cache(maxsize=1)
def _compiled() -> Any:
    try:
        from secateur.kernels import _masking_numba
    except ImportError:
        return None
    return _masking_numba.multiply
