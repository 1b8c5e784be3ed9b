"""A frozen linear under a mask that is settled: what is not learned while other masks are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.training.hooks import autocasted


class _HeldLinear(torch.autograd.Function):
    """x (W without what is gone)^T + b; the masked weight is made again in backward, not kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, gone: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight, gone)
        return F.linear(x, weight.masked_fill(gone, 0).to(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        weight, gone = ctx.saved_tensors
        return upstream[0] @ weight.masked_fill(gone, 0).to(upstream[0].dtype), None, None, None


class Held(nn.Module):
    """A linear that computes under a fixed mask, and holds a byte a weight for it.

    Args:
        base_layer: the linear or Conv1D, which stays as it is.
        gone: (d_out, d_in) bool, True = pruned.
        transposed: it stores (d_in, d_out).
    """

    gone: Tensor

    def __init__(self, base_layer: nn.Module, gone: Tensor, transposed: bool) -> None:
        super().__init__()
        self.base_layer, self.transposed = base_layer, transposed
        self.register_buffer("gone", gone, persistent=False)
        self.open = False
        """True: compute with the dense weight."""

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output under its mask."""
        if self.open:
            return self.base_layer(x)
        layer: Any = self.base_layer
        x = autocasted(x)
        weight = layer.weight.detach()
        bias = getattr(layer, "bias", None)
        with torch.autocast(x.device.type, enabled=False):
            out: Tensor = _HeldLinear.apply(
                x,
                weight.T if self.transposed else weight,
                self.gone,
                None if bias is None else bias.detach().to(x.dtype),
            )
        return out

    def __getattr__(self, name: str) -> Any:
        # Models look at a linear's weight (its type, its device) or sizes without calling it.
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)
