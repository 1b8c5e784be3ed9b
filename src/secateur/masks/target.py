"""What is asked for: how much to remove, and in what pattern.

A target is a *sparsity* (the fraction removed, in [0, 1)) or an *N:M pattern*, which here
always means **keep N of every M** consecutive inputs of a row (NVIDIA's convention; the
original Wanda and SparseGPT scripts count the removed ones instead).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal

from secateur.errors import UsageError

ScopeKind = Literal["row", "layer", "block", "global"]
_PATTERN = re.compile(r"^\s*(\d+)\s*:\s*(\d+)\s*$")


@dataclass(frozen=True)
class Target:
    """A sparsity in [0, 1), or ``keep`` of every ``group`` (then ``sparsity`` follows)."""

    sparsity: float
    keep: int | None = None
    group: int | None = None

    @classmethod
    def parse(cls, value: object, pattern: str | None = None) -> Target:
        """Read ``0.5``, ``"0.5"``, ``"50%"`` or ``"2:4"``; ``pattern`` may confirm it, not contradict it.

        Raises:
            UsageError: out of range, not a target at all, or two answers that differ.
        """
        if pattern is not None:
            asked = cls.parse(pattern)
            if not asked.is_pattern:
                raise UsageError(
                    "a pattern is written N:M", field="pattern", value=pattern, fix="e.g. 2:4"
                )
            if value is None:
                return asked
            given = cls.parse(value)
            if (given.is_pattern and given != asked) or abs(given.sparsity - asked.sparsity) > 1e-9:
                raise UsageError(
                    f"contradicts the pattern {pattern}, which removes {asked.sparsity:.4g} of the weights",
                    field="sparsity",
                    value=value,
                    fix=f"drop one of the two, or ask for sparsity {asked.sparsity:.4g}",
                )
            return asked
        if isinstance(value, Target):
            return value
        text = str(value).strip()
        if match := _PATTERN.match(text):
            keep, group = int(match[1]), int(match[2])
            if not 0 < keep <= group:
                raise UsageError(
                    "N:M keeps N of every M, so 1 <= N <= M",
                    field="sparsity",
                    value=text,
                    fix="2:4 keeps two of four; 1:4 removes three quarters",
                )
            return cls(1 - keep / group, keep, group)
        try:
            number = float(text[:-1]) / 100 if text.endswith("%") else float(text)
        except ValueError:
            raise UsageError(
                "not a sparsity",
                field="sparsity",
                value=value,
                fix="a number in [0, 1) such as 0.5, or N:M",
            ) from None
        if not math.isfinite(number) or not 0 <= number < 1:
            fix = f"did you mean {number / 100:g}?" if 5 <= number < 100 else "0.5 removes half"
            raise UsageError("a sparsity lies in [0, 1)", field="sparsity", value=value, fix=fix)
        return cls(number)

    @property
    def is_pattern(self) -> bool:
        """True for N:M."""
        return self.keep is not None

    @property
    def fraction(self) -> Fraction:
        """The sparsity as the exact fraction the user meant (0.1, not its nearest binary)."""
        if self.keep is not None and self.group is not None:
            return Fraction(self.group - self.keep, self.group)
        return Fraction(repr(self.sparsity))

    def count(self, total: int) -> int:
        """Elements to remove out of ``total``: the nearest whole number, halves up."""
        return math.floor(self.fraction * total + Fraction(1, 2))

    def __str__(self) -> str:
        return f"{self.keep}:{self.group}" if self.is_pattern else f"{self.sparsity:g}"


@dataclass(frozen=True)
class Scope:
    """Among which weights the least important are sought.

    ``row``: each output neuron gives the same share; ``layer``: the matrix as a whole;
    ``block``: each band of ``width`` input columns, all rows together (SparseGPT's);
    ``global``: all matrices together (an allocation; inside a matrix it is ``layer``).
    """

    kind: ScopeKind = "row"
    width: int = 128

    @classmethod
    def parse(cls, value: object) -> Scope:
        """Read ``row``, ``layer``, ``block``, ``block:64`` or ``global``."""
        if isinstance(value, Scope):
            return value
        kind, _, width = str(value).partition(":")
        if kind not in ("row", "layer", "block", "global") or (width and kind != "block"):
            raise UsageError(
                "unknown scope",
                field="scope",
                value=value,
                fix="row, layer, block, block:WIDTH or global",
            )
        if width and (not width.isdigit() or int(width) < 1):
            raise UsageError(
                "a block's width is a positive number of columns", field="scope", value=value
            )
        return cls(kind, int(width) if width else 128)  # type: ignore[arg-type]

    def __str__(self) -> str:
        return f"block:{self.width}" if self.kind == "block" else self.kind


@dataclass(frozen=True)
class Cut:
    """What one matrix of shape (d_out, d_in) must give: an exact count, or an N:M pattern.

    ``count`` is the number of weights removed, exact to the element; for a pattern it
    follows from the shape.
    """

    shape: tuple[int, int]
    count: int
    scope: Scope = Scope()
    keep: int | None = None
    group: int | None = None
    asked: float | None = field(default=None, compare=False)
    """The sparsity this cut came from, before it became a count (``compat="reference"`` floors it)."""

    @classmethod
    def of(cls, shape: tuple[int, int], target: Target, scope: Scope, name: str = "weight") -> Cut:
        """The cut of ``target`` on a matrix of ``shape``; N:M must divide its inputs."""
        rows, columns = int(shape[0]), int(shape[1])
        if target.keep is None or target.group is None:
            count = target.count(rows * columns)
            return cls((rows, columns), count, scope, asked=target.sparsity)
        if columns % target.group:
            raise UsageError(
                f"'{name}' has {columns} inputs, which {target.group} does not divide",
                field="sparsity",
                value=str(target),
                fix=f"exclude '{name}', or choose a group size that divides {columns}",
            )
        removed = rows * columns // target.group * (target.group - target.keep)
        return cls((rows, columns), removed, scope, target.keep, target.group)

    @property
    def is_pattern(self) -> bool:
        """True for N:M."""
        return self.keep is not None

    @property
    def sparsity(self) -> float:
        """The share removed."""
        return self.count / max(1, self.shape[0] * self.shape[1])


def spread(count: int, sizes: list[int]) -> list[int]:
    """Share ``count`` over groups of the given sizes, as evenly as whole numbers allow.

    Each group gets the floor or the ceiling of its proportional share; the sum is exact.
    (Integer arithmetic only, so no group can drift by a rounding.)

    >>> spread(7, [4, 4, 4])
    [2, 2, 3]
    """
    total, running, given, out = sum(sizes), 0, 0, []
    for size in sizes:
        running += size
        upto = running * count // total if total else 0
        out.append(upto - given)
        given = upto
    return out
