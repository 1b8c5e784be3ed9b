"""Minimum cut by scipy's Dinic, made exact beyond its 32-bit capacities.

Capacities are int64. The flow is found digit by digit, as in Gabow's scaling: the first round
pushes what fits in 31 bits, every further round the rest on the residual network at a finer
unit, until the cut found has exactly the capacity of the flow. Nothing overflows: what can
still flow is bounded by the cut just found, and every capacity is cut off there.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_flow

from secateur.forests.solvers.maxflow import IntegerNetwork

ROUND_LIMIT = 2**31 - 2


def minimum_cut(network: IntegerNetwork) -> tuple[NDArray[np.bool_], int, int]:
    """Kept nodes, the maximum flow, and the number of rounds."""
    problem = network.problem
    n, m = problem.n_nodes, problem.n_keys
    source, sink = 0, n + m + 1
    indptr, indices, residual = _residual_network(
        problem.parent,
        problem.ptr,
        problem.key,
        network.supply,
        network.drain,
        network.toll,
        network.unlimited,
    )
    flow, remaining, rounds = 0, network.total, 0
    while True:
        shift = max(0, (remaining // ROUND_LIMIT).bit_length())
        capacity = (np.minimum(residual, remaining) >> shift).astype(np.int32)
        graph = csr_array((capacity, indices, indptr), shape=(n + m + 2, n + m + 2))
        pushed = maximum_flow(graph, source, sink, method="dinic")
        rounds += 1
        residual -= pushed.flow.data.astype(np.int64) << shift
        flow += int(pushed.flow_value) << shift
        del pushed, graph, capacity
        # Reaching only along arcs that could carry a whole unit of this round gives its cut.
        reached = _reachable(indptr, indices, residual, source, 1 << shift)
        kept = reached[1 : n + 1]
        remaining = network.cut_value(kept) - flow
        if remaining == 0:
            break
    if shift > 0:
        kept = _reachable(indptr, indices, residual, source, 1)[1 : n + 1]
    return kept, flow, rounds


@njit(nogil=True, cache=True)
def _residual_network(
    parent: Any, ptr: Any, key: Any, supply: Any, drain: Any, toll: Any, unlimited: int
) -> Any:
    """Both directions of every arc, sorted, as scipy wants them: no copy is made there.

    Vertices: 0 the source, 1..n nodes, n+1..n+m keys, n+m+1 the sink.
    """
    n, m, entries = len(parent), len(toll), len(key)
    size = n + m + 2
    degree = np.zeros(size, np.int64)
    degree[0] = n
    degree[size - 1] = n + m
    for h in range(n):
        degree[1 + h] += 2 + ptr[h + 1] - ptr[h]
        if parent[h] >= 0:
            degree[1 + h] += 1
            degree[1 + parent[h]] += 1
    for e in range(entries):
        degree[1 + n + key[e]] += 1
    for k in range(m):
        degree[1 + n + k] += 1
    indptr = np.zeros(size + 1, np.int32)
    for v in range(size):
        indptr[v + 1] = indptr[v] + degree[v]
    at = indptr[:-1].copy()
    indices = np.empty(indptr[size], np.int32)
    capacity = np.zeros(indptr[size], np.int64)
    # Rows are filled in ascending order of their heads: source, parent, children, keys, sink.
    for h in range(n):
        indices[at[0]] = 1 + h
        capacity[at[0]] = supply[h]
        at[0] += 1
        indices[at[1 + h]] = 0
        at[1 + h] += 1
        if parent[h] >= 0:
            indices[at[1 + h]] = 1 + parent[h]
            capacity[at[1 + h]] = unlimited
            at[1 + h] += 1
    for h in range(n):
        if parent[h] >= 0:
            p = 1 + parent[h]
            indices[at[p]] = 1 + h
            at[p] += 1
    for h in range(n):
        for e in range(ptr[h], ptr[h + 1]):
            k = 1 + n + key[e]
            indices[at[1 + h]] = k
            capacity[at[1 + h]] = unlimited
            at[1 + h] += 1
            indices[at[k]] = 1 + h
            at[k] += 1
    sink = size - 1
    for v in range(1, sink):
        indices[at[v]] = sink
        capacity[at[v]] = drain[v - 1] if v <= n else toll[v - 1 - n]
        at[v] += 1
        indices[at[sink]] = v
        at[sink] += 1
    return indptr, indices, capacity


@njit(nogil=True, cache=True)
def _reachable(indptr: Any, indices: Any, residual: Any, source: int, least: int) -> Any:
    """Vertices reached from the source along arcs with at least ``least`` left."""
    reached = np.zeros(len(indptr) - 1, np.bool_)
    queue = np.empty(len(indptr) - 1, np.int32)
    reached[source] = True
    queue[0] = source
    head, tail = 0, 1
    while head < tail:
        v = queue[head]
        head += 1
        for a in range(indptr[v], indptr[v + 1]):
            if residual[a] >= least and not reached[indices[a]]:
                reached[indices[a]] = True
                queue[tail] = indices[a]
                tail += 1
    return reached
