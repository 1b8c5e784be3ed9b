"""Rigorous bounds in float64: sums whose rounding errors are counted, outward, every time.

Numpy and torch round to nearest, and BLAS adds in any order. For a sum of n products computed in
any order, |computed - exact| <= g * sum |terms| with g = n u / (1 - n u), u = 2^-53. Each helper
adds that (with a generous count), so its result is a bound for the exact real number.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.lottery.folded import UNIT, FoldedLayer, FoldedNetwork
from secateur.lottery.network import Box, Layer

TINY = 2.0**-1000
"""Covers underflow: far above the subnormals, far below anything reported."""


def inflation(terms: int) -> float:
    """Factor that turns a computed sum of non-negative terms into an upper bound."""
    return 1 + 4 * (terms + 8) * UNIT


def upper_product(matrix: Tensor, x: Tensor) -> Tensor:
    """Upper bound on ``matrix @ x`` over the last axis, both non-negative.

    Args:
        matrix: (rows, columns). x: (..., columns). Returns (..., rows).
    """
    return (x @ matrix.T) * inflation(matrix.shape[1]) + TINY


def enclose(matrix: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds on ``matrix @ t`` for low <= t <= high; (positions, columns) -> (positions, rows)."""
    plus, minus = matrix.clamp(min=0), matrix.clamp(max=0)
    size = torch.maximum(low.abs(), high.abs())
    rounding = 4 * (2 * matrix.shape[1] + 8) * UNIT * (size @ matrix.abs().T) + TINY
    return (
        low @ plus.T + high @ minus.T - rounding,
        high @ plus.T + low @ minus.T + rounding,
    )


@dataclass(frozen=True)
class LayerBounds:
    """What is known about one layer over the box.

    Attributes:
        low, high: (positions, columns) the target's inputs to the layer.
        error: (positions, columns) bound on |stand-in input - target input|.
        weight_error: largest |stand-in - target| weight that an input can meet.
    """

    low: Tensor
    high: Tensor
    error: Tensor
    weight_error: float


@dataclass(frozen=True)
class NetworkBounds:
    """Interval bounds through a network; ``error`` is the certificate, one entry per output."""

    layers: tuple[LayerBounds, ...]
    error: Tensor


def difference(folded: FoldedLayer, low: Tensor, high: Tensor) -> Tensor:
    """(rows, columns) bound on |stand-in - target| weight, for the signs the inputs can have."""
    d_positive = (folded.positive - folded.intended).abs()
    d_negative = (folded.negative - folded.intended).abs()
    can_rise, can_fall = (high > 0).any(0), (low < 0).any(0)
    either = torch.maximum(d_positive * can_rise, d_negative * can_fall)
    return (either + folded.slack) * inflation(4)


def propagate(
    network: FoldedNetwork, box: Box, unit: float | None = None, underflow: float = 0.0
) -> NetworkBounds:
    """Interval bounds on the target, and on how far the stand-in can be from it, layer by layer.

    The recursion is ``E_i = |W^ - W| U_(i-1) + |W^| E_(i-1)`` with U the largest target input;
    (leaky) ReLU is 1-Lipschitz and leaves E as it is.

    Args:
        network: the stand-in and its target.
        box: of inputs.
        unit: also count the rounding of a run in a format with this unit roundoff.
        underflow: what one operation of that format may lose besides, where results get tiny.
    """
    low, high = box.low[None], box.high[None]
    error = torch.zeros_like(low)
    seen: list[LayerBounds] = []
    for folded in network.layers:
        layer = folded.reference
        low_c, high_c = (folded.columns(folded.lift(x))[0] for x in (low, high))
        error_c = folded.columns(error, 0.0)[0]
        gap = difference(folded, low_c, high_c)
        size = torch.maximum(low_c.abs(), high_c.abs())
        reach = torch.maximum(folded.positive.abs(), folded.negative.abs()) + folded.slack
        new_error = upper_product(gap, size) + upper_product(reach, error_c)
        if unit is not None:
            grown = upper_product(folded.gross + folded.slack, size + error_c)
            lost = underflow * (folded.out_gross.sum(1) + 4 * (folded.terms + 6))
            new_error = (new_error + rounding_share(folded, unit) * grown + lost) * inflation(8)
        seen.append(LayerBounds(low_c, high_c, error_c, float(gap.max()) if gap.numel() else 0.0))
        low, high = _target_layer(layer, low, high)
        error = folded.assemble(new_error[None])
    return NetworkBounds(tuple(seen), error[0].reshape(-1))


def rounding_share(folded: FoldedLayer, unit: float) -> float:
    """Relative error of one layer's run: two products and a sum of ``terms``, in any order."""
    count = folded.terms + 6
    if count * unit >= 0.5:
        return float("inf")
    return count * unit / (1 - count * unit)


def widen(x: Tensor, side: int) -> Tensor:
    """One rounding step outward (leaky slopes multiply once); exact zeros stay."""
    return torch.where(x == 0, x, x + side * 2 * UNIT * x.abs())


def _target_layer(layer: Layer, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds on a target layer's output, (1, *outputs), from those on its input."""
    ends = enclose(layer.matrix, *(layer.columns(x)[0] for x in (low, high)))
    low, high = (layer.activate(layer.geometry.assemble(x[None])) for x in ends)
    return widen(low, -1), widen(high, +1)


def _stand_in_layer(folded: FoldedLayer, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """The same for a stand-in's layer."""
    low, high = (folded.columns(x)[0] for x in (low, high))
    rising = enclose(folded.positive, low.clamp(min=0), high.clamp(min=0))
    falling = enclose(folded.negative, low.clamp(max=0), high.clamp(max=0))
    unsure = upper_product(folded.slack, torch.maximum(low.abs(), high.abs()))
    ends = []
    for up, down, side in zip(rising, falling, (-1, 1), strict=True):
        unsure_here = unsure + 4 * UNIT * (up.abs() + down.abs() + unsure)
        end = folded.assemble((up + down + side * unsure_here * inflation(4))[None])
        ends.append(widen(folded.reference.activate(end), side))
    return ends[0], ends[1]


def gap_from_below(network: FoldedNetwork, x: Tensor) -> float:
    """max over outputs of |stand-in - target| at one input, rounded down: surely attained there."""
    low = high = x.double()[None]
    ours = (low, high)
    theirs = (low, high)
    for folded in network.layers:
        ours = _stand_in_layer(folded, *ours)
        theirs = _target_layer(folded.reference, *theirs)
    gaps = [
        (a - b) - 4 * UNIT * (a.abs() + b.abs())
        for a, b in ((ours[0], theirs[1]), (theirs[0], ours[1]))
    ]
    return max(0.0, float(torch.maximum(*gaps).max()))
