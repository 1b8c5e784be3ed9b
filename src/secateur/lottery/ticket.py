"""A ticket: a seed, and the bits that say which weights of the random network survive.

No weight value is stored. ``TicketLayer.products`` regenerates the surviving random weights from
their addresses, and everything else (folded network, masked network, certificate) follows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from secateur.errors import VerificationError
from secateur.lottery.drawing import draw
from secateur.lottery.folded import FoldedLayer, FoldedNetwork, fold_layer
from secateur.lottery.laws import Law
from secateur.lottery.network import Box, Layer, TargetNetwork
from secateur.lottery.philox import ROLE_IN, ROLE_OUT

Ints = NDArray[np.int64]


def narrow(values: Ints) -> NDArray[Any]:
    """The same whole numbers, 0 or more, in the smallest type that safetensors and torch share."""
    top = int(values.max(initial=0))
    for kind in (np.uint8, np.int16, np.int32):
        if top <= np.iinfo(kind).max:
            return values.astype(kind)
    return values


@dataclass(frozen=True)
class TicketLayer:
    """The surviving edges of one target layer.

    Attributes:
        law: of both factors.
        per_weight: pools belong to one (output, column) each instead of one column each.
        sizes: (pools,) random neurons in each pool; pool number = column, or
            output * columns + column with ``per_weight``.
        output, column, neuron: (edges,) one kept out-weight each: from neuron ``neuron`` of its
            pool, which keeps only its in-edge from ``column``, to ``output``; sorted.
        copies: rows the random network has per target output (the depth L+1 construction).
        carried: copies of each input found in the previous random layer; these inputs need no
            intermediate neuron (only the bias column has a pool). 0 for the depth 2L networks.
    """

    law: Law
    per_weight: bool
    sizes: Ints
    output: Ints
    column: Ints
    neuron: Ints
    copies: int = 1
    carried: int = 0

    def pool_of_edges(self, columns: int) -> Ints:
        """(edges,) the pool each edge starts from."""
        return self.output * columns + self.column if self.per_weight else self.column

    def is_carried(self, layer: Layer) -> NDArray[np.bool_]:
        """(edges,) whether the edge starts from a copy of the input itself."""
        bias_column = layer.matrix.shape[1] - 1 if layer.bias else -1
        return (self.column != bias_column) & (self.carried > 0)

    def in_weights(self, seed: int, number: int, layer: Layer) -> Tensor:
        """(edges,) float32 in-weight of each edge's neuron; 1 where the input is carried."""
        pool = self.pool_of_edges(layer.matrix.shape[1])
        drawn = draw(self.law, seed, number, ROLE_IN, pool, self.neuron, self.column)
        return torch.from_numpy(np.where(self.is_carried(layer), np.float32(1), drawn))

    def out_weights(self, seed: int, number: int, layer: Layer) -> Tensor:
        """(edges,) float32 out-weight of each edge."""
        pool = self.pool_of_edges(layer.matrix.shape[1])
        return torch.from_numpy(
            draw(self.law, seed, number, ROLE_OUT, pool, self.neuron, self.output)
        )

    def lists(self, layer: Layer) -> dict[str, NDArray[Any]]:
        """What a file holds of this layer, in the smallest types: see ``store``."""
        columns = layer.matrix.shape[1]
        counts = np.bincount(
            self.output * columns + self.column,
            minlength=layer.matrix.shape[0] * self.copies * columns,
        )
        same = len(self.sizes) > 0 and bool((self.sizes == self.sizes[0]).all())
        return {
            "sizes": narrow(self.sizes[:1] if same else self.sizes),
            "counts": narrow(counts),
            "neurons": narrow(self.neuron),
        }

    def check(self, layer: Layer, name: str) -> None:
        """Refuse edges that are not edges of the random network, or that occur twice."""
        outputs, columns = layer.matrix.shape
        inside = (self.column >= 0) & (self.column < columns)
        inside &= (self.output >= 0) & (self.output < outputs * self.copies)
        pool = np.where(inside, self.pool_of_edges(columns), 0)
        limit = np.where(self.is_carried(layer), self.carried, self.sizes[pool])
        inside &= (self.neuron >= 0) & (self.neuron < limit)
        if not inside.all():
            raise VerificationError(
                f"layer {name}: {int((~inside).sum())} kept edges do not exist in the random network"
            )
        order = np.lexsort((self.neuron, self.column, self.output))
        same = np.ones(max(len(order) - 1, 0), bool)
        for key in (self.output, self.column, self.neuron):
            same &= key[order][1:] == key[order][:-1]
        if same.any():
            raise VerificationError(f"layer {name}: {int(same.sum())} edges occur twice")


