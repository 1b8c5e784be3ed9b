"""Figures of a forest under feature costs."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import csr_array

from secateur.forests.checks import FeatureCosts
from secateur.forests.flat import FlatForest, flatten
from secateur.forests.routing import used_groups


def feature_usage(forest: Any, costs: FeatureCosts, x: NDArray[np.float32]) -> csr_array:
    """(n, n_groups) sparse bool: the groups some tree asks for on the example's paths."""
    return csr_array(used_groups(flatten(forest), x, costs.group, len(costs.price)))


def expected_feature_cost(
    forest: Any,
    costs: FeatureCosts,
    x: NDArray[np.float32],
    sample_weight: ArrayLike | None = None,
) -> float:
    """The mean price of what an example needs, each group paid once."""
    return cost_of_trees(flatten(forest), costs, x, sample_weight)


def cost_of_trees(
    flat: FlatForest,
    costs: FeatureCosts,
    x: NDArray[np.float32],
    sample_weight: ArrayLike | None = None,
) -> float:
    """``expected_feature_cost`` of any trees, scikit-learn's or not."""
    paid = used_groups(flat, x, costs.group, len(costs.price)) @ costs.price
    weight = None if sample_weight is None else np.asarray(sample_weight, dtype=np.float64)
    return float(np.average(paid, weights=weight))


def mean_distinct_features(forest: Any, costs: FeatureCosts, x: NDArray[np.float32]) -> float:
    """The mean number of groups an example needs, whatever their prices."""
    return feature_usage(forest, costs, x).sum() / max(1, len(x))


def model_cost(forest: Any, costs: FeatureCosts) -> float:
    """The price of every group the forest uses anywhere: what must be at hand for any input."""
    used = np.zeros(len(costs.price), dtype=np.bool_)
    for tree in flatten(forest).trees:
        used[costs.group[tree.feature[tree.inner]]] = True
    return float(costs.price[used].sum())


def compression(pruned: Any, unpruned: Any) -> float:
    """Nodes left as a fraction of the nodes before."""
    return flatten(pruned).n_nodes / flatten(unpruned).n_nodes


def best_within(cost: ArrayLike, score: ArrayLike, budgets: ArrayLike) -> NDArray[np.float64]:
    """The best score with cost at most each budget; NaN where nothing is that cheap."""
    cost, score = np.asarray(cost, dtype=np.float64), np.asarray(score, dtype=np.float64)
    return np.array(
        [score[cost <= b].max(initial=-np.inf) if (cost <= b).any() else np.nan
         for b in np.asarray(budgets, dtype=np.float64)]
    )  # fmt: skip


def auc_cost(cost: ArrayLike, score: ArrayLike, full_cost: float) -> float:
    """Mean of the best score within budget, over budgets spread evenly from 0 to ``full_cost``.

    A staircase: between two points the cheaper one counts. Needs a point that costs nothing.
    """
    cost, score = np.asarray(cost, dtype=np.float64), np.asarray(score, dtype=np.float64)
    order = np.argsort(cost, kind="stable")
    steps = np.append(np.minimum(cost[order], full_cost), full_cost)
    best = np.maximum.accumulate(score[order])
    return float(np.sum(np.diff(steps) * best) / full_cost)
