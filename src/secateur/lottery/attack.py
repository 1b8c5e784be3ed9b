"""The other side of a certificate: inputs at which the error really is large.

Projected gradient ascent on ``max_o |f^(x) - f(x)|_o`` from random points and random corners of
the box. The error at the input it finds, rounded down, is attained there for sure, so it bounds
the certificate from below.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.lottery.folded import FoldedNetwork
from secateur.lottery.intervals import gap_from_below
from secateur.lottery.network import Box
from secateur.lottery.philox import points


@dataclass(frozen=True)
class Witness:
    """An input and the largest output error there, rounded down."""

    value: float
    x: Tensor


def gap_at(network: FoldedNetwork, x: Tensor) -> Tensor:
    """max over outputs of |stand-in - target| for each input; (batch,), float64."""
    difference = network.forward(x.double()) - network.target.forward(x.double())
    return difference.flatten(1).abs().amax(1)


def search_witness(
    network: FoldedNetwork,
    box: Box,
    seed: int = 0,
    starts: int = 32,
    steps: int = 30,
    data: Tensor | None = None,
) -> Witness:
    """Ascend from ``starts`` points (and from the worst of ``data``, projected into the box)."""
    x = points(seed, starts, box.low, box.high)
    corner = torch.where(x > (box.low + box.high) / 2, box.high, box.low)
    x = torch.cat([x[: starts // 2], corner[starts // 2 :]])
    if data is not None and len(data):
        inside = data.double().clamp(box.low, box.high)
        worst = gap_at(network, inside).topk(min(8, len(inside))).indices
        x = torch.cat([x, inside[worst]])
    best = Witness(-1.0, box.low)
    width = box.high - box.low
    for step in range(steps + 1):
        x = x.detach().requires_grad_(True)
        gap = gap_at(network, x)
        values = gap.detach()
        top = int(values.argmax())
        if float(values[top]) > best.value:
            best = Witness(float(values[top]), x[top].detach().clone())
        if step == steps:
            break
        (gradient,) = torch.autograd.grad(gap.sum(), x)
        # The error is piecewise linear: try whole corners first, then settle.
        stride = width * (1.0 if step < 3 else 0.5 * 0.85 ** (step - 3))
        with torch.no_grad():
            x = torch.clamp(x + stride * gradient.sign(), box.low, box.high)
    return Witness(gap_from_below(network, best.x), best.x)
