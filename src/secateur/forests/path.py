"""Every optimum at once: prunings are nested in the price of features, so one number per node,
the price at which it goes, describes them all.

An optimal pruning is a line ``loss + price * cost`` and the optima over all prices are the
lower envelope of these lines. Two optima meet where their lines cross; either no pruning is
better there, and the crossing is a breakpoint, or a cut at that price finds one between them
(Eisner and Severance, 1976). Nested optima make each further cut smaller than the last: what
the cheaper one keeps is kept, what the dearer one cuts is cut.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np
from numpy.typing import NDArray

from secateur.forests.closure import ClosureProblem, best_closure, charges_of_nodes
from secateur.forests.reduction import fold_private_keys, merge_keys
from secateur.forests.solvers import Cut, solve
from secateur.progress import SILENT, Progress

MarginalSolver = Callable[[ClosureProblem, float], Cut]


@dataclass(frozen=True)
class PricePath:
    """All optimal prunings, from the cheapest to the most accurate.

    Attributes:
        cut_at: (n,) the price at which each node goes; a node stays at prices below. ``inf`` for
            nodes that cost nothing, 0 for nodes that never help.
        breakpoints: (b,) falling prices at which the optimum changes.
        gain, cost: (b + 1,) raw gain and expected cost of the optimum above the first
            breakpoint, between neighbours, and below the last.
        complete: False if some breakpoints were left out; every point listed is optimal still.
        cuts: minimum cuts it took.
    """

    cut_at: NDArray[np.float64]
    breakpoints: NDArray[np.float64]
    gain: NDArray[np.float64]
    cost: NDArray[np.float64]
    complete: bool
    cuts: int

    def kept(self, price: float) -> NDArray[np.bool_]:
        """The pruning in force at ``price``; at a breakpoint, the smaller one."""
        return self.cut_at > price

    def kept_at_point(self, point: int) -> NDArray[np.bool_]:
        """The pruning of point ``point`` of ``gain`` and ``cost``."""
        below = np.inf if point == 0 else self.breakpoints[point - 1]
        return self.cut_at >= below if point else np.isinf(self.cut_at)


@dataclass
class _Gap:
    """Two known optima and the problem of what may lie between them."""

    problem: ClosureProblem
    nodes: NDArray[np.intp]
    gain: float
    cost: float

    @property
    def price(self) -> float:
        """Where their lines cross."""
        return self.gain / self.cost

    @property
    def weight(self) -> float:
        """The largest area between chord and envelope that could be hidden here."""
        return self.gain * self.cost


def ends(problem: ClosureProblem) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """The pruning when features are priceless and the one when they are free."""
    dearest, _ = best_closure(problem.parent, problem.gain)
    costly = problem.toll + charges_of_nodes(problem.ptr, problem.key, problem.charge) > 0
    cheapest, _ = best_closure(problem.parent, np.where(costly, -np.inf, problem.gain))
    return cheapest, dearest


class Envelope:
    """The envelope between the two ends, opened one cut at a time."""

    def __init__(
        self, problem: ClosureProblem, solver: str = "auto", progress: Progress = SILENT
    ) -> None:
        self.problem = problem
        self.solver = solver
        self.progress = progress
        self.cuts = 0
        cheapest, dearest = ends(problem)
        self.cut_at = np.where(cheapest, np.inf, 0.0)
        self.base_gain, self.base_cost = problem.measure(cheapest)
        self.first = self._gap(problem, np.arange(problem.n_nodes), cheapest, dearest)

    def _gap(
        self,
        problem: ClosureProblem,
        nodes: NDArray[np.intp],
        lower: NDArray[np.bool_] | None,
        upper: NDArray[np.bool_],
    ) -> _Gap | None:
        inner, inside = problem.restrict(upper, lower)
        if inner.n_nodes == 0:
            return None
        inner = merge_keys(fold_private_keys(inner))
        gain, cost = inner.measure(np.ones(inner.n_nodes, dtype=np.bool_))
        if cost <= 0:
            # Only rounding separates these nodes from free ones.
            self.cut_at[nodes[inside]] = np.inf
            return None
        return _Gap(inner, nodes[inside], gain, cost)

    def open(self, gap: _Gap) -> tuple[_Gap | None, _Gap | None] | None:
        """Cut at the crossing; the dearer and the cheaper gap found, or None: a breakpoint."""
        cut = solve(gap.problem, gap.price, self.solver)
        self.cuts += 1
        some = 0 < cut.kept.sum() < gap.problem.n_nodes
        # Beyond what float64 sums can tell apart there is no pruning in between.
        noise = 1e-11 * abs(gap.gain)
        if not some or cut.profit <= noise:
            return None
        every = np.ones_like(cut.kept)
        dear = self._gap(gap.problem, gap.nodes, cut.kept, every)
        cheap = self._gap(gap.problem, gap.nodes, None, cut.kept)
        return dear, cheap

    def close(self, gap: _Gap) -> None:
        """Take the gap's crossing for a breakpoint."""
        self.cut_at[gap.nodes] = gap.price

    def path(self, complete: bool) -> PricePath:
        """The path as known now."""
        finite = self.cut_at[(self.cut_at > 0) & np.isfinite(self.cut_at)]
        prices = np.unique(finite)[::-1]
        gain, cost = [self.base_gain], [self.base_cost]
        for total_gain, total_cost in _measure_levels(self.problem, self.cut_at, prices):
            gain.append(total_gain)
            cost.append(total_cost)
        return PricePath(self.cut_at, prices, np.array(gain), np.array(cost), complete, self.cuts)


