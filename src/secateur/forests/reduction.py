"""Making a closure problem smaller without changing its minimal optimum."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from secateur.errors import NumericsError
from secateur.forests.closure import ClosureProblem, best_closure, charges_of_nodes

MAX_ROUNDS = 8
BITS = 46
"""Gains and charges are rounded to ``2**-BITS`` of the total gain: below what float64 sums of
them resolve, and far from 2^53, up to which float64 holds whole numbers exactly."""


def in_whole_units(problem: ClosureProblem, price: float) -> tuple[ClosureProblem, float]:
    """The problem at ``price`` in whole numbers: what is left to solve has price 1 and no toll.

    The unit is a power of two that depends on the gains alone, so whole error counts stay whole
    and every rounded value is monotone in the price. Losses and charges beyond the total gain
    can never be worth it and are cut off there, so nothing overflows.

    Returns:
        The problem with whole numbers in float64 arrays, and what one of them stands for.

    Raises:
        NumericsError: the price, a gain or a charge is not finite.
    """
    if not np.isfinite(price):
        raise NumericsError(f"the price must be finite, not {price}", fix="give a finite lambda")
    if not all(np.isfinite(x).all() for x in (problem.gain, problem.toll, problem.charge)):
        raise NumericsError(
            "gains and costs must be finite", fix="look for NaN in targets or costs"
        )
    total = float(np.maximum(problem.gain, 0).sum())
    with np.errstate(over="ignore"):
        net, charge = problem.net(price), price * problem.charge
    exponent = BITS - int(np.ceil(np.log2(total))) if total > 0 else BITS
    most = 2.0 ** (BITS + 1)

    def whole(x: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.rint(np.ldexp(np.clip(x, -2 * total, 2 * total + 1), exponent).clip(-most, most))

    whole_problem = replace(
        problem, gain=whole(net), toll=np.zeros(problem.n_nodes), charge=whole(charge)
    )
    return whole_problem, float(np.ldexp(1.0, -exponent))


def reduce_problem(problem: ClosureProblem) -> tuple[ClosureProblem, NDArray[np.intp]]:
    """Reductions that hold at every price.

    Subtrees that save no loss even when features are free go; keys that one node alone uses
    become that node's toll; keys with the same users become one.

    Returns:
        The smaller problem and, for each of its nodes, the node in ``problem``.
    """
    useful, _ = best_closure(problem.parent, problem.gain)
    smaller, nodes = problem.restrict(useful)
    return merge_keys(fold_private_keys(smaller)), nodes


def fold_private_keys(problem: ClosureProblem) -> ClosureProblem:
    """Turn keys used by a single node into that node's toll."""
    users = np.bincount(problem.key, minlength=problem.n_keys)
    private = users == 1
    if not private.any():
        return problem
    own = charges_of_nodes(problem.ptr, problem.key, np.where(private, problem.charge, 0.0))
    return replace(problem.without_keys(private), toll=problem.toll + own)


def merge_keys(problem: ClosureProblem, seed: int = 0) -> ClosureProblem:
    """Add up the charges of keys that exactly the same nodes use.

    Users are compared by two independent 64-bit sums of random node marks; that two different
    sets share both is less likely than a memory error.
    """
    if problem.n_keys == 0:
        return problem
    marks = np.random.default_rng(seed).integers(
        0, 2**64, size=(2, problem.n_nodes), dtype=np.uint64
    )
    first, second = _signatures(problem.ptr, problem.key, marks, problem.n_keys)
    order = np.lexsort((second, first))
    new = np.ones(problem.n_keys, dtype=np.bool_)
    new[1:] = (np.diff(first[order]) != 0) | (np.diff(second[order]) != 0)
    if new.all():
        return problem
    rank = np.empty(problem.n_keys, dtype=np.int64)
    rank[order] = np.cumsum(new) - 1
    # Numbered by first appearance, so that first-use lists stay ascending.
    leader = np.full(int(new.sum()), problem.n_keys, dtype=np.int64)
    np.minimum.at(leader, rank, np.arange(problem.n_keys))
    dropped = np.ones(problem.n_keys, dtype=np.bool_)
    dropped[leader] = False
    charge = problem.charge.copy()
    charge[leader] = np.bincount(rank, weights=problem.charge)
    return replace(problem, charge=charge).without_keys(dropped)


def settle_at_price(
    problem: ClosureProblem, price: float
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Nodes whose fate at ``price`` is plain: closed sets ``lower <= optimum <= upper``.

    A subtree that does not pay even if others bought all its shared keys is out. One that pays
    even if it bought them all itself is in as soon as its parent is; what it buys is then free
    for everybody, which settles more, hence the rounds.
    """
    net = problem.net(price)
    upper, _ = best_closure(problem.parent, net)
    lower = np.zeros(problem.n_nodes, dtype=np.bool_)
    charge = price * problem.charge
    for _ in range(MAX_ROUNDS):
        alone = np.where(upper, net - charges_of_nodes(problem.ptr, problem.key, charge), -np.inf)
        sure, _ = best_closure(problem.parent, alone)
        if (sure == lower).all():
            break
        lower = sure
        charge = charge.copy()
        _make_free(problem.ptr, problem.key, lower, charge)
    return upper, lower


@njit(nogil=True, cache=True)
def _make_free(ptr: Any, key: Any, kept: Any, charge: Any) -> None:
    for h in range(len(kept)):
        if kept[h]:
            for e in range(ptr[h], ptr[h + 1]):
                charge[key[e]] = 0.0


@njit(nogil=True, cache=True)
def _signatures(ptr: Any, key: Any, marks: Any, n_keys: int) -> Any:
    first = np.zeros(n_keys, np.uint64)
    second = np.zeros(n_keys, np.uint64)
    for h in range(len(ptr) - 1):
        for e in range(ptr[h], ptr[h + 1]):
            first[key[e]] += marks[0, h]
            second[key[e]] += marks[1, h]
    return first, second
