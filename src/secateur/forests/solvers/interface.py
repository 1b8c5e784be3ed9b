"""What all solvers take and give; the choice between them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.util import find_spec

import numpy as np
from numpy.typing import NDArray

from secateur.errors import MissingExtra
from secateur.forests.checks import ForestInputError
from secateur.forests.closure import ClosureProblem, best_closure
from secateur.forests.reduction import fold_private_keys, merge_keys, settle_at_price
from secateur.progress import SILENT, Progress

SOLVERS = ("auto", "ortools", "scipy", "primal_dual", "lp")


@dataclass(frozen=True)
class Cut:
    """A pruning and the proof of how good it is.

    Attributes:
        kept: (n,) bool, nodes that stay internal; for exact solvers the smallest optimal set.
        profit: what it achieves, ``gain - price * cost``, in raw loss units.
        bound: no pruning achieves more than this.
        iterations: rounds of the solver.
        solver: which one.
        history: (iterations, 2) best profit and best bound after each round (primal-dual only).
    """

    kept: NDArray[np.bool_]
    profit: float
    bound: float
    iterations: int
    solver: str
    history: NDArray[np.float64] | None = None

    @property
    def gap(self) -> float:
        """How far from optimal it could be at most, in raw loss units."""
        return max(0.0, self.bound - self.profit)


@dataclass(frozen=True)
class PrimalDualOptions:
    """The published step rule ``(1 + m) / (iteration + m) * (best primal - dual) / |g|^2``."""

    max_iter: int = 50
    step_m: float = 500.0
    tol: float = 1e-6


def resolve_solver(name: str) -> str:
    """``auto`` and ``maxflow`` resolved to an exact backend that is installed."""
    if name in ("auto", "maxflow"):
        return "ortools" if find_spec("ortools") else "scipy"
    if name not in SOLVERS:
        raise ForestInputError(
            "there is no solver of that name",
            field="solver",
            value=name,
            fix=f"one of {', '.join((*SOLVERS, 'maxflow'))}",
        )
    if name == "ortools" and not find_spec("ortools"):
        raise MissingExtra("ortools", "forests-ortools", "solver='ortools'")
    return name


def solve(
    problem: ClosureProblem,
    price: float,
    solver: str = "auto",
    options: PrimalDualOptions | None = None,
    progress: Progress = SILENT,
) -> Cut:
    """The best closed set at ``price`` (cost counted ``price`` times, in raw loss units).

    What is plain is settled first; the solver sees only the nodes still in doubt.
    """
    solver = resolve_solver(solver)
    if problem.n_nodes == 0 or problem.n_keys == 0 or price == 0:
        kept, value = best_closure(problem.parent, problem.net(price))
        return Cut(kept, value, value, 0, solver)
    upper, lower = settle_at_price(problem, price)
    core, nodes = problem.restrict(upper, lower)
    core = merge_keys(fold_private_keys(core))
    inner = _solve_core(core, price, solver, options or PrimalDualOptions(), progress)
    kept = lower.copy()
    kept[nodes[inner.kept]] = True
    settled = problem.profit(lower, price)
    history = None if inner.history is None else inner.history + settled
    return replace(
        inner,
        kept=kept,
        profit=problem.profit(kept, price),
        bound=settled + inner.bound,
        history=history,
    )


def _solve_core(
    core: ClosureProblem, price: float, solver: str, options: PrimalDualOptions, progress: Progress
) -> Cut:
    if core.n_keys == 0:
        kept, value = best_closure(core.parent, core.net(price))
        return Cut(kept, value, value, 0, solver)
    if solver == "lp":
        from secateur.forests.solvers.lp import solve_lp

        return solve_lp(core, price)
    if solver == "primal_dual":
        from secateur.forests.solvers.primal_dual import solve_primal_dual

        return solve_primal_dual(core, price, options, progress)
    from secateur.forests.solvers.maxflow import solve_maxflow

    return solve_maxflow(core, price, solver)
