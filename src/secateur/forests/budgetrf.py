"""BudgetRF: forests grown for cheap features from the start, as a baseline.

Nan, Wang and Saligrama, "Feature-Budgeted Random Forest" (ICML 2015). At each node every feature
proposes the threshold that minimises the larger of the two children's impurities, and the
feature with the least ``cost / (impurity - larger child impurity)`` wins. Impurity counts pairs
of examples of different classes, ``alpha`` of each class forgiven; a larger ``alpha`` stops
earlier and so costs less. As in the authors' code, a feature paid for higher up gets no discount.
Thresholds are looked for between 32 quantiles of each feature rather than between all values.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray
from sklearn.base import is_classifier
from sklearn.tree._tree import Tree
from sklearn.utils import check_random_state

from secateur.forests.baselines import CandidatePruner
from secateur.forests.checks import ForestInputError, UnsupportedForestError
from secateur.forests.data_roles import Examples
from secateur.forests.losses import encode_labels
from secateur.forests.rebuild import with_trees
from secateur.progress import Progress

BINS = 32
ALPHAS = (0.001, 0.003, 0.006, 0.01, 0.02, 0.04, 0.08, 0.15)
"""Forgiven examples of each class as a share of the bag."""


class BudgetRF(CandidatePruner):
    """Forests grown at several alphas, as many trees each as ``estimator`` has."""

    def _candidates(
        self, forest: Any, train: Examples | None, validation: Examples, progress: Progress
    ) -> Iterator[tuple[float, Any]]:
        if not is_classifier(forest):
            raise UnsupportedForestError(
                "BudgetRF grows classification forests only",
                field="estimator",
                value=type(forest).__name__,
                fix="BudgetPruner prunes regression forests too",
            )
        if train is None:
            raise ForestInputError(
                "BudgetRF grows its own trees and needs training examples",
                field="X_val",
                fix="with prefit=True, pass the training set as X, y and X_val, y_val besides",
            )
        x = train.dense()
        y = encode_labels(train.y, forest.classes_)
        edges = np.quantile(x, np.linspace(0, 1, BINS + 1)[1:-1], axis=0).T.astype(np.float32)
        binned = np.stack(
            [np.searchsorted(edges[f], x[:, f], side="left") for f in range(x.shape[1])], 1
        ).astype(np.uint8)
        # A free feature would win every split at no gain at all; a token price keeps order.
        price = self.costs_.price[self.costs_.group]
        price = np.maximum(price, 1e-3 * max(price.max(), 1e-9))
        with progress.stage("BudgetRF", total=len(ALPHAS), unit="forests") as advance:
            for alpha in ALPHAS:
                yield alpha, self._grow(forest, binned, y, edges, price, alpha)
                advance(1)

    def _grow(
        self,
        forest: Any,
        binned: NDArray[np.uint8],
        y: NDArray[np.int64],
        edges: NDArray[np.float32],
        price: NDArray[np.float64],
        alpha: float,
    ) -> Any:
        rng = check_random_state(self.random_state)
        n, d = binned.shape
        n_classes = len(forest.classes_)
        trees = []
        for estimator in forest.estimators_:
            bag = rng.randint(0, n, n)
            columns = _grow_tree(binned[bag], y[bag], price, alpha * n, n_classes)
            trees.append((estimator, _as_tree(columns, edges, d, n_classes)))
        return with_trees(forest, trees)


def _as_tree(columns: Any, edges: NDArray[np.float32], d: int, n_classes: int) -> Tree:
    left, right, feature, cut, counts, depth = columns
    total = counts.sum(1)
    fractions = counts / total[:, None]
    tree = Tree(d, np.array([n_classes], dtype=np.intp), 1)
    empty = tree.__getstate__()["nodes"]
    nodes = np.zeros(len(left), dtype=empty.dtype)
    inner = left >= 0
    nodes["left_child"], nodes["right_child"] = left, right
    nodes["feature"] = np.where(inner, feature, -2)
    nodes["threshold"] = np.where(inner, edges[feature, cut], -2.0)
    nodes["impurity"] = 1 - np.square(fractions).sum(1)
    nodes["n_node_samples"] = nodes["weighted_n_node_samples"] = total
    tree.__setstate__(
        {
            "max_depth": int(depth),
            "node_count": len(left),
            "nodes": nodes,
            "values": np.ascontiguousarray(fractions[:, None, :]),
        }
    )
    return tree


@njit(nogil=True, cache=True)
def _pairs(counts: Any, alpha: float) -> float:
    """Threshold-pairs impurity: sum over classes i < j of (m_i m_j - alpha^2)+ with m = (n - alpha)+."""
    total = 0.0
    for i in range(len(counts)):
        for j in range(i + 1, len(counts)):
            pairs = max(counts[i] - alpha, 0.0) * max(counts[j] - alpha, 0.0) - alpha * alpha
            total += max(pairs, 0.0)
    return total


@njit(nogil=True, cache=True)
def _best_split(binned: Any, y: Any, rows: Any, price: Any, alpha: float, n_classes: int) -> Any:
    """Feature and cut with the least price per impurity removed; feature -1 if none helps."""
    parent = np.zeros(n_classes)
    for r in rows:
        parent[y[r]] += 1
    impurity = _pairs(parent, alpha)
    best_feature, best_cut, best_ratio = -1, 0, np.inf
    if impurity <= 0:
        return best_feature, best_cut, parent
    histogram = np.empty((BINS, n_classes))
    left = np.empty(n_classes)
    for f in range(binned.shape[1]):
        histogram[:] = 0.0
        for r in rows:
            histogram[binned[r, f], y[r]] += 1
        left[:] = 0.0
        lowest, lowest_cut = np.inf, 0
        for cut in range(BINS - 1):
            left += histogram[cut]
            size = left.sum()
            if size == 0 or size == len(rows):
                continue
            worst = max(_pairs(left, alpha), _pairs(parent - left, alpha))
            if worst < lowest:
                lowest, lowest_cut = worst, cut
        if lowest < impurity and price[f] / (impurity - lowest) < best_ratio:
            best_feature, best_cut = f, lowest_cut
            best_ratio = price[f] / (impurity - lowest)
    return best_feature, best_cut, parent


@njit(nogil=True, cache=True)
def _grow_tree(binned: Any, y: Any, price: Any, alpha: float, n_classes: int) -> Any:
    n = len(y)
    size = 2 * n + 1
    left, right = np.full(size, -1, np.int64), np.full(size, -1, np.int64)
    feature, cut = np.zeros(size, np.int64), np.zeros(size, np.int64)
    counts = np.zeros((size, n_classes))
    level = np.zeros(size, np.int64)
    rows = np.arange(n)
    start, stop = np.zeros(size, np.int64), np.zeros(size, np.int64)
    stop[0] = n
    used, h = 1, 0
    while h < used:
        mine = rows[start[h] : stop[h]].copy()
        f, c, counts[h] = _best_split(binned, y, mine, price, alpha, n_classes)
        if f >= 0:
            goes_left = np.array([binned[r, f] <= c for r in mine])
            middle = start[h] + goes_left.sum()
            rows[start[h] : middle] = mine[goes_left]
            rows[middle : stop[h]] = mine[~goes_left]
            feature[h], cut[h] = f, c
            left[h], right[h] = used, used + 1
            start[used], stop[used] = start[h], middle
            start[used + 1], stop[used + 1] = middle, stop[h]
            level[used] = level[used + 1] = level[h] + 1
            used += 2
        h += 1
    return left[:used], right[:used], feature[:used], cut[:used], counts[:used], level[:used].max()
