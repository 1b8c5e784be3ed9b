"""Minimum cut by OR-tools' push-relabel (Apache-2.0, optional)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from secateur.errors import SecateurError
from secateur.forests.solvers.maxflow import IntegerNetwork


def minimum_cut(network: IntegerNetwork) -> tuple[NDArray[np.bool_], int, int]:
    """Kept nodes, the maximum flow, and the number of rounds (one)."""
    from ortools.graph.python import max_flow

    problem = network.problem
    n, m = problem.n_nodes, problem.n_keys
    source, sink = n + m, n + m + 1
    flow = max_flow.SimpleMaxFlow()

    def arcs(tail: NDArray, head: NDArray, capacity: NDArray) -> None:
        flow.add_arcs_with_capacity(
            np.ascontiguousarray(tail, dtype=np.int32),
            np.ascontiguousarray(head, dtype=np.int32),
            np.ascontiguousarray(capacity, dtype=np.int64),
        )

    node = np.arange(n, dtype=np.int32)
    child = np.flatnonzero(problem.parent >= 0)
    fed, drained = network.supply > 0, network.drain > 0
    arcs(np.full(fed.sum(), source), node[fed], network.supply[fed])
    arcs(node[drained], np.full(drained.sum(), sink), network.drain[drained])
    arcs(child, problem.parent[child], np.full(len(child), network.unlimited))
    user = np.repeat(node, np.diff(problem.ptr))
    arcs(user, n + problem.key, network.toll[problem.key])
    arcs(n + np.arange(m), np.full(m, sink), network.toll)
    if not fed.any():
        return np.zeros(n, dtype=np.bool_), 0, 1
    status = flow.solve(source, sink)
    if status != flow.OPTIMAL:
        raise SecateurError(f"OR-tools ended with {status}", fix="solver='push_relabel'")
    side = np.asarray(flow.get_source_side_min_cut(), dtype=np.int64)
    kept = np.zeros(n, dtype=np.bool_)
    kept[side[side < n]] = True
    return kept, int(flow.optimal_flow()), 1
