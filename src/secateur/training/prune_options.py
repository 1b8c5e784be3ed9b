"""How a model is made smaller while it trains, which units that lets go, and which budgets are refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn

from secateur.errors import UsageError
from secateur.masks.structured import structure_of
from secateur.models.units import Gqa, Group, units_of
from secateur.solvers.column_removal import Solver
from secateur.training.group_saliency import Saliency
from secateur.training.prune_schedule import PruneSchedule
from secateur.training.unit_choice import TYPES, Rules, smallest
from secateur.training.unit_ledger import UnitLedger


@dataclass(frozen=True)
class PruneOptions:
    """How the model is made smaller while it trains.

    Attributes:
        budget: parameters to end with, at most.
        schedule: when units go.
        rules: which may go, and how they are compared.
        kinds: of ``head``, ``ffn`` and ``stem``.
        gqa: heads that share keys and values go as ``groups`` or ``even``, one from each group.
        saliency, memory: see ``group_saliency``.
        second_order: let survivors make up for what goes.
        damping, hessian_tokens, solver: of that; see ``compensation``.
        compact_every: events after which what is gone is physically cut out; until then it is
            zero. 1 cuts at every event, 0 only when the budget is met.
        context: tokens in a window, for FLOPs.
    """

    budget: int
    schedule: PruneSchedule
    rules: Rules = field(default_factory=Rules)
    kinds: tuple[str, ...] = TYPES
    gqa: Gqa = "groups"
    saliency: Saliency = "taylor1"
    memory: float | None = 0.9
    second_order: bool = True
    damping: float = 0.01
    hessian_tokens: int = 2048
    solver: Solver = "auto"
    compact_every: int = 1
    context: int = 512

    def __post_init__(self) -> None:
        unknown = [k for k in self.kinds if k not in TYPES]
        if unknown or not self.kinds:
            raise UsageError(
                "such units do not go while a model trains",
                field="kinds",
                value=unknown[0] if unknown else [],
                fix=f"some of {', '.join(TYPES)}",
            )
        if self.gqa not in ("groups", "even"):
            raise UsageError(
                "copied keys and values would have to be trained apart",
                field="gqa",
                value=self.gqa,
                fix="groups, or even",
            )
        for name, least in (("hessian_tokens", 1), ("compact_every", 0)):
            if getattr(self, name) < least:
                raise UsageError(f"must be at least {least}", field=name, value=getattr(self, name))
        costs = self.rules.costs
        missing = [k for k in self.kinds if costs and k not in costs]
        if missing or (costs and self.rules.normalize != "cost"):
            raise UsageError(
                "a cost for each kind that may go, and normalize: cost",
                field="costs",
                value=dict(costs),
                fix=f"add {missing[0]}" if missing else "normalize: cost",
            )
        if not self.damping > 0:
            raise UsageError("must be positive", field="damping", value=self.damping)


def find_groups(model: nn.Module, options: PruneOptions) -> list[Group]:
    """The units that may go; heads are left out once a layer is down to its last group."""
    try:
        return units_of(model, options.kinds, options.gqa).groups
    except UsageError:
        rest = [k for k in options.kinds if k != "head"]
        if structure_of(model) is None or not rest:
            raise
        return units_of(model, rest, options.gqa).groups


def refuse_unreachable(groups: Sequence[Group], ledger: UnitLedger, options: PruneOptions) -> None:
    """Refuse a budget that the units cannot give.

    Raises:
        UsageError: below the smallest shape, or not below the model as it is.
    """
    now, least = ledger.now().parameters, smallest(groups, ledger, options.rules)
    if options.budget < least:
        raise UsageError(
            f"the smallest shape the rules allow has {least:,} parameters",
            field="keep_params",
            value=options.budget,
            fix=f"keep at least {least / now:.3f} of the {now:,}, or lower min_heads, min_ffn, "
            "min_width or round_to, or let more kinds go",
        )
    if options.budget > now:
        raise UsageError(
            f"the model has {now:,} parameters already",
            field="keep_params",
            value=options.budget,
            fix="a budget below that",
        )
