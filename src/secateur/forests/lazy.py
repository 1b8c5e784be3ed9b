"""Prediction that asks for a feature only when an example needs it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from secateur.forests.checks import FeatureCosts, ForestInputError
from secateur.forests.flat import flatten
from secateur.forests.routing import _goes_left

Fetch = Callable[[NDArray[np.intp], NDArray[np.intp]], Any]
"""``fetch(features, rows)``: the values of ``features`` (one group's columns) for the examples
``rows``, shape (len(rows), len(features)), or (len(rows),) for a single feature."""


@dataclass(frozen=True)
class LazyPrediction:
    """Predictions and what they cost.

    Attributes:
        prediction: (n,) as ``predict`` would give with all features at hand.
        probability: (n, n_classes), or None for regression.
        paid: (n,) the price of what was fetched for each example.
        fetched: (n, n_groups) bool, what was fetched for whom.
        calls: how often ``fetch`` was called.
    """

    prediction: NDArray
    probability: NDArray[np.float64] | None
    paid: NDArray[np.float64]
    fetched: NDArray[np.bool_]
    calls: int


def predict_lazy(forest: Any, costs: FeatureCosts, fetch: Fetch, n: int) -> LazyPrediction:
    """Send ``n`` examples down all trees, fetching a feature group when a node first needs it.

    All examples advance together: each round walks every tree as far as known features allow,
    then asks once per missing group for all the examples that wait for it. What an example
    pays does not depend on the order, since the forest needs the union of its trees' paths.

    Raises:
        ForestInputError: ``fetch`` returned an array of another shape, or no numbers.
    """
    if not isinstance(n, Integral) or isinstance(n, bool) or n < 1:
        raise ForestInputError("must be a whole number, 1 or more", field="n", value=n)
    if not callable(fetch):
        raise ForestInputError(
            "must be a function of features and rows", field="fetch", value=fetch
        )
    x = np.zeros((n, len(costs.group)), dtype=np.float32)
    known = np.zeros((n, len(costs.price)), dtype=np.bool_)
    trees = flatten(forest).trees
    at = [np.zeros(n, dtype=np.int32) for _ in trees]
    calls = 0
    while True:
        missing = np.zeros_like(known)
        for tree, node in zip(trees, at, strict=True):
            _advance(
                tree.left, tree.right, tree.feature, tree.threshold, tree.missing_left,
                x, costs.group, known, node, missing,
            )  # fmt: skip
        if not missing.any():
            break
        for group in np.flatnonzero(missing.any(0)).tolist():
            rows = np.flatnonzero(missing[:, group])
            features = costs.members(group)
            x[np.ix_(rows, features)] = _checked(fetch(features, rows), rows, features, costs)
            calls += 1
        known |= missing
    probability = None
    if hasattr(forest, "predict_proba"):
        probability = forest.predict_proba(as_fitted(forest, x))
        prediction = forest.classes_[probability.argmax(1)]
    else:
        prediction = forest.predict(as_fitted(forest, x))
    return LazyPrediction(prediction, probability, known @ costs.price, known, calls)


def as_fitted(forest: Any, x: NDArray[np.float32]) -> Any:
    """``x`` with column names if the forest was fitted with them."""
    if not hasattr(forest, "feature_names_in_"):
        return x
    import pandas as pd

    return pd.DataFrame(x, columns=forest.feature_names_in_)


def _checked(
    values: Any, rows: NDArray[np.intp], features: NDArray[np.intp], costs: FeatureCosts
) -> NDArray[np.float32]:
    try:
        array = np.asarray(values, dtype=np.float32)
    except (TypeError, ValueError) as problem:
        raise ForestInputError(
            f"fetch returned what is no array of numbers: {problem}", field="fetch"
        ) from problem
    if array.shape == (len(rows),) and len(features) == 1:
        array = array[:, None]
    if array.shape != (len(rows), len(features)):
        raise ForestInputError(
            f"fetch returned shape {array.shape} for {len(rows)} examples and "
            f"{len(features)} features of '{costs.names[costs.group[features[0]]]}'",
            field="fetch",
            value=array.shape,
            fix=f"return an array of shape ({len(rows)}, {len(features)})",
        )
    return array


@njit(nogil=True, cache=True)
def _advance(
    left: Any, right: Any, feature: Any, threshold: Any, missing_left: Any,
    x: Any, group: Any, known: Any, at: Any, missing: Any,
) -> None:  # fmt: skip
    for i in range(x.shape[0]):
        h = at[i]
        while left[h] >= 0:
            f = feature[h]
            if not known[i, group[f]]:
                missing[i, group[f]] = True
                break
            go = _goes_left(x[i, f], threshold[h], missing_left[h])
            h = left[h] if go else right[h]
        at[i] = h
