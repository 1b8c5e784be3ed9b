"""Structural units of a model: heads, key-value groups, FFN channels, residual width, layers.

A ``Group`` is a set of like units of which any may go, and it says declaratively which
slices of which parameters each unit owns. Masks, surgery, scores and costs all read that one
description, so a new family needs a row in ``families.py`` and nothing here.

Two kinds of numbering occur. A unit's *number* is its place in the model as it is now;
its *original* numbers are those of the finest units (query heads, channels, layers) it
had in the model before anything was ever pruned. Masks speak in original numbers only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from secateur.errors import UsageError

Kind = Literal["ffn", "head", "kv_group", "stem", "layer", "channel"]
Gqa = Literal["groups", "even", "duplicate"]
"""How heads go where several share keys and values: whole groups with their keys and values;
the same number in every group; any (then each survivor gets its own copy of them)."""
Role = Literal["writes", "reads", "norm", "embed", "per_unit"]

KINDS: tuple[Kind, ...] = ("head", "ffn", "kv_group", "stem", "layer")


def stack_of(path: str) -> str:
    """Which stack the blocks of a list (or one of them) belong to: ``encoder`` or ``decoder``."""
    return "encoder" if "encoder" in path.split(".") else "decoder"


@dataclass(frozen=True, eq=False)
class Slice:
    """The part of one parameter that belongs to a group's units.

    Attributes:
        parameter: name in ``model.named_parameters()``.
        dim: dimension of the tensor as it is stored (Conv1D stores its inputs first).
        role: ``writes`` makes the unit's activations (rows of q, k, v, gate, up, and biases);
            ``reads`` takes them in (columns of o, down); ``norm`` and ``embed`` belong to the
            residual width; ``per_unit`` holds one number a unit (a T5 bias column).
        index: (n_units, r) positions along ``dim`` of each unit.
    """

    parameter: str
    dim: int
    role: Role
    index: Tensor


@dataclass(frozen=True, eq=False)
class Group:
    """Like units, any of which may go.

    Attributes:
        key: what a mask calls it: the module's path, ``stem``, or the path of the list of
            blocks. Groups of heads and of key-value groups of one attention share their key.
        kind: what a unit is.
        slices: which parts of which parameters each unit owns.
        original: (n_units, r) original numbers of the finest units in each.
        total: how many finest units the original model had.
        block: number of the block in its stack; None for the stem and for layers.
        stack: ``decoder`` or ``encoder``.
        attention: ``self`` or ``cross`` for heads, ``""`` otherwise.
        even: the units fall into so many equal runs that must lose the same number each.
        heads: query heads in a unit (0 where units are no heads).
        head_dim: width of a head (0 where units are no heads).
        weights: matrix weights of one unit: it costs twice that many FLOPs a token.
        parameters: parameters of one unit, biases and norms included.
    """

    key: str
    kind: Kind
    slices: tuple[Slice, ...]
    original: Tensor
    total: int
    block: int | None = None
    stack: str = "decoder"
    attention: str = ""
    even: int = 1
    heads: int = 0
    head_dim: int = 0
    weights: int = 0
    parameters: int = 0

    @property
    def n_units(self) -> int:
        """Units there are now."""
        return len(self.original)

    def flops(self, context: float = 0.0) -> float:
        """Floating-point operations of one unit for one token that attends to ``context`` others."""
        return 2.0 * self.weights + 4.0 * self.heads * self.head_dim * context

    def reads(self) -> tuple[Slice, ...]:
        """The slices that take the units' activations in (o, down): zero them and a unit is off."""
        return tuple(s for s in self.slices if s.role == "reads")

    def writes(self) -> tuple[Slice, ...]:
        """The slices that make the units' activations."""
        return tuple(s for s in self.slices if s.role == "writes")

    def gone(self, units: Tensor) -> Tensor:
        """(total,) bool over original numbers: what goes with ``units`` (bool (n_units,))."""
        mask = torch.zeros(self.total, dtype=torch.bool)
        mask[self.original[units.cpu()].reshape(-1)] = True
        return mask


@dataclass(eq=False)
class Units:
    """All groups of a model, by kind; ``units_of`` makes it.

    Attributes:
        groups: every group asked for, in the model's order.
        skipped: what could not be cut, with the reason.
    """

    groups: list[Group]
    skipped: dict[str, str] = field(default_factory=dict)

    def __iter__(self) -> Any:
        return iter(self.groups)

    def __getitem__(self, key: str) -> Group:
        """The group of that key."""
        for group in self.groups:
            if group.key == key:
                return group
        raise UsageError(
            "the model has no such group",
            field="group",
            value=key,
            fix=f"e.g. {self.groups[0].key}" if self.groups else None,
        )

    def of(self, *kinds: str) -> list[Group]:
        """The groups of these kinds."""
        return [g for g in self.groups if g.kind in kinds]

    def in_block(self, block: int, stack: str = "decoder") -> list[Group]:
        """The groups inside one block: attention first."""
        return [g for g in self.groups if g.block == block and g.stack == stack]


def unit_values(group: Group, slices: Iterable[Slice], values: Mapping[str, Tensor]) -> Tensor:
    """Sum of element-wise ``values`` over each unit's part of ``slices``: (n_units,) float32.

    Args:
        values: parameter name -> tensor of the parameter's shape (|w g|, w^2, ...); parameters
            that are missing count nothing.
    """
    total = torch.zeros(group.n_units)
    for part in slices:
        value = values.get(part.parameter)
        if value is not None:
            total += along(value, part).cpu()
    return total


def along(value: Tensor, part: Slice) -> Tensor:
    """``value`` summed over all but ``part.dim``, then over each unit: (n_units,) float32."""
    others = [d for d in range(value.dim()) if d != part.dim]
    line = value.float().sum(dim=others) if others else value.float()
    return line[part.index.to(line.device)].sum(1)


def parameters_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by every name they have (a tied one under each)."""
    return dict(model.named_parameters(remove_duplicate=False))


def units_of(
    model: nn.Module, kinds: Iterable[str] = ("head", "ffn"), gqa: Gqa = "groups"
) -> Units:
    """The units of ``model`` that may go.

    Args:
        kinds: of ``head``, ``ffn``, ``kv_group``, ``stem``, ``layer``. Where several heads
            share keys and values, ``head`` means what ``gqa`` says; ``kv_group`` is ``head``
            with ``gqa="groups"``.
        gqa: ``groups``, ``even`` or ``duplicate``.

    Raises:
        UsageError: an unknown kind; a kind this model cannot lose, with the reason.
    """
    from secateur.models.unit_search import find_units

    return find_units(model, tuple(kinds), gqa)
