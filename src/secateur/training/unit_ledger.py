"""What a model weighs while units go: parameters and FLOPs from its shapes alone, exactly.

A parameter's size is the product of its dimensions, and each dimension belongs to one group
of units. So the cost of any removal follows from integers, also where removals meet in one
matrix (a channel of an MLP weighs less once the residual width has shrunk).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn

from secateur.models.unit_search import layout_of
from secateur.models.units import Group, parameters_of

Moves = Mapping[str, int]
"""Group key -> how many of its units go."""


@dataclass(frozen=True)
class Weight:
    """Parameters, and FLOPs of one token that attends to ``context`` others."""

    parameters: int
    flops: float


class UnitLedger:
    """The sizes of a model's parameters, and what each unit of its groups takes from them.

    Args:
        model: looked at as it is.
        groups: units that may go.
        context: tokens a token attends to on average, for FLOPs.
    """

    def __init__(self, model: nn.Module, groups: Sequence[Group], context: float = 0.0) -> None:
        named = parameters_of(model)
        rows: dict[int, int] = {}
        sizes: list[tuple[int, int, int]] = []
        for parameter in named.values():
            if id(parameter) not in rows:
                rows[id(parameter)] = len(sizes)
                shape = tuple(parameter.shape)
                first, second = (*shape, 1, 1)[:2]
                sizes.append((first, second, int(np.prod(shape[2:], initial=1))))
        self.sizes = np.array(sizes, dtype=np.int64)
        layout = layout_of(model)
        # A tied embedding is multiplied with once, by the head; looking a row up costs nothing.
        linear = {id(m._parameters["weight"]) for _, m in layout.linears.values()}
        self.multiplied = np.zeros(len(sizes), dtype=bool)
        for key, row in rows.items():
            self.multiplied[row] = key in linear
        self.context = context
        self.heads = sum(a.heads * a.head_dim for a in layout.attentions)
        self._attending = {g.key: g.heads * g.head_dim for g in groups}
        self._places: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
        for group in groups:
            found = {
                (rows[id(named[s.parameter])], s.dim, int(s.index[0, 0])): s.index.shape[1]
                for s in group.slices
            }
            self._places[group.key] = (
                np.array([row for row, _, _ in found], dtype=np.int64),
                np.array([dim for _, dim, _ in found], dtype=np.int64),
                np.array(list(found.values()), dtype=np.int64),
            )

    def _after(self, moves: Moves) -> tuple[np.ndarray, int]:
        sizes, heads = self.sizes.copy(), self.heads
        for key, count in moves.items():
            row, dim, width = self._places[key]
            np.subtract.at(sizes, (row, dim), width * count)
            heads -= self._attending[key] * count
        return sizes, heads

    def _weigh(self, sizes: np.ndarray, heads: int) -> Weight:
        each = sizes.prod(1)
        flops = 2.0 * float(each[self.multiplied].sum()) + 4.0 * heads * self.context
        return Weight(int(each.sum()), flops)

    def now(self) -> Weight:
        """What is there."""
        return self._weigh(self.sizes, self.heads)

    def after(self, moves: Moves) -> Weight:
        """What would be left."""
        return self._weigh(*self._after(moves))

    def take(self, moves: Moves) -> None:
        """Let the units of ``moves`` go."""
        self.sizes, self.heads = self._after(moves)
