"""Which unit goes next: the least salient of its type in every layer, then the cheapest type.

Candidates of three types compete (EfficientLLM, arXiv:2502.06663, figure 2: attention heads,
FFN channels, channels of the residual stream). With widths kept uniform, a candidate is the
least salient unit of one type *in every layer* at once; in ``global`` mode it is a single unit
of any layer. The candidate with the lowest price goes, where the price is

    param   sum of saliency / parameters that go with it   (saliency per parameter, the default)
    raw     sum of saliency
    cost    sum of saliency / its cost: FLOPs of a token, or figures the caller measured

Sums of a head in all layers, of a channel in all layers and of a residual channel span two
orders of magnitude in parameters, so ``raw`` mostly compares sizes; the paper does not say
which it uses, but its figure shows the three types' prices equal, which only ``param`` explains.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np

from secateur.errors import UsageError
from secateur.models.units import Group
from secateur.training.unit_ledger import UnitLedger

Normalize = Literal["param", "raw", "cost"]
LayerMode = Literal["uniform", "global"]
TYPES: tuple[str, ...] = ("head", "ffn", "stem")


def type_of(group: Group) -> str:
    """``head``, ``ffn`` or ``stem``; a key-value group counts as heads."""
    return "head" if group.kind == "kv_group" else group.kind


@dataclass(frozen=True)
class Rules:
    """What a choice has to keep to.

    Attributes:
        normalize: see the module.
        layer_mode: ``uniform`` keeps the same widths in every layer.
        min_heads, min_ffn, min_width: query heads and channels that stay in every layer, and
            channels of the residual stream.
        round_to: multiple that widths of ``ffn`` and ``stem`` end on.
        costs: type -> cost of one of its units, for ``normalize: cost`` (seconds, joules); empty:
            FLOPs of a token.
    """

    normalize: Normalize = "param"
    layer_mode: LayerMode = "uniform"
    min_heads: int = 1
    min_ffn: int = 1
    min_width: int = 8
    round_to: int = 1
    costs: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, kind in (("normalize", Normalize), ("layer_mode", LayerMode)):
            if getattr(self, name) not in get_args(kind):
                raise UsageError(
                    f"one of {', '.join(get_args(kind))}", field=name, value=getattr(self, name)
                )
        for name in ("min_heads", "min_ffn", "min_width", "round_to"):
            if getattr(self, name) < 1:
                raise UsageError("must be at least 1", field=name, value=getattr(self, name))
        for kind_, cost in self.costs.items():
            if kind_ not in TYPES or not 0 < cost < math.inf:
                raise UsageError(
                    f"a positive cost for each of {', '.join(TYPES)}", field="costs", value=kind_
                )

    def least(self, group: Group) -> int:
        """Units of ``group`` that must stay, a multiple of its even runs."""
        finest = group.original.shape[1]
        wanted = {"head": self.min_heads, "ffn": self.min_ffn, "stem": self.min_width}
        units = -(-wanted[type_of(group)] // finest)
        if type_of(group) != "head" and self.round_to > 1:
            units = -(-units // self.round_to) * self.round_to
        return min(group.n_units, max(group.even, -(-units // group.even) * group.even))


@dataclass(frozen=True)
class Choice:
    """Units that go together.

    Attributes:
        type: ``head``, ``ffn`` or ``stem``.
        units: group key -> unit numbers, as the group counts them now.
        saliency: sum over them.
        price: what was compared.
        rivals: the price of the best candidate of each type at that moment.
    """

    type: str
    units: dict[str, list[int]]
    saliency: float
    price: float
    rivals: dict[str, float]


class Chooser:
    """Takes units one after the other; scores stay, costs follow.

    Args:
        groups: of the model as it is.
        scores: group key -> (n_units,) saliencies, not negative.
        gone: group key -> bool (n_units,), units that are gone already though still listed.
        ledger: sizes of the model as it is without those; taken over.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        scores: Mapping[str, np.ndarray],
        gone: Mapping[str, np.ndarray],
        ledger: UnitLedger,
        rules: Rules,
    ) -> None:
        self.rules, self.ledger = rules, ledger
        self.groups = {g.key: g for g in groups}
        self.types: dict[str, list[Group]] = {}
        for group in groups:
            self.types.setdefault(type_of(group), []).append(group)
        self.left = {k: g.n_units - int(gone[k].sum()) for k, g in self.groups.items()}
        self.scores = {
            k: np.where(gone[k], np.inf, np.asarray(scores[k], dtype=np.float64))
            for k in self.groups
        }
        self._ready: dict[str, list[tuple[float, dict[str, list[int]]]]] = {}
        self._settling = False

    # -- candidates ----------------------------------------------------------------------------

    def _lowest(self, group: Group) -> list[int] | None:
        """The least salient unit of each even run, lowest number first; None if it must stay."""
        if self.left[group.key] - group.even < self.rules.least(group):
            return None
        if self._settling and not self._above(group.key, 0):
            return None
        runs = self.scores[group.key].reshape(group.even, -1)
        width = runs.shape[1]
        return [int(i) + run * width for run, i in enumerate(runs.argmin(1))]

    def _candidates(self, kind: str) -> list[tuple[float, dict[str, list[int]]]]:
        """(saliency, units) of a type: one for all layers together, or one a layer."""
        if kind not in self._ready:
            found = [(g, self._lowest(g)) for g in self.types[kind]]
            own = [
                (float(self.scores[g.key][units].sum()), {g.key: units})
                for g, units in found
                if units is not None
            ]
            if self.rules.layer_mode == "uniform":
                whole = len(own) == len(found)
                joint = {k: units for _, part in own for k, units in part.items()}
                # While widths settle on their multiples, layers may need different numbers.
                if whole or not self._settling:
                    own = [(sum(s for s, _ in own), joint)] if whole else []
            self._ready[kind] = own
        return self._ready[kind]

    def _price(self, kind: str, saliency: float, moves: Mapping[str, int]) -> float:
        if self.rules.normalize == "raw":
            return saliency
        if self.rules.normalize == "cost" and self.rules.costs:
            return saliency / (self.rules.costs[kind] * sum(moves.values()))
        before, after = self.ledger.now(), self.ledger.after(moves)
        if self.rules.normalize == "cost":
            return saliency / max(1.0, before.flops - after.flops)
        return saliency / max(1, before.parameters - after.parameters)

    def choose(self, budget: int) -> Choice | None:
        """Take the cheapest candidate that does not go below ``budget`` parameters.

        If every one does, the one that goes below by least, so that the budget is met. Ties go
        to the type named first, then to the layer and the unit of the lowest number.

        Once rounding the widths down meets the budget, only what is above the multiples goes.

        Returns:
            What went; None when nothing may go any more.
        """
        if not self._settling and self.rounded() <= budget:
            self._settling, self._ready = True, {}
        found: list[tuple[float, int, Choice]] = []
        rivals: dict[str, float] = {}
        for kind in self.types:
            best: tuple[float, int, Choice] | None = None
            for saliency, units in self._candidates(kind):
                moves = {k: len(u) for k, u in units.items()}
                price = self._price(kind, saliency, moves)
                rivals[kind] = min(price, rivals.get(kind, math.inf))
                below = max(0, budget - self.rounded(moves))
                one = (price, below, Choice(kind, units, saliency, price, rivals))
                found.append(one)
                if best is None or price < best[0]:
                    best = one
        if not found:
            return None
        fitting = [f for f in found if f[1] == 0]
        if fitting:
            choice = min(fitting, key=lambda f: f[0])[2]
        else:
            choice = min(found, key=lambda f: (f[1], f[0]))[2]
        self._take(choice)
        return choice

    def _take(self, choice: Choice) -> None:
        self.ledger.take({k: len(u) for k, u in choice.units.items()})
        for key, units in choice.units.items():
            self.scores[key][units] = np.inf
            self.left[key] -= len(units)
        self._ready.pop(choice.type)

    # -- widths --------------------------------------------------------------------------------

    def _above(self, key: str, taken: int) -> int:
        """Units of a width above the multiple it ends on, once ``taken`` are gone."""
        group = self.groups[key]
        left = self.left[key] - taken
        if type_of(group) == "head" or self.rules.round_to == 1:
            return 0
        return max(0, min(left % self.rules.round_to, left - self.rules.least(group)))

    def rounded(self, taken: Mapping[str, int] | None = None) -> int:
        """Parameters once ``taken`` are gone and widths are rounded down to their multiple."""
        moves = dict(taken or {})
        if self.rules.round_to > 1:
            for key in self.groups:
                moves[key] = moves.get(key, 0) + self._above(key, moves.get(key, 0))
        return self.ledger.after(moves).parameters

    def settled(self, budget: int) -> bool:
        """The budget is met and widths are on their multiples."""
        now = self.ledger.now().parameters
        return now <= budget and self.rounded() == now


def smallest(
    groups: Sequence[Group],
    ledger: UnitLedger,
    rules: Rules,
) -> int:
    """Parameters when every group is down to what must stay.

    With uniform widths a type stops where its narrowest layer does; the others only come down
    to their multiples from there.
    """
    room = {g.key: g.n_units - rules.least(g) for g in groups}
    if rules.layer_mode == "global":
        return ledger.after(room).parameters
    moves = {}
    for group in groups:
        alike = [g for g in groups if type_of(g) == type_of(group)]
        taken = group.even * min(room[g.key] // g.even for g in alike)
        if type_of(group) != "head" and rules.round_to > 1:
            taken += min((group.n_units - taken) % rules.round_to, room[group.key] - taken)
        moves[group.key] = taken
    return ledger.after(moves).parameters
