"""Minimum cut by push-relabel, written for the two kinds of vertices a closure problem has.

Goldberg and Tarjan, "A new approach to the maximum-flow problem" (J. ACM, 1988): first in, first
out, with labels made exact by a breadth-first search now and then. Flow goes only from a node to
its parent and to its keys, so it is stored next to the first-use lists, it has no cycles, and
what could not reach the sink is handed back in one pass. Everything is int64, and no sum exceeds
the source's supply.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from secateur.errors import SecateurError
from secateur.forests.solvers.maxflow import IntegerNetwork

SEARCH_AFTER = 6
"""Labels are made exact again after about this many list entries per vertex were looked at."""

MOST = 2**31 - 1


def minimum_cut(network: IntegerNetwork) -> tuple[NDArray[np.bool_], int, int]:
    """Kept nodes, the maximum flow, and the number of searches for labels.

    Raises:
        SecateurError: more vertices or first uses than 32 bits can number.
    """
    problem = network.problem
    if max(len(problem.key), problem.n_nodes + problem.n_keys + 2) > MOST:
        raise SecateurError(
            f"{len(problem.key):,} first uses of {problem.n_keys:,} (feature, example) pairs are "
            "more than push_relabel can number",
            fix="fewer cost examples, or solver='primal_dual'",
        )
    node, starts, users = _transposed(problem.ptr, problem.key, problem.n_keys)
    child, sibling = _children(problem.parent)
    graph = (problem.parent, child, sibling, problem.ptr, problem.key, node, starts, users)
    supply = network.supply.copy()  # what the source could still send
    along = np.zeros(len(problem.key), dtype=np.int64)  # flow from nodes to keys
    up = np.zeros(problem.n_nodes, dtype=np.int64)  # flow from nodes to their parents
    excess = np.concatenate([network.supply, np.zeros(problem.n_keys, dtype=np.int64)])
    free = (network.drain.copy(), network.toll.copy())
    searches = _preflow(*graph, *free, excess, along, up, SEARCH_AFTER)
    _hand_back(*graph, supply, excess, along, up)
    kept = _from_source(*graph, supply, along, up)
    return kept, network.total - int(supply.sum()), searches


@njit(nogil=True, cache=True)
def _transposed(ptr: Any, key: Any, n_keys: int) -> Any:
    """The node of every entry; of every key ``k`` its entries ``users[starts[k]:starts[k + 1]]``."""
    starts = np.zeros(n_keys + 2, np.int64)
    for k in key:
        starts[k + 2] += 1
    starts = np.cumsum(starts)
    node, users = np.empty(len(key), np.int32), np.empty(len(key), np.int32)
    for h in range(len(ptr) - 1):
        for e in range(ptr[h], ptr[h + 1]):
            node[e] = h
            users[starts[key[e] + 1]] = e
            starts[key[e] + 1] += 1
    return node, starts[:-1], users


@njit(nogil=True, cache=True)
def _children(parent: Any) -> Any:
    """Each node's first child and next sibling, or -1."""
    child, sibling = np.full(len(parent), -1, np.int32), np.full(len(parent), -1, np.int32)
    for h in range(len(parent) - 1, -1, -1):
        if parent[h] >= 0:
            sibling[h] = child[parent[h]]
            child[parent[h]] = h
    return child, sibling


@njit(nogil=True, cache=True)
def _preflow(
    parent: Any, child: Any, sibling: Any, ptr: Any, key: Any, node: Any, starts: Any, users: Any,
    drain: Any, toll: Any, excess: Any, along: Any, up: Any,
    search_after: int,
) -> int:  # fmt: skip
    """Push until no excess can reach the sink. Vertices: n nodes, then the keys.

    ``drain`` and ``toll`` become what is left of these capacities.
    """
    n, m = len(parent), len(toll)
    far = n + m + 1
    label = np.empty(n + m, np.int32)
    at = np.empty(n + m, np.int64)  # where a vertex goes on with its list
    queue, queued = np.empty(n + m, np.int32), np.zeros(n + m, np.bool_)
    head, size, searches = 0, 0, 0
    work, limit = 0, 0
    while True:
        if work >= limit:
            _search(
                parent, child, sibling, ptr, key, node, starts, users, drain, toll, along, up,
                label, queue,
            )  # fmt: skip
            searches += 1
            work, limit = 0, search_after * (n + m) + len(key)
            at[:n] = ptr[:-1]
            at[n:] = starts[:-1]
            head, size = 0, 0
            for v in range(n + m):
                queued[v] = False
                if excess[v] > 0 and label[v] < far:
                    size = _join(queue, queued, head, size, v)
        if size == 0:
            return searches
        v = queue[head]
        head = head + 1 if head + 1 < n + m else 0
        size -= 1
        queued[v] = False
        while excess[v] > 0 and label[v] < far:
            below = label[v] - 1
            best = far
            if v < n:
                if below == 0:
                    sent = min(excess[v], drain[v])
                    drain[v] -= sent
                    excess[v] -= sent
                stop = ptr[v + 1]
                while excess[v] > 0 and at[v] < stop:
                    w = n + key[at[v]]
                    work += 1
                    if label[w] == below:
                        along[at[v]] += excess[v]
                        excess[w] += excess[v]
                        excess[v] = 0
                        size = _join(queue, queued, head, size, w)
                    else:
                        at[v] += 1
                p = parent[v]
                if excess[v] > 0 and p >= 0 and label[p] == below:
                    up[v] += excess[v]
                    excess[p] += excess[v]
                    excess[v] = 0
                    size = _join(queue, queued, head, size, p)
                c = child[v]
                while excess[v] > 0 and c >= 0:
                    if up[c] > 0 and label[c] == below:
                        sent = min(excess[v], up[c])
                        up[c] -= sent
                        excess[c] += sent
                        excess[v] -= sent
                        size = _join(queue, queued, head, size, c)
                    c = sibling[c]
                if excess[v] == 0:
                    break
                if drain[v] > 0:
                    best = 1
                if p >= 0:
                    best = min(best, label[p] + 1)
                c = child[v]
                while c >= 0:
                    if up[c] > 0:
                        best = min(best, label[c] + 1)
                    c = sibling[c]
                at[v] = ptr[v]
                for e in range(ptr[v], stop):
                    best = min(best, label[n + key[e]] + 1)
            else:
                k = v - n
                if below == 0:
                    sent = min(excess[v], toll[k])
                    toll[k] -= sent
                    excess[v] -= sent
                stop = starts[k + 1]
                while excess[v] > 0 and at[v] < stop:
                    e = users[at[v]]
                    work += 1
                    if along[e] > 0 and label[node[e]] == below:
                        sent = min(excess[v], along[e])
                        along[e] -= sent
                        excess[node[e]] += sent
                        excess[v] -= sent
                        size = _join(queue, queued, head, size, node[e])
                    if excess[v] > 0:
                        at[v] += 1
                if excess[v] == 0:
                    break
                if toll[k] > 0:
                    best = 1
                at[v] = starts[k]
                for i in range(starts[k], stop):
                    if along[users[i]] > 0:
                        best = min(best, label[node[users[i]]] + 1)
            label[v] = best
            work += stop - at[v] + 12


