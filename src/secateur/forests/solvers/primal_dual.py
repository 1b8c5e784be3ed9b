"""The published primal-dual scheme, with its per-tree linear programmes solved in closed form.

Relaxing "a tree uses a key only if the forest pays for it" with multipliers beta >= 0 leaves,
for every tree, a pruning problem in which nodes have prices of their own. The authors solve it
as a shortest path with CPLEX; ``best_closure``'s bottom-up recursion gives the same answer.
Each round yields a feasible pruning and an upper bound on every pruning's profit, so the
result always comes with a certified gap. Trees meet only in the sums over keys.

Two step rules. ``published`` moves along the sub-gradient of the newest iterate. ``averaged``, the
default, is Barahona and Anbil's volume algorithm: it moves from the best multipliers known along
the running mean of the iterates. After every round it also turns the multipliers into a flow that
no key's price is exceeded by and fills what is left, tree by tree, which can only lower the bound;
that is our addition and closes most of the gap where the optimum jumps. Prunings are read off the
running mean too, under either rule.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
from joblib import effective_n_jobs
from numba import njit
from numpy.typing import NDArray

from secateur.forests.closure import ClosureProblem, keys_of
from secateur.forests.solvers.interface import Cut, PrimalDualOptions
from secateur.progress import SILENT, Progress

MEMORY = 0.1
"""Largest weight of the newest pruning in the running mean, as in the volume algorithm; from
round 20 on it is 2 / round, which lets the mean settle (measured: a third of the gap left after
200 rounds, and no need to shorten the steps)."""
THRESHOLDS = (0.1, 0.5, 0.9)
ROUND_EVERY = 5
PARALLEL_FROM = 500_000
"""First-use entries from which threads pay for themselves."""


def tree_chunks(problem: ClosureProblem, parts: int) -> NDArray[np.int64]:
    """Node boundaries (parts + 1,) between whole trees, with about equal work in each part."""
    starts = np.flatnonzero(np.diff(problem.tree, prepend=-1))
    edges = np.append(starts, problem.n_nodes)
    work = problem.ptr[edges] + edges
    wanted = np.linspace(0, work[-1], parts + 1)
    return edges[np.searchsorted(work, wanted).clip(0, len(edges) - 1)].astype(np.int64)


class _Relaxation:
    """The relaxed problem at multipliers ``beta``, its trees shared out over threads."""

    def __init__(
        self, problem: ClosureProblem, price: float, pool: ThreadPoolExecutor, threads: int
    ) -> None:
        self.problem = problem
        self.net = problem.net(price)
        self.charge = price * problem.charge
        self.pool = pool
        bounds = tree_chunks(problem, min(threads, len(np.unique(problem.tree)))).tolist()
        self.chunks = list(pairwise(bounds))
        parts, keys = len(self.chunks), problem.n_keys
        # Not float32: rounded, the multipliers converge three times farther from the optimum.
        self.beta = np.zeros(len(problem.key))
        self.value = np.empty(problem.n_nodes)
        self.kept = np.zeros(problem.n_nodes, dtype=np.bool_)
        self.asked = np.zeros((parts, keys), dtype=np.bool_)
        self.offered = np.zeros((parts, keys))
        self.bought = np.zeros(keys, dtype=np.bool_)
        self.node_mean = np.zeros(problem.n_nodes, dtype=np.float32)
        self.key_mean = np.zeros(keys, dtype=np.float32)
        self.rounds = 0

    def _each_chunk(self, kernel: Any, per_chunk: list[tuple[Any, ...]]) -> float:
        """Run a kernel on every chunk of trees at once; the sum of what it returns."""
        first = (self.problem.ptr, self.problem.key)
        work = [(*first, *c, *rest) for c, rest in zip(self.chunks, per_chunk, strict=True)]
        return float(sum(self.pool.map(lambda arguments: kernel(*arguments), work)))

    def prune(self) -> tuple[float, float]:
        """Prune every tree at the present multipliers: the profit achieved, and the bound."""
        problem = self.problem
        each = (problem.parent, self.net, self.beta, self.value, self.kept)
        relaxed = self._each_chunk(
            _prune_trees,
            [
                (*each, asked, offered)
                for asked, offered in zip(self.asked, self.offered, strict=True)
            ],
        )
        paid = self.asked.any(0)
        spare = self.charge - self.offered.sum(0)
        # A key whose offers exceed its price is bought in the relaxed problem.
        self.bought = spare < 0
        memory = np.float32(min(MEMORY, 2 / self.rounds) if self.rounds else 1.0)
        self.rounds += 1
        self.node_mean += memory * (self.kept - self.node_mean)
        self.key_mean += memory * (self.bought - self.key_mean)
        profit = float(self.net[self.kept].sum()) - float(self.charge[paid].sum())
        return profit, relaxed - float(spare[self.bought].sum())

    def rounded(self) -> Iterator[tuple[float, NDArray[np.bool_]]]:
        """Prunings read off the running mean of the relaxed ones, and their profits.

        The mean converges to the programme's optimum while single iterates jump about it; it
        never rises from parent to child, so every threshold gives a closed set.
        """
        for threshold in THRESHOLDS:
            kept = self.node_mean > threshold
            paid = keys_of(self.problem.ptr, self.problem.key, kept, self.problem.n_keys)
            yield float(self.net[kept].sum()) - float(self.charge[paid].sum()), kept

    def fill(self) -> float:
        """Make the multipliers a flow within the keys' prices, and a maximal one; its bound."""
        problem = self.problem
        return float(
            _fill(
                problem.ptr, problem.key, problem.parent, self.net, self.charge,
                self.offered.sum(0), self.beta, self.value,
            )
        )  # fmt: skip

    def step(self, share: float, missing: float, start: NDArray[np.float64], mean: bool) -> bool:
        """From multipliers ``start``, along the newest (or the mean) sub-gradient.

        The length is ``share * missing / |g|^2``; ``missing`` is what bound and profit differ by.
        False if there is nowhere to go: trees and forest agree on everything.
        """
        if mean:
            along = (self.node_mean, self.key_mean)
        else:
            along = (self.kept.astype(np.float32), self.bought.astype(np.float32))
        square = self._each_chunk(_square, [(*along, start, mean)] * len(self.chunks))
        if square == 0:
            return False
        length = share * missing / square
        self._each_chunk(_update, [(*along, length, start, self.beta)] * len(self.chunks))
        return True


