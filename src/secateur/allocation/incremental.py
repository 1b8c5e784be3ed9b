"""Ratios that grow (or shrink) with depth: SlimGPT's incremental pruning ratio."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from secateur.allocation.base import Allocator, Problem
from secateur.errors import UsageError

Shape = Literal["log", "linear"]
Direction = Literal["increase", "decrease"]


def steps(n: int, shape: Shape = "log") -> list[float]:
    """How far along its way from r_0 to r_{n-1} each of n blocks is, from 0 to 1.

    ``log``: log(i + 1) / log(n) (SlimGPT, equation 6; the released code divides by log(32)
    whatever n is, so that deeper models overshoot and shallower ones never arrive);
    ``linear``: i / (n - 1). A single block is at 0.
    """
    if n == 1:
        return [0.0]
    if shape == "log":
        return [math.log(i + 1) / math.log(n) for i in range(n)]
    return [i / (n - 1) for i in range(n)]


def schedule(
    sparsity: float,
    sizes: list[int],
    shape: Shape = "log",
    direction: Direction = "increase",
    first: float | None = None,
    width: float = 0.16,
) -> list[float]:
    """The ratio of each block, their parameter-weighted mean exactly ``sparsity``.

    r_i = r_0 + (r_{n-1} - r_0) u_i with u from ``steps``. ``first`` fixes the smaller end r_0,
    and the larger follows from the mean: r_0 + (S - r_0) / g, g the mean of u. Without it the
    ends lie ``width`` apart.

    Args:
        sparsity: S.
        sizes: parameters of each block, by which the mean is weighted.
    """
    u = steps(len(sizes), shape)
    if direction == "decrease":
        u.reverse()
    g = sum(p * v for p, v in zip(sizes, u, strict=True)) / sum(sizes)
    if len(sizes) == 1 or g == 0:
        return [sparsity] * len(sizes)
    start = sparsity - width * g if first is None else first
    slope = width if first is None else (sparsity - first) / g
    return [start + slope * v for v in u]


@dataclass(frozen=True)
class Incremental(Allocator):
    """Shallow blocks give less, because every error they make is carried through all others.

    Ling et al., "SlimGPT: Layer-wise Structured Pruning for Large Language Models",
    NeurIPS 2024, equation 6. The paper prints neither end of the schedule; its release uses
    r_0 = 0.0625 and r_31 = 0.25 for a mean of 0.2.

    Attributes:
        shape: ``log`` (the paper's) or ``linear``.
        direction: ``increase`` with depth (the paper's) or ``decrease``.
        first: the smaller end r_0; the larger follows from the mean.
        width: without ``first``, how far the two ends lie apart.
    """

    name = "incremental"
    summary = "log or linear schedule over depth, the first blocks give least"
    paper = "Ling et al. 2024, arXiv:2412.18110"

    shape: Shape = "log"
    direction: Direction = "increase"
    first: float | None = None
    width: float = 0.16

    def __post_init__(self) -> None:
        if self.first is not None and not 0 <= self.first < 1:
            raise UsageError("a sparsity in [0, 1)", field="first", value=self.first)
        if not 0 <= self.width <= 1:
            raise UsageError("in [0, 1]", field="width", value=self.width, fix="e.g. 0.16")

    def wishes(self, problem: Problem) -> dict[str, float]:
        """The schedule, the same ratio for all matrices of a block."""
        if self.first is not None and self.first > problem.sparsity:
            raise UsageError(
                f"the smaller end cannot lie above the mean, {problem.sparsity:g}",
                field="first",
                value=self.first,
            )
        if len(problem.blocks) == 1:
            problem.notes.append("a single block: its ratio is the target's")
        return problem.by_block(
            schedule(
                problem.sparsity,
                problem.block_sizes,
                self.shape,
                self.direction,
                self.first,
                self.width,
            )
        )
