# mypy: disable-error-code="no-untyped-def"
"""The numba form of ``kernels.masking``."""

from __future__ import annotations

import numba
import numpy as np


@numba.njit(parallel=True, cache=True)
def multiply(matrix, keep):
    """``matrix *= keep``, float32 by uint8, both (rows, columns)."""
    for row in numba.prange(matrix.shape[0]):
        for column in range(matrix.shape[1]):
            matrix[row, column] *= np.float32(keep[row, column])