def solve_primal_dual(
    problem: ClosureProblem,
    price: float,
    options: PrimalDualOptions | None = None,
    progress: Progress = SILENT,
) -> Cut:
    """Sub-gradient ascent on the dual; the best pruning seen and the best bound are returned.

    Stops after ``max_iter`` rounds or when the gap is at most ``tol`` of the bound.
    """
    options = options or PrimalDualOptions()
    averaged = options.steps == "averaged"
    best_kept = np.zeros(problem.n_nodes, dtype=np.bool_)
    best_profit, best_bound = 0.0, np.inf
    history: list[tuple[float, float]] = []
    threads = effective_n_jobs(options.n_jobs) if len(problem.key) >= PARALLEL_FROM else 1
    with (
        ThreadPoolExecutor(threads) as pool,
        progress.stage("primal-dual", total=options.max_iter, unit="rounds") as advance,
    ):
        relaxation = _Relaxation(problem, price, pool, threads)
        centre = np.zeros_like(relaxation.beta) if averaged else relaxation.beta
        for iteration in range(1, options.max_iter + 1):
            profit, bound = relaxation.prune()
            if profit > best_profit:
                best_profit, best_kept = profit, relaxation.kept.copy()
            if iteration % ROUND_EVERY == 0:
                for profit, kept in relaxation.rounded():
                    if profit > best_profit:
                        best_profit, best_kept = profit, kept
            if averaged:
                bound = relaxation.fill()
                if bound < best_bound:
                    centre, relaxation.beta = relaxation.beta, centre
                share = 1.0
            else:
                share = (1 + options.step_m) / (iteration + options.step_m)
            best_bound = min(best_bound, bound)
            history.append((best_profit, best_bound))
            advance(1)
            if best_bound - best_profit <= options.tol * abs(best_bound):
                break
            missing = (best_bound if averaged else bound) - best_profit
            if not relaxation.step(share, missing, centre, averaged):
                break
    return Cut(best_kept, best_profit, best_bound, len(history), "primal_dual", np.array(history))


