"""The masked random network itself, run end to end with nothing but original random weights.

``MaskedNetwork`` keeps the surviving weights in sparse form and is what gets measured in float32.
``dense_layers`` writes out the whole random network with its masks, for small ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.errors import UsageError
from secateur.lottery.network import Layer
from secateur.lottery.philox import ROLE_IN, ROLE_OUT
from secateur.lottery.ticket import Ticket, TicketLayer

DENSE_LIMIT = 50_000_000
"""Most parameters ``dense_layers`` writes out at once."""


class MaskedLayer(nn.Module):
    """``act(B act(a x[column]))``: one in-weight per live neuron, a sparse matrix of out-weights."""

    column: Tensor
    in_weight: Tensor
    out_index: Tensor
    out_weight: Tensor

    def __init__(self, layer: Layer, kept: TicketLayer, seed: int, number: int) -> None:
        super().__init__()
        self.layer, self.kept = layer, kept
        rows = layer.matrix.shape[0] * kept.copies
        carried = kept.is_carried(layer)
        wide = kept.carried * (layer.matrix.shape[1] - layer.bias)
        # Column of the hidden vector each edge reads: carried copies first, then live neurons.
        pool = kept.pool_of_edges(layer.matrix.shape[1])
        own = ~carried
        names = pool[own] * (int(kept.sizes.max(initial=1)) + 1) + kept.neuron[own]
        _, first, place = np.unique(names, return_index=True, return_inverse=True)
        source = np.empty(len(pool), np.int64)
        source[own] = wide + place
        source[carried] = kept.column[carried] * kept.carried + kept.neuron[carried]
        self.register_buffer("column", torch.from_numpy(kept.column[own][first]))
        drawn = kept.in_weights(seed, number, layer)[torch.from_numpy(own)]
        self.register_buffer("in_weight", drawn[torch.from_numpy(first)])
        order = np.lexsort((source, kept.output))
        self.register_buffer(
            "out_index", torch.from_numpy(np.stack([kept.output[order], source[order]]))
        )
        self.register_buffer(
            "out_weight", kept.out_weights(seed, number, layer)[torch.from_numpy(order)]
        )
        self.shape = (rows, wide + len(first))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, ...) -> (batch, *outputs), or (batch, rows) where rows are copies."""
        layer = self.layer
        columns = self._columns(x)
        hidden = columns[..., self.column] * self.in_weight.to(x.dtype)
        hidden = F.leaky_relu(hidden, layer.inner_slope)
        if self.kept.carried:
            hidden = torch.cat([x.reshape(x.shape[0], 1, -1), hidden], dim=2)
        batch, positions, width = hidden.shape
        matrix = torch.sparse_coo_tensor(
            self.out_index, self.out_weight.to(x.dtype), self.shape, check_invariants=False
        )
        y = torch.sparse.mm(matrix, hidden.reshape(batch * positions, width).T)
        y = layer.activate(y.T.reshape(batch, positions, self.shape[0]))
        return y[:, 0] if self.kept.copies > 1 else layer.geometry.assemble(y)

    def _columns(self, x: Tensor) -> Tensor:
        if self.kept.carried:  # the only intermediate neurons stand on the constant
            width = self.layer.matrix.shape[1]
            return torch.ones(x.shape[0], 1, width, dtype=x.dtype, device=x.device)
        return self.layer.columns(x)


class MaskedNetwork(nn.Sequential):
    """The masked random network of a ticket; run it in float32 or float64 by the input's dtype."""

    def __init__(self, ticket: Ticket) -> None:
        super().__init__(
            *(
                MaskedLayer(layer, kept, ticket.seed, number)
                for number, (layer, kept) in enumerate(
                    zip(ticket.target.layers, ticket.layers, strict=True)
                )
            )
        )

    def run(self, x: Tensor, budget: int = 40_000_000) -> Tensor:
        """Forward in chunks whose hidden vectors stay below ``budget`` elements."""
        widest = max(part.shape[1] for part in self.parts())
        step = max(1, budget // max(widest, 1))
        with torch.no_grad():
            return torch.cat([self(chunk) for chunk in x.split(step)])

    def parts(self) -> Iterator[MaskedLayer]:
        """The layers, typed."""
        for part in self:
            assert isinstance(part, MaskedLayer)
            yield part


@dataclass(frozen=True)
class DenseLayer:
    """One target layer's share of the whole random network, and its masks.

    Attributes:
        in_weight, in_mask: (neurons, columns). out_weight, out_mask: (outputs, neurons).
    """

    in_weight: Tensor
    in_mask: Tensor
    out_weight: Tensor
    out_mask: Tensor


def dense_layers(ticket: Ticket) -> list[DenseLayer]:
    """Every weight of the random network, kept or not, with the ticket's masks (depth 2L only)."""
    if any(part.carried or part.copies > 1 for part in ticket.layers):
        raise UsageError("only the depth-2L networks are written out densely", field="ticket")
    size = ticket.size().random
    if size > DENSE_LIMIT:
        raise UsageError(
            f"the random network has {size:,} parameters, more than {DENSE_LIMIT:,}",
            field="ticket",
            fix="MaskedNetwork(ticket) keeps only the surviving ones",
        )
    return [
        _dense(layer, kept, ticket.seed, number)
        for number, (layer, kept) in enumerate(
            zip(ticket.target.layers, ticket.layers, strict=True)
        )
    ]


def _dense(layer: Layer, kept: TicketLayer, seed: int, number: int) -> DenseLayer:
    outputs, columns = layer.matrix.shape
    pool = torch.repeat_interleave(torch.arange(len(kept.sizes)), torch.from_numpy(kept.sizes))
    begin = np.concatenate([[0], np.cumsum(kept.sizes)])
    neuron = torch.arange(len(pool)) - torch.from_numpy(begin)[pool]
    in_weight = kept.law.values(
        seed, number, ROLE_IN, pool[:, None], neuron[:, None], torch.arange(columns)
    )
    out_weight = kept.law.values(
        seed, number, ROLE_OUT, pool, neuron, torch.arange(outputs)[:, None]
    )
    row = torch.from_numpy(begin[kept.pool_of_edges(columns)] + kept.neuron)
    in_mask = torch.zeros_like(in_weight, dtype=torch.bool)
    out_mask = torch.zeros_like(out_weight, dtype=torch.bool)
    in_mask[row, torch.from_numpy(kept.column)] = True
    out_mask[torch.from_numpy(kept.output), row] = True
    return DenseLayer(in_weight, in_mask, out_weight, out_mask)
