"""Layers whose weights are frozen and whose mask is learnt: one score per weight, top-k.

Straight-through estimation: the forward pass keeps the weights with the largest |score|, the
gradient of the mask goes to the scores as if nothing had been chosen.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TopK(torch.autograd.Function):
    """1.0 at the ``count`` largest entries, 0.0 elsewhere; the gradient passes straight through."""

    @staticmethod
    def forward(ctx: Any, magnitude: Tensor, count: int) -> Tensor:
        mask = torch.zeros_like(magnitude)
        mask.view(-1)[magnitude.flatten().topk(count, sorted=False).indices] = 1.0
        return mask

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class ScoredLayer(nn.Module):
    """Frozen random weights under a trained mask; base of the linear and the convolution."""

    weight: Tensor

    def __init__(self, weight: Tensor, kept: int) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.scores = nn.Parameter(torch.empty_like(weight))
        self.kept = kept

    def mask(self) -> Tensor:
        """1.0 where a weight is used; same shape as ``weight``."""
        mask: Tensor = TopK.apply(self.scores.abs(), self.kept)
        return mask

    def effective(self) -> Tensor:
        """The weights in use."""
        return self.weight * self.mask()


class MaskedLinear(ScoredLayer):
    """A Linear without bias under a trained mask."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return F.linear(x, self.effective())


class MaskedConv2d(ScoredLayer):
    """A Conv2d without bias under a trained mask."""

    def __init__(self, weight: Tensor, kept: int, like: nn.Conv2d) -> None:
        super().__init__(weight, kept)
        self.options = (like.stride, like.padding, like.dilation, like.groups)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, in, height, width) -> (batch, out, ...)."""
        stride, padding, dilation, groups = self.options
        return F.conv2d(x, self.effective(), None, stride, padding, dilation, groups)


def masked_layers(model: nn.Module) -> Iterator[ScoredLayer]:
    """The masked layers of a converted model, in order."""
    yield from (part for part in model.modules() if isinstance(part, ScoredLayer))
