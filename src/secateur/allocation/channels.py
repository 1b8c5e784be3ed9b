"""How many channels each group of a vision network keeps, to just reach a budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.errors import UsageError
from secateur.models.channel_graph import ChannelGroup, ChannelGroups


@dataclass(frozen=True)
class Budget:
    """What must not be exceeded, and what widths cost of it.

    Attributes:
        kind: ``flops``, ``parameters`` or ``channels``.
        share: that is to go, in [0, 1).
        at_least, round_to: units that stay in every group, and of what they are a multiple.
    """

    kind: str
    share: float
    at_least: int = 1
    round_to: int = 1

    def cost(self, groups: ChannelGroups) -> Callable[[Mapping[str, int]], float]:
        """Cost of widths; groups that are missing keep all they have."""
        if self.kind == "flops":
            return lambda widths: float(groups.flops(widths))
        if self.kind == "parameters":
            return lambda widths: float(groups.parameters(widths))
        return lambda widths: float(sum(widths.get(g.key, g.n_units) for g in groups if g.prunable))

    def allowed(self, group: ChannelGroup, width: int) -> int:
        """The nearest width from ``width`` upwards that a group may have."""
        width = -(-max(width, self.at_least) // self.round_to) * self.round_to
        return min(width, group.n_units)


def check_reachable(groups: ChannelGroups, budget: Budget) -> None:
    """Refuse a budget that even the narrowest network exceeds.

    Raises:
        UsageError: saying what can be reached.
    """
    narrowest = {g.key: budget.allowed(g, budget.at_least) for g in groups.prunable}
    _limit(budget.cost(groups), budget, narrowest, groups)


def uniform_widths(groups: ChannelGroups, budget: Budget) -> dict[str, int]:
    """The same share of every group that can lose any; the most that still fits the budget.

    Raises:
        UsageError: even the narrowest network exceeds it, saying what can be reached.
    """
    chosen, cost = groups.prunable, budget.cost(groups)

    def at(gone: float) -> dict[str, int]:
        return {g.key: budget.allowed(g, g.n_units - round(gone * g.n_units)) for g in chosen}

    steps = sorted({k / g.n_units for g in chosen for k in range(g.n_units + 1)})
    limit = _limit(cost, budget, at(1.0), groups)
    # Shares between two steps round to the same widths, so a search over the steps is exact.
    found = _first(lambda n: cost(at(steps[n])) <= limit, len(steps))
    narrow, wide = at(steps[found]), at(steps[max(0, found - 1)])
    # Of the groups that lose another unit in that step, only so many do as are needed.
    last = [key for key in narrow if narrow[key] != wide[key]]

    def with_first(count: int) -> dict[str, int]:
        return wide | {key: narrow[key] for key in last[:count]}

    return with_first(_first(lambda n: cost(with_first(n)) <= limit, len(last) + 1))


def ranked_widths(
    groups: ChannelGroups, budget: Budget, scores: Mapping[str, Tensor]
) -> dict[str, int]:
    """The lowest units of all groups go, whatever group they are in.

    Args:
        scores: group key -> (n_units,), comparable between groups.

    Raises:
        UsageError: as of ``uniform_widths``.
    """
    chosen, cost = groups.prunable, budget.cost(groups)
    floor = {g.key: budget.allowed(g, budget.at_least) for g in chosen}
    limit = _limit(cost, budget, floor, groups)
    line = torch.cat([scores[g.key].double().cpu() for g in chosen])
    owner = torch.cat([torch.full((g.n_units,), i) for i, g in enumerate(chosen)])
    order = owner[torch.sort(line, stable=True).indices]

    def at(count: int) -> dict[str, int]:
        gone = torch.bincount(order[:count], minlength=len(chosen)).tolist()
        return {g.key: budget.allowed(g, g.n_units - n) for g, n in zip(chosen, gone, strict=True)}

    return at(_first(lambda n: cost(at(n)) <= limit, len(order) + 1))


def _limit(
    cost: Callable[[Mapping[str, int]], float],
    budget: Budget,
    narrowest: Mapping[str, int],
    groups: ChannelGroups,
) -> float:
    """What may be spent.

    Raises:
        UsageError: the narrowest network costs more.
    """
    whole, least = cost({}), cost(narrowest)
    limit = (1 - budget.share) * whole * (1 + 1e-12)
    if least > limit:
        reason = "" if groups.prunable else ": no group of channels can lose any"
        fixed = [f"{g.key} {g.reason}" for g in groups.fixed[:3]]
        raise UsageError(
            f"at most {1 - least / whole:.1%} of the {budget.kind} can go here{reason}",
            field="target",
            value=budget.share,
            fix="a smaller target, or fewer protected groups"
            + (f" ({'; '.join(fixed)})" if fixed and not groups.prunable else ""),
        )
    return limit


def _first(holds: Callable[[int], bool], count: int) -> int:
    """The first of ``count`` numbers for which ``holds``; it holds for the last, and goes on."""
    low, high = 0, count - 1
    while low < high:
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle + 1
    return low


def lowest_units(scores: Mapping[str, Tensor], widths: Mapping[str, int]) -> dict[str, Tensor]:
    """Which units go so that each group keeps its width: key -> bool (n_units,); ties to the first."""
    gone = {}
    for key, width in widths.items():
        score = scores[key].double().cpu()
        mask = torch.zeros(len(score), dtype=torch.bool)
        mask[torch.sort(score, stable=True).indices[: len(score) - width]] = True
        gone[key] = mask
    return gone