def full_path(
    problem: ClosureProblem,
    *,
    points: int | None = None,
    solver: str = "auto",
    progress: Progress = SILENT,
) -> PricePath:
    """The whole path, or ``points`` of its points, those that matter most first.

    Args:
        points: stop when this many optimal prunings are known; None for every breakpoint.
    """
    envelope = Envelope(problem, solver, progress)
    order = count()
    heap: list[tuple[float, int, _Gap]] = []

    def push(gap: _Gap | None) -> None:
        if gap is not None:
            heapq.heappush(heap, (-gap.weight, next(order), gap))

    push(envelope.first)
    known = 2
    with progress.stage("price path", total=points, unit="points") as advance:
        advance(2)
        while heap and (points is None or known < points):
            _, _, gap = heapq.heappop(heap)
            opened = envelope.open(gap)
            if opened is None:
                envelope.close(gap)
                continue
            known += 1
            advance(1)
            for part in opened:
                push(part)
    complete = not heap
    for _, _, gap in heap:
        envelope.close(gap)
    return envelope.path(complete)


def grid_path(
    problem: ClosureProblem,
    prices: Sequence[float],
    *,
    solver: str = "auto",
    progress: Progress = SILENT,
) -> PricePath:
    """The optima at given prices: the middle one first, so that each cut narrows the rest."""
    grid = np.unique(np.asarray(prices, dtype=np.float64))
    cheapest, dearest = ends(problem)
    cut_at = np.where(cheapest, np.inf, 0.0)
    cuts = 0
    inner, nodes = problem.restrict(dearest, cheapest)

    with progress.stage("price grid", total=len(grid), unit="prices") as advance:

        def between(part: ClosureProblem, nodes: NDArray[np.intp], low: int, high: int) -> None:
            """Nodes kept below price ``low`` and cut from price ``high`` on."""
            nonlocal cuts
            if part.n_nodes == 0 or low == high:
                advance(high - low)
                # Nodes that outlast the grid count as kept for good; nobody asked beyond it.
                cut_at[nodes] = grid[high] if high < len(grid) else np.inf
                return
            middle = (low + high) // 2
            part = merge_keys(fold_private_keys(part))
            kept = solve(part, grid[middle], solver).kept
            cuts += 1
            advance(1)
            every = np.ones_like(kept)
            stay, inside = part.restrict(kept)
            between(stay, nodes[inside], middle + 1, high)
            go, inside = part.restrict(every, kept)
            between(go, nodes[inside], low, middle)

        between(inner, nodes, 0, len(grid))
    base = problem.measure(np.isinf(cut_at))
    levels = np.unique(cut_at[(cut_at > 0) & np.isfinite(cut_at)])[::-1]
    points = [base, *_measure_levels(problem, cut_at, levels)]
    gain, cost = np.array(points).T
    return PricePath(cut_at, levels, gain, cost, False, cuts)


def bracket(
    problem: ClosureProblem, budget: float, *, solver: str = "auto", progress: Progress = SILENT
) -> tuple[PricePath, int]:
    """The two neighbouring optima with cost at most and above ``budget``.

    Returns:
        A path whose listed points are the optima met on the way, and the index of the point
        within the budget; the next one, if any, is its neighbour above. Index -1: even the
        cheapest pruning costs more.
    """
    limit = budget * (1 + 1e-9)  # sums of costs drift by rounding
    envelope = Envelope(problem, solver, progress)
    gap = envelope.first
    spent = envelope.base_cost
    aside: list[_Gap] = []
    with progress.stage("budget", unit="cuts") as advance:
        while gap is not None and spent + gap.cost > limit:
            opened = envelope.open(gap)
            advance(1)
            if opened is None:
                envelope.close(gap)
                break
            dear, cheap = opened
            middle = spent + (cheap.cost if cheap else 0.0)
            if middle <= limit:
                if cheap:
                    aside.append(cheap)
                spent, gap = middle, dear
            else:
                if dear:
                    aside.append(dear)
                gap = cheap
        else:
            if gap is not None:
                aside.append(gap)
    for other in aside:
        envelope.close(other)
    path = envelope.path(complete=False)
    within = np.flatnonzero(path.cost <= limit)
    return path, int(within[-1]) if len(within) else -1


def _measure_levels(
    problem: ClosureProblem, cut_at: NDArray[np.float64], prices: NDArray[np.float64]
) -> list[tuple[float, float]]:
    """Gain and cost of ``cut_at >= price`` for falling prices, in one pass over the keys."""
    if len(prices) == 0:
        return []
    # A key is paid from the highest price at which one of its users stays.
    paid_from = np.zeros(problem.n_keys)
    np.maximum.at(paid_from, problem.key, np.repeat(cut_at, np.diff(problem.ptr)))
    rising = prices[::-1]

    def at_least(level: NDArray[np.float64], amount: NDArray[np.float64]) -> NDArray[np.float64]:
        slot = np.searchsorted(rising, level, side="right")
        sums = np.bincount(slot, weights=amount, minlength=len(rising) + 1)
        return np.cumsum(sums[::-1])[:-1].astype(np.float64)

    gain = at_least(cut_at, problem.gain)
    cost = at_least(cut_at, problem.toll) + at_least(paid_from, problem.charge)
    return list(zip(gain.tolist(), cost.tolist(), strict=True))
