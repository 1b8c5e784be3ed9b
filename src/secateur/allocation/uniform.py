"""The same share of every matrix: the baseline every allocator is measured against."""

from __future__ import annotations

from dataclasses import dataclass

from secateur.allocation.base import Allocator, Problem
from secateur.allocation.plan import Plan, uniform


@dataclass(frozen=True)
class Uniform(Allocator):
    """s_i = S for every matrix."""

    name = "uniform"
    summary = "the same share of every matrix"

    def wishes(self, problem: Problem) -> dict[str, float]:
        """S everywhere."""
        return dict.fromkeys(problem.shapes, problem.sparsity)

    def plan(self, problem: Problem) -> Plan:
        """Exact in whole numbers, without a detour over ratios."""
        return uniform(problem.shapes, problem.target)
