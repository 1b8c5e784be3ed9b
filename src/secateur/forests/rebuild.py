"""A pruned forest as a genuine scikit-learn forest: trees are rebuilt, not edited in place."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import numpy as np
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
    order: list[int] = []
    children: list[tuple[int, int]] = []
    depth = 0
    # (old node, its depth, its parent's new number, whether it is a left child)
    stack: list[tuple[int, int, int, bool]] = [(0, 0, -1, True)]
    while stack:
        h, level, parent, is_left = stack.pop()
        number = len(order)
        order.append(h)
        children.append((-1, -1))
        depth = max(depth, level)
        if parent >= 0:
            left, right = children[parent]
            children[parent] = (number, right) if is_left else (left, number)
        if kept[h] and nodes["left_child"][h] >= 0:
            stack.append((int(nodes["right_child"][h]), level + 1, number, False))
            stack.append((int(nodes["left_child"][h]), level + 1, number, True))
    new = nodes[order].copy()
    new["left_child"], new["right_child"] = np.array(children, dtype=np.int64).T
    leaf = new["left_child"] < 0
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
