"""The linear programme as stated, for HiGHS: the oracle for small forests."""

from __future__ import annotations

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import coo_array

from secateur.errors import SecateurError
from secateur.forests.closure import ClosureProblem
from secateur.forests.solvers.interface import Cut

INTEGRALITY = 1e-6


def solve_lp(problem: ClosureProblem, price: float) -> Cut:
    """Solve the relaxation; its vertices are integral (differences of two variables only).

    Raises:
        SecateurError: HiGHS failed, or returned a fractional vertex.
    """
    n, m = problem.n_nodes, problem.n_keys
    child = np.flatnonzero(problem.parent >= 0)
    user = np.repeat(np.arange(n), np.diff(problem.ptr))
    low = np.concatenate([child, user])
    high = np.concatenate([problem.parent[child], n + problem.key])
    rows = np.arange(len(low))
    ones = np.ones(len(low))
    constraints = coo_array(
        (np.concatenate([ones, -ones]), (np.tile(rows, 2), np.concatenate([low, high]))),
        shape=(len(low), n + m),
    ).tocsr()
    objective = np.concatenate([-problem.net(price), price * problem.charge])
    result = linprog(
        objective,
        A_ub=constraints if len(low) else None,
        b_ub=np.zeros(len(low)) if len(low) else None,
        bounds=(0, 1),
        method="highs-ds",
    )
    if result.status != 0:
        raise SecateurError(f"HiGHS did not solve the programme: {result.message}")
    stay = result.x[:n]
    if np.abs(stay - stay.round()).max(initial=0) > INTEGRALITY:
        raise SecateurError(
            "the linear programme's vertex is not integral", fix="solver='maxflow' is exact"
        )
    kept = stay > 0.5
    return Cut(kept, problem.profit(kept, price), -float(result.fun), int(result.nit), "lp")
