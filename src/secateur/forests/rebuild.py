"""A pruned forest as a genuine scikit-learn forest: trees are rebuilt, not edited in place."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray
from sklearn.tree._tree import Tree

from secateur.forests.flat import FlatForest

STALE = ("oob_score_", "oob_decision_function_", "oob_prediction_", "estimators_samples_")


def rebuild_tree(tree: Any, kept: NDArray[np.bool_]) -> Tree:
    """The tree whose nodes outside ``kept`` (n_nodes,) have become leaves.

    Nodes keep their impurity, value and sample counts, so a cut node predicts with its own
    training distribution; they are renumbered in pre-order, and depth and counts are recomputed.
    """
    state = tree.__getstate__()
    nodes, values = state["nodes"], state["values"]
    order, left, right, depth = _preorder(nodes["left_child"], nodes["right_child"], kept)
    new = nodes[order].copy()
    new["left_child"], new["right_child"] = left, right
    leaf = left < 0
    new["feature"][leaf] = -2
    new["threshold"][leaf] = -2.0
    new["missing_go_to_left"][leaf] = 0
    n_features, n_classes, n_outputs = tree.__reduce__()[1]
    rebuilt = Tree(n_features, n_classes, n_outputs)
    rebuilt.__setstate__(
        {
            **state,
            "max_depth": depth,
            "node_count": len(order),
            "nodes": new,
            "values": np.ascontiguousarray(values[order]),
        }
    )
    return rebuilt


@njit(nogil=True, cache=True)
def _preorder(left: Any, right: Any, kept: Any) -> Any:
    """Old numbers in new order, the new children, and the depth of the pruned tree."""
    n = len(left)
    order = np.empty(n, np.int64)
    new_left = np.full(n, -1, np.int64)
    new_right = np.full(n, -1, np.int64)
    # The right child waits on the stack, with its parent's new number, while the left is walked.
    waiting = np.empty((n + 1, 3), np.int64)
    waiting[0] = np.array([0, 0, -1])
    size, count, deepest = 1, 0, 0
    while size > 0:
        size -= 1
        h, level, parent = waiting[size]
        if parent >= 0:
            new_right[parent] = count
        while True:
            order[count] = h
            deepest = max(deepest, level)
            number = count
            count += 1
            if left[h] < 0 or not kept[h]:
                break
            new_left[number] = count
            waiting[size, 0], waiting[size, 1], waiting[size, 2] = right[h], level + 1, number
            size += 1
            h, level = left[h], level + 1
    return order[:count], new_left[:count], new_right[:count], deepest


def rebuild_forest(
    forest: Any, flat: FlatForest, kept: NDArray[np.bool_], *, drop_stumps: bool = False
) -> Any:
    """A copy of ``forest`` pruned to ``kept`` (all nodes of all trees).

    Args:
        drop_stumps: leave out trees cut to their root, which only vote for the prior. One is
            left if all are. Off by default, as published: the vote of all trees is what the
            error was estimated for.
    """
    per_tree = list(flat.split(kept))
    if drop_stumps:
        alive = [t for t, keep in enumerate(per_tree) if keep.any()] or [0]
    else:
        alive = list(range(len(per_tree)))
    return with_trees(
        forest,
        ((forest.estimators_[t], rebuild_tree(forest.estimators_[t].tree_, per_tree[t]))
         for t in alive),
    )  # fmt: skip


def with_trees(forest: Any, trees: Iterable[tuple[Any, Tree]]) -> Any:
    """A copy of a fitted forest holding the given (estimator to copy, its new tree) pairs."""
    pruned = copy.copy(forest)
    pruned.estimators_ = [_with_tree(estimator, tree) for estimator, tree in trees]
    pruned.n_estimators = len(pruned.estimators_)
    for name in STALE:
        pruned.__dict__.pop(name, None)
    return pruned


def _with_tree(estimator: Any, tree: Tree) -> Any:
    copied = copy.copy(estimator)
    copied.tree_ = tree
    return copied
