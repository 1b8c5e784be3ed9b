"""Widths that a module keeps in an attribute and its code uses: ``x.split(self.width, 1)``.

They must follow a cut. Which attribute a number came from cannot be seen, only that the module
whose code is running has one of that value, so it is a guess: ``channel_check`` tries the cut
without it first, and believes it only if the network then computes the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

SIZES = "_secateur_sizes"
"""On a module some of whose attributes have followed a cut: their names."""


@dataclass(frozen=True, eq=False)
class Sized:
    """An attribute that counts positions.

    Attributes:
        module, attribute: whose; place: which entry of a list, None of a number.
        owned: the labels counted (while following), then how many are each unit's, (n_units,).
        sure: whether it follows cuts.
    """

    module: str
    attribute: str
    place: int | None
    owned: Tensor
    sure: bool = False


def attributes(module: nn.Module, value: int) -> list[str]:
    """Names of a module's own numbers of this value."""
    return [n for n, v in vars(module).items() if type(v) is int and v == value and n[0] != "_"]


def lists(module: nn.Module, values: Iterable[int]) -> list[str]:
    """Names of a module's lists of these numbers."""
    wanted = list(values)
    return [
        n
        for n, v in vars(module).items()
        if isinstance(v, list | tuple) and list(v) == wanted and n[0] != "_"
    ]


def follow_cut(model: nn.Module, sized: Iterable[Sized], gone: Tensor) -> None:
    """Make the attributes smaller by the units that are gone, (n_units,) bool."""
    for one in sized:
        module = model.get_submodule(one.module)
        if not one.sure or not hasattr(module, one.attribute):
            continue
        less = int(one.owned[gone].sum())
        value = getattr(module, one.attribute)
        if one.place is None:
            value -= less
        else:
            parts = list(value)
            parts[one.place] -= less
            value = type(value)(parts)
        setattr(module, one.attribute, value)
        names = module.__dict__.setdefault(SIZES, [])
        if one.attribute not in names:
            names.append(one.attribute)


def sizes_of(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Attributes that have followed cuts and what they are now, by module; for a record."""
    found = {}
    for name, module in model.named_modules():
        names = [n for n in module.__dict__.get(SIZES, ()) if hasattr(module, n)]
        if names:
            found[name] = {n: getattr(module, n) for n in names}
    return found


def set_sizes(model: nn.Module, record: dict[str, dict[str, Any]]) -> None:
    """What ``sizes_of`` told, in another copy of the network."""
    for name, values in record.items():
        module = model.get_submodule(name)
        for attribute, value in values.items():
            before = getattr(module, attribute, None)
            setattr(module, attribute, tuple(value) if isinstance(before, tuple) else value)
        module.__dict__[SIZES] = list(values)
