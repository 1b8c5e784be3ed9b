"""Floating-point operations and parameters of a network as functions of its widths.

Every dimension of a layer is ``fixed`` entries plus so many for each unit of a group, so costs are
polynomials in the widths: exact for whole numbers, differentiable for tensors (what S2HPruner's
resource term needs, arXiv:2410.07046).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

Widths = Mapping[str, Any]
"""Group key -> units kept, a number or a scalar tensor; groups that are missing keep all."""


@dataclass(frozen=True)
class Extent:
    """Entries along a dimension.

    Attributes:
        fixed: entries that never go.
        units: group key -> (entries a unit owns here, units there are now).
    """

    fixed: int
    units: Mapping[str, tuple[float, int]]

    def at(self, widths: Widths) -> Any:
        """How many there are at these widths."""
        total: Any = self.fixed
        for key, (each, count) in self.units.items():
            total = total + each * widths.get(key, count)
        return total


@dataclass(frozen=True)
class LayerCost:
    """What one convolution, linear layer or product of activations costs.

    Attributes:
        name: the module.
        kind: ``conv``, ``depthwise`` (each group of a convolution counts alone), ``linear``,
            ``product`` (of attention).
        factor: operations for one entry of every extent.
        extents: their product counts.
    """

    name: str
    kind: str
    factor: float
    extents: tuple[Extent, ...]

    def flops(self, widths: Widths | None = None) -> Any:
        """Operations at these widths, a multiply and an add counted as two."""
        return self.factor * prod((e.at(widths or {}) for e in self.extents), start=1)


@dataclass(frozen=True)
class TensorSize:
    """Elements of a parameter: fixed dimensions and those that units own a part of."""

    name: str
    factor: int
    extents: tuple[Extent, ...]

    def elements(self, widths: Widths | None = None) -> Any:
        """How many at these widths."""
        return self.factor * prod((e.at(widths or {}) for e in self.extents), start=1)
