"""One ranking over all matrices: how many weights each gives when the least important go.

Right for magnitude. For scores that involve activations it is a known trap: their scale
differs between layers (spec: global Wanda on a 3B model, perplexity 10,140 at 30 %).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from secateur.allocation.base import Allocator, Problem, told_of
from secateur.allocation.erdos_renyi import warn
from secateur.allocation.plan import Plan
from secateur.errors import UsageError
from secateur.masks.target import Target

LIMIT = 2**31


def global_plan(scores: Iterable[tuple[str, Tensor]], target: Target) -> Plan:
    """Counts per matrix so that exactly the asked share of all weights goes.

    Args:
        scores: (name, (d_out, d_in) importance) of every matrix, in the model's order.
        target: a sparsity; the total removed is ``target.count(total)`` to the element.

    Ties at the threshold go to the matrices that come first.
    """
    shapes: dict[str, tuple[int, int]] = {}
    flat: list[Tensor] = []
    for name, score in scores:
        shapes[name] = (int(score.shape[0]), int(score.shape[1]))
        flat.append(score.reshape(-1).float().cpu())
    total = sum(s.numel() for s in flat)
    if total > LIMIT:
        raise UsageError(
            f"a global ranking holds the scores of all {total} weights in memory",
            field="allocation",
            value="global",
            fix="use allocation: uniform for a model of this size",
        )
    count = target.count(total)
    if count == 0:
        return Plan(target, shapes, dict.fromkeys(shapes, 0), {"allocator": "global"})
    threshold = torch.cat(flat).kthvalue(count).values
    counts = [int((s < threshold).sum()) for s in flat]
    left = count - sum(counts)
    for i, s in enumerate(flat):
        ties = min(left, int((s == threshold).sum()))
        counts[i] += ties
        left -= ties
    return Plan(target, shapes, dict(zip(shapes, counts, strict=True)), {"allocator": "global"})


@dataclass(frozen=True)
class Global(Allocator):
    """One ranking of all weights by the run's own method's scores on the dense model.

    Global magnitude pruning is the classic of vision networks. On language models it is known
    to collapse from 65 % on, and earlier where scores involve activations, whose scale differs
    between layers; the plan says so in its notes.
    """

    name = "global"
    summary = "one ranking of all weights; collapses on language models at high sparsity"
    ranks_scores = True

    def bounds(self, problem: Problem) -> tuple[float, float]:
        """Whatever the ranking says, unless bounds were given."""
        low = 0.0 if self.min_sparsity is None else self.min_sparsity
        return low, 1.0 if self.max_sparsity is None else self.max_sparsity

    def wishes(self, problem: Problem) -> dict[str, float]:
        """The share of each matrix below the one threshold."""
        return self._ranked(problem).ratios

    def _ranked(self, problem: Problem) -> Plan:
        if problem.scores is None:
            raise ValueError("a global ranking needs the method's scores")
        warn(problem, self.name)
        return global_plan(problem.scores(), Target(problem.sparsity))

    def plan(self, problem: Problem) -> Plan:
        """The ranking's own counts where they may stand; else moved into bounds or N:M."""
        if problem.target.is_pattern or self.bounds(problem) != (0.0, 1.0):
            return super().plan(problem)
        plan = self._ranked(problem)
        return replace(plan, provenance=told_of(self, problem, (0.0, 1.0)))
