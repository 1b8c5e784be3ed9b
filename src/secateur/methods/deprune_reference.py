"""Diagonal-wise refactorisation as DEPrune's paper runs it: an oracle, and nothing to be used.

32 channels become one matrix (32, 32 K): row i holds the K taps of channel i in columns
[i K, (i + 1) K) and zeros elsewhere, so 31 of 32 products are with zero. Its other factor is the
patches of those channels (im2col). On a CPU that is 10 to 500 times slower than the native layer.
(Qin et al. 2018; Park et al., NeurIPS 2024, section 2.)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.masks.depthwise import CHANNELS


def diagonals(weight: Tensor) -> list[Tensor]:
    """A_g (m, m K) of every 32 channels of a weight (M, 1, kernel_h, kernel_w); m = 32 but at the end."""
    matrices = []
    for rows in weight.detach().flatten(1).split(CHANNELS):
        m, taps = rows.shape
        matrix = torch.zeros(m, m, taps)
        matrix[torch.arange(m), torch.arange(m)] = rows
        matrices.append(matrix.reshape(m, m * taps))
    return matrices


def patches(conv: nn.Conv2d, x: Tensor) -> list[Tensor]:
    """B_g (images, m K, positions) of every 32 channels."""
    k = conv.kernel_size[0] * conv.kernel_size[1]
    unfolded = F.unfold(x, conv.kernel_size, conv.dilation, _zeros(conv), conv.stride)
    return list(unfolded.split(CHANNELS * k, dim=1))


def refactored(conv: nn.Conv2d, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """The layer as matrix products; with a mask, of the columns that are left only."""
    a, b = diagonals(conv.weight), patches(conv, x)
    if mask is not None:
        left = [~part.reshape(-1) for part in mask.flatten(1).split(CHANNELS)]
        a = [matrix[:, keep] for matrix, keep in zip(a, left, strict=True)]
        b = [matrix[:, keep] for matrix, keep in zip(b, left, strict=True)]
    product = torch.cat([m @ p for m, p in zip(a, b, strict=True)], 1)
    if conv.bias is not None:
        product = product + conv.bias[:, None]
    size = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, p, d, k, s in zip(
            x.shape[2:], _zeros(conv), conv.dilation, conv.kernel_size, conv.stride, strict=True
        )
    ]
    return product.view(len(x), -1, *size)


def _zeros(conv: nn.Conv2d) -> tuple[int, ...]:
    if isinstance(conv.padding, str):
        raise ValueError("the oracle knows padding in numbers only")
    return conv.padding
