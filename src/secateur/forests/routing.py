"""Sending examples down the trees: leaves reached, features met, first uses.

The kernels release the GIL and see one tree at a time, so joblib spreads trees over threads,
processes or a cluster.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np
from joblib import Parallel, delayed
from numba import njit
from numpy.typing import NDArray

from secateur.forests.checks import ForestInputError
from secateur.forests.flat import FlatForest, FlatTree

Result = TypeVar("Result")


@njit(nogil=True, cache=True)
def _goes_left(x: float, threshold: float, missing_left: bool) -> bool:
    if np.isnan(x):
        return missing_left
    return bool(x <= threshold)


@njit(nogil=True, cache=True)
def _leaves(
    left: Any, right: Any, feature: Any, threshold: Any, missing_left: Any, x: Any, out: Any
) -> None:
    for i in range(x.shape[0]):
        h = 0
        while left[h] >= 0:
            go = _goes_left(x[i, feature[h]], threshold[h], missing_left[h])
            h = left[h] if go else right[h]
        out[i] = h


@njit(nogil=True, cache=True)
def _walk_first_uses(
    left: Any,
    right: Any,
    feature: Any,
    threshold: Any,
    missing_left: Any,
    x: Any,
    group: Any,
    n_groups: int,
    cursor: Any,
    key: Any,
) -> None:
    """Count (empty ``key``) or write first uses; ``cursor`` is the count or the next slot."""
    n = x.shape[0]
    seen = np.full(n_groups, -1, np.int64)
    write = key.shape[0] > 0
    for i in range(n):
        h = 0
        while left[h] >= 0:
            k = group[feature[h]]
            if k >= 0 and seen[k] != i:
                seen[k] = i
                if write:
                    key[cursor[h]] = k * n + i
                cursor[h] += 1
            go = _goes_left(x[i, feature[h]], threshold[h], missing_left[h])
            h = left[h] if go else right[h]


@njit(nogil=True, cache=True)
def _mark_used(
    left: Any,
    right: Any,
    feature: Any,
    threshold: Any,
    missing_left: Any,
    x: Any,
    group: Any,
    used: Any,
) -> None:
    for i in range(x.shape[0]):
        h = 0
        while left[h] >= 0:
            used[i, group[feature[h]]] = True
            go = _goes_left(x[i, feature[h]], threshold[h], missing_left[h])
            h = left[h] if go else right[h]


def _splits(tree: FlatTree) -> tuple[NDArray, NDArray, NDArray, NDArray, NDArray]:
    return tree.left, tree.right, tree.feature, tree.threshold, tree.missing_left


def over_trees(
    work: Callable[..., Result], forest: FlatForest, *rest: Any, n_jobs: int | None
) -> list[Result]:
    """``work(tree, t, *rest)`` for every tree, through whichever joblib backend is active."""
    jobs = (delayed(work)(tree, t, *rest) for t, tree in enumerate(forest.trees))
    return cast("list[Result]", Parallel(n_jobs=n_jobs, prefer="threads")(jobs))


def leaves(tree: FlatTree, x: NDArray[np.float32]) -> NDArray[np.int32]:
    """(n,) the leaf each example ends in."""
    out = np.empty(len(x), dtype=np.int32)
    _leaves(*_splits(tree), x, out)
    return out


def first_uses(
    tree: FlatTree, t: int, x: NDArray[np.float32], group: NDArray[np.int32], n_groups: int
) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Where each example first meets each priced group on its way through the unpruned tree.

    Returns:
        ``ptr`` (n_nodes + 1,) and ``key`` (entries,): node ``h`` is the first to ask for group
        ``k`` of example ``i`` for every ``k * n + i`` in ``key[ptr[h]:ptr[h + 1]]``.
    """
    count = np.zeros(len(tree), dtype=np.int64)
    _walk_first_uses(*_splits(tree), x, group, n_groups, count, np.empty(0, np.int32))
    ptr = np.zeros(len(tree) + 1, dtype=np.int64)
    np.cumsum(count, out=ptr[1:])
    key = np.empty(ptr[-1], dtype=np.int32)
    _walk_first_uses(*_splits(tree), x, group, n_groups, ptr[:-1].copy(), key)
    return ptr, key


def check_key_space(n_groups: int, n_examples: int) -> None:
    """(group, example) pairs are numbered in 32 bits.

    Raises:
        ForestInputError: too many pairs to number.
    """
    if n_groups * n_examples >= 2**31:
        raise ForestInputError(
            f"{n_groups} groups x {n_examples} examples are more than 2^31 pairs",
            field="X_val",
            value=f"{n_examples} examples",
            fix=f"estimate the cost on at most {(2**31 - 1) // n_groups} examples",
        )


def used_groups(
    forest: FlatForest, x: NDArray[np.float32], group: NDArray[np.int32], n_groups: int
) -> NDArray[np.bool_]:
    """(n, n_groups) which groups an example needs: the union over the trees."""
    used = np.zeros((len(x), n_groups), dtype=np.bool_)
    for tree in forest.trees:
        _mark_used(*_splits(tree), x, group, used)
    return used
