"""A plan: exactly how much each matrix, or each group of structures, gives.

Made by an allocator from ratios, exact to the budget by construction, and serialisable:
``plan.json`` can be read, edited by hand, reused, drawn and compared. In it ``removed``
(weights of a matrix), ``pattern`` (N:M of a matrix) and ``units`` (heads, channels) are what
counts; ``sparsity`` is there to be read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from secateur.errors import UsageError
from secateur.masks.target import Cut, Scope, Target, spread

MAKE = "write one with 'secateur allocate make MODEL --allocation NAME --out plan.json'"


@dataclass(frozen=True)
class UnitCut:
    """How many of a block's like structures go: ``removed`` of ``of``.

    Attributes:
        of: heads, key-value groups, channels ... there are.
        removed: how many go.
        weights: parameters that one of them takes along.
    """

    of: int
    removed: int
    weights: int


@dataclass(frozen=True)
class Plan:
    """``counts[name]`` weights go from matrix ``name``, or a pattern holds in it.

    Attributes:
        target: what was asked of the whole.
        shapes: (d_out, d_in) of each matrix.
        counts: weights removed from each.
        provenance: allocator, its options, and what it was told.
        patterns: (N, M) of each matrix: keep N of every M; where absent, the target's.
        units: structured pruning only: ``"BLOCK:KIND"`` (``model.layers.3:heads``) -> cut.
    """

    target: Target
    shapes: dict[str, tuple[int, int]]
    counts: dict[str, int]
    provenance: dict[str, Any] = field(default_factory=dict)
    patterns: dict[str, tuple[int, int]] = field(default_factory=dict)
    units: dict[str, UnitCut] = field(default_factory=dict)

    def cut(self, name: str, scope: Scope) -> Cut:
        """The cut of one matrix under ``scope``; of a uniform plan it knows the sparsity asked."""
        if self.target.is_pattern:
            return Cut.of(self.shapes[name], self.pattern(name), scope, name)
        kind = Scope("layer") if scope.kind == "global" else scope
        asked = self.target.sparsity if self.provenance.get("allocator") == "uniform" else None
        return Cut(self.shapes[name], self.counts[name], kind, asked=asked)

    def pattern(self, name: str) -> Target:
        """The N:M of one matrix, of a plan that has patterns."""
        if name not in self.patterns:
            return self.target
        keep, group = self.patterns[name]
        return Target(1 - keep / group, keep, group)

    @property
    def elements(self) -> int:
        """Weights the plan speaks of."""
        return sum(rows * columns for rows, columns in self.shapes.values())

    @property
    def removed(self) -> int:
        """Weights it removes."""
        return sum(self.counts.values())

    @property
    def ratios(self) -> dict[str, float]:
        """The share each matrix gives."""
        return {
            name: self.counts[name] / max(1, rows * columns)
            for name, (rows, columns) in self.shapes.items()
        }

    def record(self) -> dict[str, Any]:
        """For JSON: ratios beside counts, so a person can read it."""
        record = {
            "target": str(self.target),
            "removed": self.removed,
            "elements": self.elements,
            "provenance": self.provenance,
            "modules": {
                name: {
                    "shape": list(shape),
                    "removed": self.counts[name],
                    "sparsity": round(self.counts[name] / max(1, shape[0] * shape[1]), 6),
                    **({"pattern": str(self.pattern(name))} if name in self.patterns else {}),
                }
                for name, shape in self.shapes.items()
            },
        }
        if self.units:
            record["units"] = {
                name: {"of": u.of, "removed": u.removed, "weights": u.weights}
                for name, u in self.units.items()
            }
        return record

    @classmethod
    def of_record(cls, record: Any) -> Plan:
        """The inverse of ``record``.

        Raises:
            UsageError: not a plan, or a count outside its matrix.
        """
        try:
            modules = record["modules"]
            target = Target.parse(record["target"])
            shapes = {n: (int(m["shape"][0]), int(m["shape"][1])) for n, m in modules.items()}
            counts = {n: _whole(n, m["removed"]) for n, m in modules.items()}
            patterns = {n: _pattern(n, m["pattern"]) for n, m in modules.items() if "pattern" in m}
            units = {
                n: UnitCut(int(u["of"]), _whole(n, u["removed"]), int(u["weights"]))
                for n, u in record.get("units", {}).items()
            }
            provenance = dict(record.get("provenance", {}))
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            why = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise UsageError(f"not a plan: {why}", field="allocation", fix=MAKE) from None
        for name, (keep, group) in patterns.items():
            cut = Cut.of(shapes[name], Target(1 - keep / group, keep, group), Scope("row"), name)
            counts[name] = cut.count  # of the two, the pattern is what a person edits
        for name, count in counts.items():
            _within(name, "weights", shapes[name][0] * shapes[name][1], count)
        for name, unit in units.items():
            _within(name, "units", unit.of, unit.removed)
        return cls(target, shapes, counts, provenance, patterns, units)

    @classmethod
    def load(cls, path: Path) -> Plan:
        """Read a saved plan, perhaps edited by hand; its provenance is the file.

        Raises:
            UsageError: not a plan, or a count outside its matrix.
        """
        try:
            record = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else str(error)
            raise UsageError(
                f"not a plan: {why}", field="allocation", value=str(path), fix=MAKE
            ) from None
        plan = cls.of_record(record)
        provenance = {"allocator": "file", "file": path.name, "made_by": plan.provenance}
        return cls(plan.target, plan.shapes, plan.counts, provenance, plan.patterns, plan.units)


def _whole(name: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise UsageError(
            f"'{name}': what is removed is a whole number", field="removed", value=value
        )
    return value


def _pattern(name: str, text: object) -> tuple[int, int]:
    target = Target.parse(text)
    if target.keep is None or target.group is None:
        raise UsageError(f"'{name}': a pattern is written N:M", field="pattern", value=text)
    return target.keep, target.group


def _within(name: str, what: str, size: int, count: int) -> None:
    if not 0 <= count <= size:
        raise UsageError(
            f"'{name}' has {size} {what}, so {count} cannot be removed",
            field="removed",
            value=count,
        )


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
