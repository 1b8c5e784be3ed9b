"""BudgetPrune's programme as what it is: a maximum-weight closure.

Nan, Wang and Saligrama, "Pruning Random Forests for Prediction on a Budget" (NIPS 2016), state
pruning as a 0-1 programme over leaf indicators. With ``a_h = 1`` for nodes that stay internal
it reads: choose a set of nodes, with every node its parent, to maximise

    sum_h (gain_h - price * toll_h) a_h  -  price * sum_key charge_key * w_key,

where a chosen node pays for every key it is the first to use, and a key, one (feature group,
example) pair, is paid once however many trees ask for it. Every constraint is a difference of
two variables, hence the total unimodularity; the optimum is one minimum cut.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray


@dataclass(frozen=True)
class ClosureProblem:
    """A closure problem over internal nodes, parents before children.

    Attributes:
        parent: (n,) int32, -1 at roots.
        tree: (n,) int32, rising: which tree a node belongs to.
        gain: (n,) float64, the loss saved by keeping the node, in raw loss units.
        toll: (n,) float64, costs the node pays for itself alone (keys no other node uses).
        ptr, key: the keys each node is the first to use, ``key[ptr[h]:ptr[h + 1]]``.
        charge: (n_keys,) float64, expected cost of each key.
    """

    parent: NDArray[np.int32]
    tree: NDArray[np.int32]
    gain: NDArray[np.float64]
    toll: NDArray[np.float64]
    ptr: NDArray[np.int64]
    key: NDArray[np.int32]
    charge: NDArray[np.float64]

    @property
    def n_nodes(self) -> int:
        """Internal nodes still in question."""
        return len(self.parent)

    @property
    def n_keys(self) -> int:
        """(group, example) pairs still in question."""
        return len(self.charge)

    def net(self, price: float) -> NDArray[np.float64]:
        """(n,) what a node brings before shared keys: gain less its own toll."""
        return self.gain - price * self.toll

    def measure(self, kept: NDArray[np.bool_]) -> tuple[float, float]:
        """Total gain and total cost of a closed set of nodes."""
        paid = keys_of(self.ptr, self.key, kept, self.n_keys)
        cost = float(self.toll[kept].sum()) + float(self.charge[paid].sum())
        return float(self.gain[kept].sum()), cost

    def profit(self, kept: NDArray[np.bool_], price: float) -> float:
        """The objective that solvers maximise."""
        gain, cost = self.measure(kept)
        return gain - price * cost

    def is_closed(self, kept: NDArray[np.bool_]) -> bool:
        """Whether every kept node's parent is kept."""
        child = self.parent >= 0
        return not (kept[child] & ~kept[self.parent[child]]).any()

    def without_keys(self, dropped: NDArray[np.bool_]) -> ClosureProblem:
        """The problem in which the ``dropped`` (n_keys,) keys cost nothing."""
        ptr, key = _select(self.ptr, self.key, np.arange(self.n_nodes), dropped)
        renumber = (np.cumsum(~dropped) - 1).astype(np.int32)
        return replace(self, ptr=ptr, key=renumber[key], charge=self.charge[~dropped])

    def restrict(
        self, upper: NDArray[np.bool_], lower: NDArray[np.bool_] | None = None
    ) -> tuple[ClosureProblem, NDArray[np.intp]]:
        """The problem left when nodes outside ``upper`` are gone and those in ``lower`` stay.

        Keys that ``lower`` pays for become free. Both sets must be closed.

        Returns:
            The smaller problem and, for each of its nodes, the node here.
        """
        free = upper if lower is None else upper & ~lower
        paid = (
            np.zeros(self.n_keys, dtype=np.bool_)
            if lower is None
            else keys_of(self.ptr, self.key, lower, self.n_keys)
        )
        nodes = np.flatnonzero(free)
        number = np.full(self.n_nodes + 1, -1, dtype=np.int32)
        number[nodes] = np.arange(len(nodes), dtype=np.int32)
        ptr, key = _select(self.ptr, self.key, nodes, paid)
        used = np.zeros(self.n_keys, dtype=np.bool_)
        used[key] = True
        renumber = (np.cumsum(used) - 1).astype(np.int32)
        smaller = ClosureProblem(
            parent=number[self.parent[nodes]],
            tree=self.tree[nodes],
            gain=self.gain[nodes],
            toll=self.toll[nodes],
            ptr=ptr,
            key=renumber[key],
            charge=self.charge[used],
        )
        return smaller, nodes


@njit(nogil=True, cache=True)
def keys_of(ptr: Any, key: Any, kept: Any, n_keys: int) -> Any:
    """(n_keys,) bool: the keys that the kept nodes use."""
    paid = np.zeros(n_keys, np.bool_)
    for h in range(len(kept)):
        if kept[h]:
            for e in range(ptr[h], ptr[h + 1]):
                paid[key[e]] = True
    return paid


@njit(nogil=True, cache=True)
def _select(ptr: Any, key: Any, nodes: Any, dropped: Any) -> Any:
    """First-use lists of ``nodes`` without the dropped keys."""
    new_ptr = np.zeros(len(nodes) + 1, np.int64)
    for j in range(len(nodes)):
        count = 0
        for e in range(ptr[nodes[j]], ptr[nodes[j] + 1]):
            if not dropped[key[e]]:
                count += 1
        new_ptr[j + 1] = new_ptr[j] + count
    new_key = np.empty(new_ptr[-1], np.int32)
    for j in range(len(nodes)):
        at = new_ptr[j]
        for e in range(ptr[nodes[j]], ptr[nodes[j] + 1]):
            if not dropped[key[e]]:
                new_key[at] = key[e]
                at += 1
    return new_ptr, new_key


@njit(nogil=True, cache=True)
def best_closure(parent: Any, net: Any) -> Any:
    """Best closed set when every node has a weight of its own: the bottom-up recursion.

    ``V(h) = net_h + sum over children of max(0, V(child))``; a node stays iff its value is
    strictly positive and its parent stays, which gives the smallest optimal set.

    Returns:
        kept (n,) bool and the total value.
    """
    n = len(parent)
    value = net.copy()
    for h in range(n - 1, -1, -1):
        if value[h] > 0 and parent[h] >= 0:
            value[parent[h]] += value[h]
    kept = np.zeros(n, np.bool_)
    total = 0.0
    for h in range(n):
        if value[h] > 0 and (parent[h] < 0 or kept[parent[h]]):
            kept[h] = True
            if parent[h] < 0:
                total += value[h]
    return kept, total


@njit(nogil=True, cache=True)
def charges_of_nodes(ptr: Any, key: Any, charge: Any) -> Any:
    """(n,) what each node would pay if it were alone."""
    out = np.zeros(len(ptr) - 1)
    for h in range(len(out)):
        for e in range(ptr[h], ptr[h + 1]):
            out[h] += charge[key[e]]
    return out
