"""What all solvers take and give; the choice between them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.util import find_spec
from numbers import Integral

import numpy as np
from numpy.typing import NDArray

from secateur.errors import MissingExtra
from secateur.forests.checks import ForestInputError, check_number
from secateur.forests.closure import ClosureProblem, best_closure
from secateur.forests.reduction import (
    fold_private_keys,
    in_whole_units,
    merge_keys,
    settle_at_price,
)
from secateur.progress import SILENT, Progress

SOLVERS = ("auto", "ortools", "push_relabel", "primal_dual", "lp")
STEPS = ("averaged", "published")


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
    """How the primal-dual moves and when it stops.

    Attributes:
        max_iter, tol: the most rounds; the gap, relative to the bound, that ends them earlier.
        steps: ``averaged`` or ``published``; see ``primal_dual``.
        step_m: of published steps ``(1 + m) / (iteration + m) * (best primal - dual) / |g|^2``.
        n_jobs: threads for the trees, as joblib counts them.
    """

    max_iter: int = 200
    tol: float = 1e-6
    steps: str = "averaged"
    step_m: float = 500.0
    n_jobs: int | None = None

    def __post_init__(self) -> None:
        if self.steps not in STEPS:
            raise ForestInputError(
                "unknown", field="steps", value=self.steps, fix=" or ".join(STEPS)
            )
        if not isinstance(self.max_iter, Integral) or self.max_iter < 1:
            raise ForestInputError("must be 1 or more", field="max_iter", value=self.max_iter)
        check_number("tol", self.tol)
        check_number("step_m", self.step_m)


def resolve_solver(name: str) -> str:
    """``auto`` and ``maxflow`` resolved to an exact backend that is installed."""
    if name in ("auto", "maxflow"):
        return "ortools" if find_spec("ortools") else "push_relabel"
    if name not in SOLVERS:
        raise ForestInputError(
            "there is no solver of that name",
            field="solver",
            value=name,
            fix=f"one of {', '.join((*SOLVERS, 'maxflow'))}",
        )
    if name == "ortools" and not find_spec("ortools"):
        raise MissingExtra("ortools", "forests", "solver='ortools'")
    return name


def solve(
    problem: ClosureProblem,
    price: float,
    solver: str = "auto",
    options: PrimalDualOptions | None = None,
    progress: Progress = SILENT,
) -> Cut:
    """The best closed set at ``price`` (cost counted ``price`` times, in raw loss units).

    What is plain is settled first; the solver sees only the nodes still in doubt. For exact
    solvers everything is rounded to whole numbers before that, on a scale that does not depend
    on the price. Whatever follows is then exact, and as the rounded capacities are monotone in
    the price, so are the smallest minimum cuts: optima at any prices are nested, ties included.
    """
    solver = resolve_solver(solver)
    if problem.n_nodes == 0 or problem.n_keys == 0 or price == 0:
        kept, value = best_closure(problem.parent, problem.net(price))
        return Cut(kept, value, value, 0, solver)
    options = options or PrimalDualOptions()
    if solver in ("primal_dual", "lp"):
        return _solve_settled(problem, price, solver, options, progress)
    whole, unit = in_whole_units(problem, price)
    cut = _solve_settled(whole, 1.0, solver, options, progress)
    profit = problem.profit(cut.kept, price)
    # Rounding moves any cut by at most half a unit for each node and key.
    bound = unit * (cut.bound + 0.5 * (problem.n_nodes + problem.n_keys))
    return replace(cut, profit=profit, bound=max(profit, bound))


def _solve_settled(
    problem: ClosureProblem,
    price: float,
    solver: str,
    options: PrimalDualOptions,
    progress: Progress,
) -> Cut:
    upper, lower = settle_at_price(problem, price)
    core, nodes = problem.restrict(upper, lower)
    core = merge_keys(fold_private_keys(core))
    inner = _solve_core(core, price, solver, options, progress)
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

    return solve_maxflow(core, solver)
