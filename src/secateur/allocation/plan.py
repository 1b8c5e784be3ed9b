"""A plan: exactly how many weights each matrix gives.

Made by an allocator from ratios, exact to the budget by construction, and serialisable:
``plan.json`` can be read, edited by hand, reused and compared.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from secateur.errors import UsageError
from secateur.masks.target import Cut, Scope, Target, spread


@dataclass(frozen=True)
class Plan:
    """``counts[name]`` weights go from matrix ``name`` (or the N:M pattern holds everywhere).

    Attributes:
        target: what was asked of the whole.
        shapes: (d_out, d_in) of each matrix.
        counts: weights removed from each.
        provenance: allocator, its options, and what it was told.
    """

    target: Target
    shapes: dict[str, tuple[int, int]]
    counts: dict[str, int]
    provenance: dict[str, Any] = field(default_factory=dict)

    def cut(self, name: str, scope: Scope) -> Cut:
        """The cut of one matrix under ``scope``; of a uniform plan it knows the sparsity asked."""
        if self.target.is_pattern:
            return Cut.of(self.shapes[name], self.target, scope, name)
        kind = Scope("layer") if scope.kind == "global" else scope
        asked = self.target.sparsity if self.provenance.get("allocator") == "uniform" else None
        return Cut(self.shapes[name], self.counts[name], kind, asked=asked)

    @property
    def elements(self) -> int:
        """Weights the plan speaks of."""
        return sum(rows * columns for rows, columns in self.shapes.values())

    @property
    def removed(self) -> int:
        """Weights it removes."""
        return sum(self.counts.values())

    def record(self) -> dict[str, Any]:
        """For JSON: ratios beside counts, so a person can read it."""
        return {
            "target": str(self.target),
            "removed": self.removed,
            "elements": self.elements,
            "provenance": self.provenance,
            "modules": {
                name: {
                    "shape": list(shape),
                    "removed": self.counts[name],
                    "sparsity": round(self.counts[name] / max(1, shape[0] * shape[1]), 6),
                }
                for name, shape in self.shapes.items()
            },
        }

    @classmethod
    def load(cls, path: Path) -> Plan:
        """Read a saved plan; ``removed`` is what counts.

        Raises:
            UsageError: not a plan, or a count outside its matrix.
        """
        try:
            record = json.loads(path.read_text())
            modules = record["modules"]
            shapes = {n: (int(m["shape"][0]), int(m["shape"][1])) for n, m in modules.items()}
            counts = {n: int(m["removed"]) for n, m in modules.items()}
            target = Target.parse(record["target"])
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            raise UsageError(
                f"not a plan: {error}",
                field="allocation",
                value=str(path),
                fix="see 'secateur plan'",
            ) from None
        for name, count in counts.items():
            size = shapes[name][0] * shapes[name][1]
            if not 0 <= count <= size:
                raise UsageError(
                    f"'{name}' has {size} weights, so {count} cannot be removed",
                    field="removed",
                    value=count,
                )
        return cls(target, shapes, counts, {"allocator": "file", "file": path.name})


def uniform(shapes: Mapping[str, tuple[int, int]], target: Target) -> Plan:
    """The same share of every matrix; the total is exact, each matrix to one weight."""
    names, sizes = list(shapes), [rows * columns for rows, columns in shapes.values()]
    if target.is_pattern:
        counts = [Cut.of(shapes[n], target, Scope("row"), n).count for n in names]
    else:
        counts = spread(target.count(sum(sizes)), sizes)
    return Plan(
        target,
        dict(shapes),
        dict(zip(names, counts, strict=True)),
        {"allocator": "uniform"},
    )