@njit(nogil=True, cache=True)
def _prune_trees(
    ptr: Any, key: Any, start: int, stop: int, parent: Any, net: Any, beta: Any,
    value: Any, kept: Any, asked: Any, offered: Any,
) -> float:  # fmt: skip
    """Best closures of whole trees at prices beta; who asked for what, and the sums of beta."""
    asked[:] = False
    offered[:] = 0.0
    for h in range(start, stop):
        own = 0.0
        for e in range(ptr[h], ptr[h + 1]):
            own += beta[e]
            offered[key[e]] += beta[e]
        value[h] = net[h] - own
    for h in range(stop - 1, start - 1, -1):
        if value[h] > 0 and parent[h] >= 0:
            value[parent[h]] += value[h]
    total = 0.0
    for h in range(start, stop):
        kept[h] = value[h] > 0 and (parent[h] < 0 or kept[parent[h]])
        if kept[h]:
            if parent[h] < 0:
                total += value[h]
            for e in range(ptr[h], ptr[h + 1]):
                asked[key[e]] = True
    return total


@njit(nogil=True, cache=True)
def _square(
    ptr: Any, key: Any, start: int, stop: int, of_node: Any, of_key: Any, beta: Any,
    projected: bool,
) -> float:  # fmt: skip
    """Squared length of the sub-gradient; ``projected``: without what would lead below zero."""
    total = 0.0
    for h in range(start, stop):
        for e in range(ptr[h], ptr[h + 1]):
            g = of_node[h] - of_key[key[e]]
            if g > 0 or beta[e] > 0 or not projected:
                total += g * g
    return total


@njit(nogil=True, cache=True)
def _update(
    ptr: Any, key: Any, start: int, stop: int, of_node: Any, of_key: Any, step: Any, beta: Any,
    out: Any,
) -> int:  # fmt: skip
    """Offer more where trees use what the forest does not buy, less where it is the reverse."""
    for h in range(start, stop):
        for e in range(ptr[h], ptr[h + 1]):
            moved = beta[e] + step * (of_node[h] - of_key[key[e]])
            out[e] = max(0.0, moved)
    return stop - start


@njit(nogil=True, cache=True)
def _fill(
    ptr: Any, key: Any, parent: Any, net: Any, charge: Any, offered: Any, beta: Any, value: Any
) -> float:
    """Offers cut to the prices, then, from the leaves up, spent where there is gain to spend.

    What a node gains beyond its offers goes to its keys' spare room, evenly, and the rest up
    to its parent; offers that no gain covers are taken back. Returns the relaxed bound there.
    """
    spare = charge.copy()
    for h in range(len(parent)):
        for e in range(ptr[h], ptr[h + 1]):
            k = key[e]
            if offered[k] > charge[k]:
                beta[e] *= charge[k] / offered[k]
            spare[k] -= beta[e]
    value[:] = net
    total = 0.0
    for h in range(len(parent) - 1, -1, -1):
        own, room = 0.0, 0.0
        for e in range(ptr[h], ptr[h + 1]):
            own += beta[e]
            room += max(0.0, spare[key[e]])
        left = value[h] - own
        if (left > 0 and room > 0) or (left < 0 and own > 0):
            more = min(1.0, left / room) if left > 0 else 0.0
            less = 1.0 if left > 0 else max(0.0, 1.0 + left / own)
            own = 0.0
            for e in range(ptr[h], ptr[h + 1]):
                before = beta[e]
                beta[e] = less * before + more * max(0.0, spare[key[e]])
                spare[key[e]] -= beta[e] - before
                own += beta[e]
            left = value[h] - own
        if left > 0:
            if parent[h] >= 0:
                value[parent[h]] += left
            else:
                total += left
    # Offers may exceed a price by a rounding; the bound counts that.
    for k in range(len(charge)):
        total += max(0.0, -spare[k])
    return total
