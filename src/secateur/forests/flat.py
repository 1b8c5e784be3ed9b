"""A forest as flat arrays: what every kernel here walks over."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

LEAF = -1


@dataclass(frozen=True)
class FlatTree:
    """One tree. Children come after their parents, as scikit-learn stores them.

    Attributes:
        left, right: (n_nodes,) int32, ``LEAF`` at leaves.
        feature: (n_nodes,) int32, negative at leaves.
        threshold: (n_nodes,) float64; an example goes left if ``float32(x) <= threshold``.
        missing_left: (n_nodes,) bool, where NaN goes.
        value: (n_nodes, n_classes) class fractions, or (n_nodes, 1) means, of every node.
        weight: (n_nodes,) weighted number of training samples.
        impurity: (n_nodes,) training impurity.
    """

    left: NDArray[np.int32]
    right: NDArray[np.int32]
    feature: NDArray[np.int32]
    threshold: NDArray[np.float64]
    missing_left: NDArray[np.bool_]
    value: NDArray[np.float64]
    weight: NDArray[np.float64]
    impurity: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.left)

    @property
    def inner(self) -> NDArray[np.bool_]:
        """(n_nodes,) True where the node splits."""
        return self.left != LEAF

    @property
    def parent(self) -> NDArray[np.int32]:
        """(n_nodes,) int32, -1 at the root."""
        parent = np.full(len(self), -1, dtype=np.int32)
        inside = np.flatnonzero(self.inner).astype(np.int32)
        parent[self.left[inside]] = inside
        parent[self.right[inside]] = inside
        return parent

    @property
    def depth(self) -> NDArray[np.int32]:
        """(n_nodes,) int32, 0 at the root."""
        depth = np.zeros(len(self), dtype=np.int32)
        level, at = 0, np.zeros(1, dtype=np.int32)
        while len(at):
            depth[at] = level
            split = at[self.left[at] != LEAF]
            at = np.concatenate([self.left[split], self.right[split]])
            level += 1
        return depth


def flatten_tree(tree: Any) -> FlatTree:
    """Copy out of a ``sklearn.tree._tree.Tree``."""
    nodes = tree.__getstate__()["nodes"]
    leaf = nodes["left_child"] < 0
    value = np.asarray(tree.value, dtype=np.float64)[:, 0, :]
    return FlatTree(
        left=nodes["left_child"].astype(np.int32),
        right=nodes["right_child"].astype(np.int32),
        feature=np.where(leaf, -2, nodes["feature"]).astype(np.int32),
        threshold=nodes["threshold"].astype(np.float64),
        missing_left=nodes["missing_go_to_left"].astype(np.bool_),
        value=value,
        weight=nodes["weighted_n_node_samples"].astype(np.float64),
        impurity=nodes["impurity"].astype(np.float64),
    )


@dataclass(frozen=True)
class FlatForest:
    """Trees side by side; node ``h`` of tree ``t`` is number ``offset[t] + h`` overall."""

    trees: tuple[FlatTree, ...]

    @property
    def offset(self) -> NDArray[np.int64]:
        """(n_trees + 1,) int64."""
        return np.concatenate([[0], np.cumsum([len(tree) for tree in self.trees])]).astype(np.int64)

    @property
    def n_nodes(self) -> int:
        """Nodes of all trees, leaves included."""
        return sum(len(tree) for tree in self.trees)

    @property
    def n_internal(self) -> int:
        """Splitting nodes of all trees."""
        return sum(int(tree.inner.sum()) for tree in self.trees)

    def split(self, per_node: NDArray[Any]) -> Iterator[NDArray[Any]]:
        """An array over all nodes, tree by tree."""
        offset = self.offset
        for t in range(len(self.trees)):
            yield per_node[offset[t] : offset[t + 1]]


def flatten(forest: Any) -> FlatForest:
    """The trees of a fitted forest, or of a boosted model (which keeps them in a column)."""
    return flatten_estimators(np.asarray(forest.estimators_, dtype=object).ravel())


def flatten_estimators(estimators: Iterable[Any]) -> FlatForest:
    """The trees of fitted decision-tree estimators."""
    return FlatForest(tuple(flatten_tree(estimator.tree_) for estimator in estimators))
