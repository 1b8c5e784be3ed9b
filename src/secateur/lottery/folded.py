"""Masked random networks multiplied out to ordinary matrices, with the rounding accounted for.

For a column with input t, the kept neurons with a > 0 contribute ``P act(t)`` and those with
a < 0 contribute ``N act(-t)``, where P = sum of a b and N = sum of |a| b. With inner slope s that
is ``positive * max(t, 0) + negative * min(t, 0)``, positive = P - s N, negative = s P - N.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from secateur.lottery.network import Layer, TargetNetwork

UNIT = 2.0**-53
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class FoldedLayer:
    """One layer of a network that stands in for ``reference``.

    Attributes:
        reference: the target layer.
        positive, negative: (rows, columns) weights on max(t, 0) and min(t, 0), float64.
        intended: (rows, columns) the target's weights in the same shape.
        slack: (rows, columns) upper bound on |true - stored| of positive, negative and intended
            together: the rounding of the sums.
        gross: (rows, columns) sum of |a b|, for bounding a floating-point run of the network.
        out_gross: (rows, columns) sum of |b|, for the same.
        terms: the largest number of products in one row.
    """

    reference: Layer
    positive: Tensor
    negative: Tensor
    intended: Tensor
    slack: Tensor
    gross: Tensor
    out_gross: Tensor
    terms: int
    copies: int = 1
    carried: int = 0

    def columns(self, x: Tensor, constant: float = 1.0) -> Tensor:
        """(batch, *inputs) -> (batch, positions, columns), repeating nothing: see ``carried``."""
        if self.carried:
            x = x.reshape(x.shape[0], 1, -1)
            bias = self.reference.bias
            return torch.nn.functional.pad(x, (0, 1), value=constant) if bias else x
        return self.reference.columns(x, constant)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output in the dtype of ``x``; (batch, *outputs), or (batch, rows) of copies."""
        columns = self.columns(x)
        y = columns.clamp(min=0) @ self.positive.to(x.dtype).T
        y = y + columns.clamp(max=0) @ self.negative.to(x.dtype).T
        return self.assemble(self.reference.activate(y))

    def assemble(self, y: Tensor) -> Tensor:
        """(batch, positions, rows) -> what the next layer takes."""
        return y[:, 0] if self.copies > 1 else self.reference.geometry.assemble(y)

    def lift(self, x: Tensor) -> Tensor:
        """The target's input to this layer, (batch, *inputs), in the shape this layer takes."""
        return x.reshape(x.shape[0], -1).repeat_interleave(self.carried, 1) if self.carried else x


@dataclass(frozen=True)
class FoldedNetwork:
    """A network and the target it stands in for, layer by layer."""

    target: TargetNetwork
    layers: tuple[FoldedLayer, ...]

    def forward(self, x: Tensor) -> Tensor:
        """The stand-in's output."""
        for layer in self.layers:
            x = layer.forward(x)
        return x


def fold_layer(
    layer: Layer,
    output: Ints,
    column: Ints,
    neuron: Ints,
    in_weight: Tensor,
    out_weight: Tensor,
    copies: int = 1,
    carried: int = 0,
) -> FoldedLayer:
    """Multiply out the kept edges of one layer. All edge arrays are (edges,), weights float64."""
    outputs, columns = layer.matrix.shape
    rows = outputs * copies
    base = layer.matrix.repeat_interleave(copies, 0)
    if carried:
        width = carried * (columns - layer.bias) + layer.bias
        is_bias = (column == columns - 1) & layer.bias
        column = np.where(is_bias, width - 1, column * carried + neuron)
    else:
        width = columns
    cell = torch.from_numpy(output * width + column)

    def total(values: Tensor) -> Tensor:
        summed = torch.zeros(rows * width, dtype=torch.float64).index_add_(0, cell, values)
        return summed.view(rows, width)

    product = in_weight.abs() * out_weight  # exact: both factors are float32 values
    up = in_weight > 0
    plus, minus, gross = total(product * up), total(product * ~up), total(product.abs())
    count = total(torch.ones_like(product))
    slope = layer.inner_slope
    positive, negative = plus - slope * minus, slope * plus - minus
    if carried:  # copies of the input enter directly, whatever their sign
        positive = negative = plus
    slack = (count + 4) * (2 * UNIT) * gross
    if not carried:
        intended = base
    else:
        # Copies of one input are equal in the target, so only the sum of their weights counts;
        # put what the kept copies leave over on the first copy.
        body = positive[:, : carried * (columns - layer.bias)].view(rows, -1, carried)
        rest = base[:, : columns - layer.bias] - body.sum(2)
        shifted = body.clone()
        shifted[:, :, 0] += rest
        intended = torch.cat([shifted.flatten(1), base[:, columns - layer.bias :]], dim=1)
        rounding = (carried + 4) * (2 * UNIT) * (body.abs().sum(2) + base[:, : rest.shape[1]].abs())
        extra = torch.zeros(rows, rest.shape[1], carried, dtype=torch.float64)
        extra[:, :, 0] = rounding
        slack[:, : extra[0].numel()] += extra.flatten(1)
    terms = int(count.sum(1).max()) if count.numel() else 0
    out_gross = total(out_weight.abs())
    return FoldedLayer(
        layer, positive, negative, intended, slack, gross, out_gross, terms, copies, carried
    )


def pruned_network(target: TargetNetwork, matrices: Sequence[Tensor]) -> FoldedNetwork:
    """A target whose weights were replaced (pruned, quantised), as a stand-in to certify."""
    layers = []
    for layer, matrix in zip(target.layers, matrices, strict=True):
        weight = matrix.double()
        layers.append(
            FoldedLayer(
                layer,
                weight,
                weight,
                layer.matrix,
                torch.zeros_like(weight),
                weight.abs(),
                torch.zeros_like(weight),
                weight.shape[1],
            )
        )
    return FoldedNetwork(target, tuple(layers))
