"""ATP: ratios in an arithmetic progression, whose one slope is searched."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from secateur.allocation.base import Allocator, Problem, make_plan_of
from secateur.allocation.plan import Plan
from secateur.allocation.search.engine import Evolution, SearchSettings
from secateur.allocation.search.executors import Serial
from secateur.allocation.search.spaces import SlopeSpace
from secateur.allocation.search.trial import one_rung, require_trial
from secateur.errors import UsageError
from secateur.evidence.score_summary import Values


def progression(sparsity: float, blocks: int, beta: float) -> Values:
    """s_i = S - beta (L - 1) / 2 + beta (i - 1), i = 1..L: (L,) with mean S."""
    return sparsity + beta * (np.arange(blocks, dtype=np.float64) - (blocks - 1) / 2)


def steepest(sparsity: float, blocks: int) -> float:
    """The largest beta that keeps all ratios in [0, 1]: min(2 S, 2 (1 - S)) / (L - 1)."""
    return 2 * min(sparsity, 1 - sparsity) / max(1, blocks - 1)


def grid(sparsity: float, blocks: int, step: float, most: int) -> list[float]:
    """The slopes tried: whole steps from one step on; a coarser step where there were too many."""
    top = steepest(sparsity, blocks)
    step = max(step, top / most)
    return [step * i for i in range(1, int(top / step + 1e-9) + 1)] or [top]


@dataclass(frozen=True)
class ATP(Allocator):
    """Later blocks give more, by the same amount each: s_i = S - beta (L - 1)/2 + beta (i - 1).

    Huang et al., "Determining Layer-wise Sparsity for Large Language Models Through a
    Theoretical Perspective", ICML 2025. The published search tries a grid of step 0.002 on
    WikiText-2; here on a search split that is never the one evaluated on.

    Attributes:
        beta: the slope; null searches it.
        step: of the grid.
        most: at most so many slopes are tried: shallow models get a coarser grid.
    """

    name = "atp"
    summary = "an arithmetic progression over depth, its slope searched"
    paper = "Huang et al. 2025, arXiv:2502.14770"
    searches = True

    beta: float | None = None
    step: float = 0.002
    most: int = 12

    def __post_init__(self) -> None:
        if self.step <= 0:
            raise UsageError("must be positive", field="step", value=self.step)
        if self.most < 1:
            raise UsageError("must be at least 1", field="most", value=self.most)

    @property
    def tries(self) -> bool:
        """See ``Allocator.tries``."""
        return self.beta is None

    def wishes(self, problem: Problem) -> dict[str, float]:
        """See ``Allocator.wishes``: of the given slope; a search goes through ``plan``."""
        blocks = len(problem.blocks)
        beta = self.beta or 0.0
        top = steepest(problem.sparsity, blocks)
        if not 0 <= beta <= top + 1e-12:
            raise UsageError(
                f"with {blocks} blocks at {problem.sparsity:g} a slope beyond {top:.6g} "
                "takes ratios out of [0, 1]",
                field="beta",
                value=beta,
                fix=f"0 < beta <= {top:.6g}, or null to search it",
            )
        return problem.by_block(progression(problem.sparsity, blocks, beta).tolist())

    def plan(self, problem: Problem) -> Plan:
        """See ``Allocator.plan``."""
        blocks = len(problem.blocks)
        if self.beta is not None or blocks == 1:
            return super().plan(problem)
        trial = require_trial(self, problem)
        bounds = self.bounds(problem)

        def plan_of(ratios: Values) -> Plan:
            return make_plan_of(self, problem, problem.by_block(ratios.tolist()), bounds)

        space = SlopeSpace(
            grid(problem.sparsity, blocks, self.step, self.most),
            lambda beta: progression(problem.sparsity, blocks, beta),
            lambda ratios: tuple(plan_of(ratios).counts.values()),
        )
        search = Evolution(
            space,
            Serial(one_rung(trial, problem.shapes, problem.target)),
            settings=SearchSettings(budget=len(space.betas) + 1, population=1),
            seeds=[0.0, *space.betas],
            progress=problem.progress,
        ).run()
        beta = search.best.candidate
        problem.notes.append(
            f"slope {beta:.6g} per block, the best of {len(search.history)} tried on the search split"
        )
        return plan_of(progression(problem.sparsity, blocks, beta))
