"""The published primal-dual scheme, with its per-tree linear programmes solved in closed form.

Relaxing "a tree uses a key only if the forest pays for it" with multipliers beta >= 0 leaves,
for every tree, a pruning problem in which nodes have prices of their own. The authors solve it
as a shortest path with CPLEX; ``best_closure``'s bottom-up recursion gives the same answer.
Each round yields a feasible pruning and an upper bound on every pruning's profit, so the
result always comes with a certified gap. Trees meet only in the sums over keys.

One thing is added: prunings are also read off the running mean of the iterates (Barahona and
Anbil's volume algorithm), which finds good ones where single iterates jump between extremes.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
from joblib import cpu_count
from numba import njit
from numpy.typing import NDArray

from secateur.forests.closure import ClosureProblem, keys_of
from secateur.forests.solvers.interface import Cut, PrimalDualOptions
from secateur.progress import SILENT, Progress

MEMORY = 0.1
"""Weight of the newest pruning in the running mean (as in the volume algorithm)."""
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

    def __init__(self, problem: ClosureProblem, price: float, pool: ThreadPoolExecutor) -> None:
        self.problem = problem
        self.net = problem.net(price)
        self.charge = price * problem.charge
        self.pool = pool
        threads = cpu_count() if len(problem.key) >= PARALLEL_FROM else 1
        bounds = tree_chunks(problem, min(threads, len(np.unique(problem.tree)))).tolist()
        self.chunks = list(pairwise(bounds))
        parts, keys = len(self.chunks), problem.n_keys
        self.beta = np.zeros(len(problem.key), dtype=np.float32)
        self.value = np.empty(problem.n_nodes)
        self.kept = np.zeros(problem.n_nodes, dtype=np.bool_)
        self.asked = np.zeros((parts, keys), dtype=np.bool_)
        self.offered = np.zeros((parts, keys))
        self.bought = np.zeros(keys, dtype=np.bool_)
        self.average = np.zeros(problem.n_nodes)

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
        self.average += MEMORY * (self.kept - self.average)
        paid = self.asked.any(0)
        spare = self.charge - self.offered.sum(0)
        # A key whose offers exceed its price is bought in the relaxed problem.
        self.bought = spare < 0
        profit = float(self.net[self.kept].sum()) - float(self.charge[paid].sum())
        return profit, relaxed - float(spare[self.bought].sum())

    def rounded(self) -> Iterator[tuple[float, NDArray[np.bool_]]]:
        """Prunings read off the running mean of the relaxed ones, and their profits.

        The mean converges to the programme's optimum while single iterates jump about it; it
        never rises from parent to child, so every threshold gives a closed set.
        """
        for threshold in THRESHOLDS:
            kept = self.average > threshold
            paid = keys_of(self.problem.ptr, self.problem.key, kept, self.problem.n_keys)
            yield float(self.net[kept].sum()) - float(self.charge[paid].sum()), kept

    def disagreement(self) -> float:
        """First uses on which a tree and the forest differ: the squared sub-gradient."""
        return self._each_chunk(_disagreement, [(self.kept, self.bought)] * len(self.chunks))

    def step(self, length: float) -> None:
        """Move the multipliers along the sub-gradient."""
        each = (self.kept, self.bought, np.float32(length), self.beta)
        self._each_chunk(_update, [each] * len(self.chunks))


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
    best_kept = np.zeros(problem.n_nodes, dtype=np.bool_)
    best_profit, best_bound = 0.0, np.inf
    history: list[tuple[float, float]] = []
    with (
        ThreadPoolExecutor(cpu_count()) as pool,
        progress.stage("primal-dual", total=options.max_iter, unit="rounds") as advance,
    ):
        relaxation = _Relaxation(problem, price, pool)
        for iteration in range(1, options.max_iter + 1):
            profit, bound = relaxation.prune()
            if profit > best_profit:
                best_profit, best_kept = profit, relaxation.kept.copy()
            if iteration % ROUND_EVERY == 0:
                for profit, kept in relaxation.rounded():
                    if profit > best_profit:
                        best_profit, best_kept = profit, kept
            best_bound = min(best_bound, bound)
            history.append((best_profit, best_bound))
            advance(1)
            disagreement = relaxation.disagreement()
            if best_bound - best_profit <= options.tol * abs(best_bound) or disagreement == 0:
                break
            m = options.step_m
            relaxation.step((1 + m) / (iteration + m) * (bound - best_profit) / disagreement)
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
def _disagreement(ptr: Any, key: Any, start: int, stop: int, kept: Any, bought: Any) -> int:
    """Entries on which a tree and the forest disagree: the squared sub-gradient."""
    count = 0
    for h in range(start, stop):
        for e in range(ptr[h], ptr[h + 1]):
            if kept[h] != bought[key[e]]:
                count += 1
    return count


@njit(nogil=True, cache=True)
def _update(
    ptr: Any, key: Any, start: int, stop: int, kept: Any, bought: Any, step: Any, beta: Any
) -> int:
    """Offer more where a tree uses what the forest did not buy, less where it is the reverse."""
    for h in range(start, stop):
        for e in range(ptr[h], ptr[h + 1]):
            if kept[h] and not bought[key[e]]:
                beta[e] += step
            elif not kept[h] and bought[key[e]]:
                beta[e] = max(np.float32(0.0), beta[e] - step)
    return stop - start
