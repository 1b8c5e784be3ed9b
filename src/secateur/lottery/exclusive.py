"""Pools whose neurons serve one slot each: first come first served, or by maximum matching.

With a one-to-one attribution every kept neuron has one in-edge and one out-edge, as in the batch
sampling argument of Orseau et al.; the random network needs about one neuron per bit, without the
extra logarithm of the union bound.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import maximum_bipartite_matching

from secateur.lottery.drawing import draw, have_numba
from secateur.lottery.philox import ROLE_IN, ROLE_OUT
from secateur.lottery.search import Floats, Ints, Picks, Pools, on_all_cores


def bitwise(
    pools: Pools, sign: int, demand: Floats, edges: Floats, kind: str, engine: str = "torch"
) -> Picks:
    """Like ``search.bitwise``; ``kind`` is ``batch`` (compiled, if ``engine`` is) or ``matching``."""
    bits = len(edges) - 1
    if kind == "batch" and engine == "compiled":
        return _compiled(pools, sign, demand, edges)
    neurons = np.full((*demand.shape, bits), -1, np.int64)
    residual, empty = np.abs(demand), np.zeros(len(demand), np.int64)
    assign = _first_come if kind == "batch" else _matching
    for p in range(len(demand)):
        if not demand[p].any():
            continue
        usable, product, interval = _tile(pools, p, sign, demand[p], edges)
        if not len(usable):  # no neuron of the in-sign: every bit is missing
            empty[p] = bits * int((demand[p] != 0).sum())
            continue
        slots, residual[p], empty[p] = assign(np.abs(demand[p]), product, interval, edges)
        neurons[p] = np.where(slots >= 0, usable[slots], -1)
    return Picks(neurons, residual, empty)


def _compiled(pools: Pools, sign: int, demand: Floats, edges: Floats) -> Picks:
    """``_first_come`` for all pools, on all cores, without drawing what nobody waits for."""
    from secateur.lottery import compiled

    picks = np.empty((*demand.shape, len(edges) - 1), np.int32)
    residual, empty = np.empty(demand.shape), np.zeros(len(demand), np.int64)
    rows: list[Any] = [pools.ids, pools.columns, pools.first_out, pools.sizes]
    rows += [np.ascontiguousarray(demand), ..., picks, residual, empty]
    on_all_cores(compiled.first_come, (*pools.compiled_head(), sign), rows, [edges])
    return Picks(picks, residual, empty)


def _tile(
    pools: Pools, p: int, sign: int, demand: Floats, edges: Floats
) -> tuple[Ints, Floats, Ints]:
    """Usable neurons (m,), products (m, O) and their intervals (m, O), -1 where unfit."""
    members = np.arange(pools.sizes[p])
    address = (pools.law, pools.seed, pools.layer)
    a = draw(*address, ROLE_IN, pools.ids[p], members, pools.columns[p]).astype(np.float64)
    usable = members[a * sign > 0]
    outputs = pools.first_out[p] + np.arange(len(demand))
    b = draw(*address, ROLE_OUT, pools.ids[p], usable[:, None], outputs).astype(np.float64)
    product = np.abs(a[a * sign > 0])[:, None] * np.abs(b)
    # searchsorted wants ascending ends; interval i is [edges[i + 1], edges[i]].
    interval = len(edges) - 1 - np.searchsorted(edges[::-1], product, side="left")
    fits = ((b > 0) == (demand > 0)) & (demand != 0)
    fits &= (product <= edges[0]) & (product >= edges[-1])
    return usable, product, np.where(fits, np.clip(interval, 0, len(edges) - 2), -1)


def _assign(interval: Any, slots: Any) -> None:
    """Give each neuron, as it comes, to an output whose slot of that interval is still open.

    interval (m, O), -1 where unfit; slots (O, k), -1 where open. Outputs are tried in turn from a
    place that moves on with every neuron, so that all fill up alike.
    """
    neurons, outputs = interval.shape
    left = (slots < 0).sum()
    for m in range(neurons):
        if left == 0:
            return
        for step in range(outputs):
            o = (m + step) % outputs
            i = interval[m, o]
            if i >= 0 and slots[o, i] < 0:
                slots[o, i] = m
                left -= 1
                break


@cache
def _assigner() -> Any:
    """``_assign``, compiled where numba is there."""
    if not have_numba():
        return _assign
    from numba import njit

    return njit(cache=True)(_assign)


def _first_come(
    want: Floats, product: Floats, interval: Ints, edges: Floats
) -> tuple[Ints, Floats, int]:
    """Fill every slot of every output in the order the neurons come; then decide greedily."""
    outputs, bits = len(want), len(edges) - 1
    slots = np.full((outputs, bits), -1, np.int64)
    slots[want == 0] = 0  # nothing wanted: closed from the start
    _assigner()(np.ascontiguousarray(interval), slots)
    slots[want == 0] = -1
    everyone = np.arange(outputs)
    rest, empty = want.copy(), 0
    for i in range(bits):
        there = slots[:, i] >= 0
        value = np.where(there, product[slots[:, i], everyone], np.inf)
        empty += int((~there & (rest > edges[i]) & (want > 0)).sum())
        take = rest >= value
        slots[~take, i] = -1
        rest[take] -= value[take]
    return slots, rest, empty


def _matching(
    want: Floats, product: Floats, interval: Ints, edges: Floats
) -> tuple[Ints, Floats, int]:
    """From coarse to fine, match the outputs that take bit i with neurons not yet used.

    While the rest exceeds ``edges[i]`` the bit is needed, and those outputs are matched first. An
    output whose rest lies inside the interval may do without it (the lemma's invariant already
    holds), but is better off with it, if a product is left that fits.
    """
    outputs, bits = len(want), len(edges) - 1
    slots = np.full((outputs, bits), -1, np.int64)
    rest, empty = want.copy(), 0
    unused: NDArray[np.bool_] = np.ones(len(product), bool)
    for i in range(bits):
        needed = (rest > edges[i]).nonzero()[0]
        useful = ((rest <= edges[i]) & (rest > edges[i + 1])).nonzero()[0]
        for rows, must in ((needed, True), (useful, False)):
            if not rows.size:
                continue
            fits = (interval[:, rows] == i) & unused[:, None] & (product[:, rows] <= rest[rows])
            match = maximum_bipartite_matching(csr_matrix(fits.T), perm_type="column")
            met = match >= 0
            empty += int((~met).sum()) if must else 0
            slots[rows[met], i] = match[met]
            rest[rows[met]] -= product[match[met], rows[met]]
            unused[match[met]] = False
    return slots, rest, empty