@njit(nogil=True, cache=True)
def _join(queue: Any, queued: Any, head: int, size: int, v: int) -> int:
    """Put ``v`` at the end of the circular queue unless it waits already; the new size."""
    if queued[v]:
        return size
    queued[v] = True
    end = head + size
    queue[end if end < len(queue) else end - len(queue)] = v
    return size + 1


@njit(nogil=True, cache=True)
def _search(
    parent: Any, child: Any, sibling: Any, ptr: Any, key: Any, node: Any, starts: Any, users: Any,
    drain: Any, toll: Any, along: Any, up: Any, label: Any, queue: Any,
) -> None:  # fmt: skip
    """How many arcs each vertex is from the sink; backwards from there."""
    n, m = len(parent), len(toll)
    far = n + m + 1
    head, tail = 0, 0
    for v in range(n + m):
        label[v] = far
        if (drain[v] if v < n else toll[v - n]) > 0:
            label[v] = 1
            queue[tail] = v
            tail += 1
    while head < tail:
        v = queue[head]
        head += 1
        next_label = label[v] + 1
        if v >= n:
            for i in range(starts[v - n], starts[v - n + 1]):
                w = node[users[i]]
                if label[w] == far:
                    label[w] = next_label
                    queue[tail] = w
                    tail += 1
            continue
        p = parent[v]
        if p >= 0 and up[v] > 0 and label[p] == far:
            label[p] = next_label
            queue[tail] = p
            tail += 1
        c = child[v]
        while c >= 0:
            if label[c] == far:
                label[c] = next_label
                queue[tail] = c
                tail += 1
            c = sibling[c]
        for e in range(ptr[v], ptr[v + 1]):
            w = n + key[e]
            if along[e] > 0 and label[w] == far:
                label[w] = next_label
                queue[tail] = w
                tail += 1


@njit(nogil=True, cache=True)
def _hand_back(
    parent: Any, child: Any, sibling: Any, ptr: Any, key: Any, node: Any, starts: Any, users: Any,
    supply: Any, excess: Any, along: Any, up: Any,
) -> None:  # fmt: skip
    """Excess back to where it came from: out of keys, then down the trees to the source.

    ``supply`` becomes what the source did not send.
    """
    n = len(parent)
    for k in range(len(starts) - 1):
        for i in range(starts[k], starts[k + 1]):
            e = users[i]
            sent = min(excess[n + k], along[e])
            along[e] -= sent
            excess[n + k] -= sent
            excess[node[e]] += sent
    for h in range(n):
        own = min(excess[h], supply[h])
        rest = excess[h] - own
        c = child[h]
        while c >= 0:
            sent = min(rest, up[c])
            up[c] -= sent
            excess[c] += sent
            rest -= sent
            c = sibling[c]
        supply[h] = own


@njit(nogil=True, cache=True)
def _from_source(
    parent: Any, child: Any, sibling: Any, ptr: Any, key: Any, node: Any, starts: Any, users: Any,
    supply: Any, along: Any, up: Any,
) -> Any:  # fmt: skip
    """(n,) the nodes that what the source could still send would reach: the smallest cut."""
    n = len(parent)
    reached = np.zeros(n + len(starts) - 1, np.bool_)
    queue = np.empty(len(reached), np.int32)
    head, tail = 0, 0
    for h in range(n):
        if supply[h] > 0:
            reached[h] = True
            queue[tail] = h
            tail += 1
    while head < tail:
        v = queue[head]
        head += 1
        if v >= n:
            for i in range(starts[v - n], starts[v - n + 1]):
                w = node[users[i]]
                if along[users[i]] > 0 and not reached[w]:
                    reached[w] = True
                    queue[tail] = w
                    tail += 1
            continue
        p = parent[v]
        if p >= 0 and not reached[p]:
            reached[p] = True
            queue[tail] = p
            tail += 1
        c = child[v]
        while c >= 0:
            if up[c] > 0 and not reached[c]:
                reached[c] = True
                queue[tail] = c
                tail += 1
            c = sibling[c]
        for e in range(ptr[v], ptr[v + 1]):
            w = n + key[e]
            if not reached[w]:
                reached[w] = True
                queue[tail] = w
                tail += 1
    return reached[:n]