@dataclass(frozen=True)
class TicketSize:
    """How large the random network is and how little of it survives.

    Attributes:
        target: weights of the target, biases included.
        neurons: intermediate random neurons.
        random: parameters of the dense random network.
        kept: parameters the mask keeps (in-edges of live neurons + out-edges).
        seed_and_bits: bytes of the ticket's lists on disk (pool sizes, edges a cell, neurons).
    """

    target: int
    neurons: int
    random: int
    kept: int
    seed_and_bits: int

    @property
    def kept_per_weight(self) -> float:
        """Kept random parameters per target weight."""
        return self.kept / self.target

    @property
    def neurons_per_weight(self) -> float:
        """Random neurons per target weight."""
        return self.neurons / self.target


@dataclass(frozen=True)
class Ticket:
    """A sub-network of a random network, found without training.

    Attributes:
        target: the network it reproduces.
        box: the inputs on which its error is judged.
        seed: of the random network.
        layers: the kept edges, one entry per target layer.
        construction: name and options it was found with (JSON-able).
        weight_eps: accuracy asked for each layer's weights.
        eps: sup error asked for, or None if only ``weight_eps`` was.
        history: what happened on the way: grown pools, empty slots, seconds.
    """

    target: TargetNetwork
    box: Box
    seed: int
    layers: tuple[TicketLayer, ...]
    construction: dict[str, Any]
    weight_eps: tuple[float, ...]
    eps: float | None = None
    history: dict[str, Any] = field(default_factory=dict)

    def fold(self) -> FoldedNetwork:
        """The function of the masked random network, its products multiplied out (float64)."""
        folded: list[FoldedLayer] = []
        for number, (layer, kept) in enumerate(zip(self.target.layers, self.layers, strict=True)):
            folded.append(
                fold_layer(
                    layer,
                    kept.output,
                    kept.column,
                    kept.neuron,
                    kept.in_weights(self.seed, number, layer).double(),
                    kept.out_weights(self.seed, number, layer).double(),
                    kept.copies,
                    kept.carried,
                )
            )
        return FoldedNetwork(self.target, tuple(folded))

    def size(self) -> TicketSize:
        """Counts; see ``TicketSize``."""
        neurons = random = kept = stored = 0
        for layer, part in zip(self.target.layers, self.layers, strict=True):
            outputs, columns = layer.matrix.shape
            fresh = int(part.sizes.sum())
            wide = part.carried * (columns - layer.bias)
            neurons += fresh + (outputs * part.copies if part.copies > 1 else 0)
            random += fresh * (columns if not part.carried else wide + 1)
            random += outputs * part.copies * (fresh + wide)
            own = ~part.is_carried(layer)
            width = int(part.neuron.max(initial=0)) + 1
            live = part.pool_of_edges(columns)[own] * width + part.neuron[own]
            kept += len(np.unique(live)) + len(part.output)
            stored += sum(values.nbytes for values in part.lists(layer).values())
        return TicketSize(self.target.weights, neurons, random, kept, stored)

    def check(self) -> None:
        """Refuse a ticket whose bits do not fit its random network."""
        for number, (layer, part) in enumerate(zip(self.target.layers, self.layers, strict=True)):
            part.check(layer, str(number))
