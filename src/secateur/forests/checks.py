"""What a forest and its prices must look like, and the error that says so."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.ensemble import (
    ExtraTreesClassifier,
    ExtraTreesRegressor,
    RandomForestClassifier,
    RandomForestRegressor,
)
from sklearn.utils.validation import check_is_fitted

from secateur.errors import UsageError

FORESTS = (
    RandomForestClassifier,
    ExtraTreesClassifier,
    RandomForestRegressor,
    ExtraTreesRegressor,
)


class ForestInputError(UsageError, ValueError):
    """A wrong argument; also a ``ValueError``, which scikit-learn's callers expect."""


class UnsupportedForestError(ForestInputError):
    """A forest of a kind this method does not prune; a comparison leaves the method out."""


@dataclass(frozen=True)
class FeatureCosts:
    """What acquiring features costs: one price for each group, paid once per example.

    Attributes:
        group: (n_features,) int32, the group each feature belongs to.
        price: (n_groups,) float64, not negative.
        names: the groups' names; a feature alone in its group lends its own.
    """

    group: NDArray[np.int32]
    price: NDArray[np.float64]
    names: tuple[str, ...]

    @property
    def total(self) -> float:
        """The cost of acquiring everything."""
        return float(self.price.sum())

    @property
    def priced_group(self) -> NDArray[np.int32]:
        """(n_features,) int32: the feature's group, or -1 where it costs nothing."""
        return np.where(self.price[self.group] > 0, self.group, -1).astype(np.int32)

    def members(self, group: int) -> NDArray[np.intp]:
        """The features a payment for ``group`` delivers."""
        return np.flatnonzero(self.group == group)


def check_number(field: str, value: object) -> None:
    """Refuse what is not a finite number, 0 or more.

    Raises:
        ForestInputError: naming ``field``.
    """
    number = isinstance(value, Real) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value < 0:  # type: ignore[arg-type,operator]
        raise ForestInputError("must be a finite number, 0 or more", field=field, value=value)


def check_lam_or_budget(lam: object, budget: object) -> None:
    """Refuse both, none, or one that is no finite number, 0 or more.

    Raises:
        ForestInputError: naming the field.
    """
    if (lam is None) == (budget is None):
        raise ForestInputError(
            f"exactly one of lam and budget is needed, {'none' if lam is None else 'both'} given",
            field="lam",
            value=lam,
            fix="lam= for a fixed trade-off, budget= for a mean cost per example",
        )
    if budget is None:
        check_number("lam", lam)
    else:
        check_number("budget", budget)


def feature_costs(
    costs: ArrayLike | Mapping[str, float] | None,
    groups: Sequence[Any] | NDArray[Any] | None,
    feature_names: Sequence[str],
) -> FeatureCosts:
    """Read prices as users give them.

    Args:
        costs: None (every group costs 1), one number, an array over features, or a mapping from
            feature names (or group labels) to prices; names left out of a mapping are an error.
        groups: a label for each feature, or None: every feature on its own.
        feature_names: the features' names, in column order.

    Raises:
        ForestInputError: wrong length, negative or not finite, an unknown name, or two prices
            for one group.
    """
    d = len(feature_names)
    if groups is None:
        group = np.arange(d, dtype=np.int32)
        names = tuple(map(str, feature_names))
    else:
        labels = [str(label) for label in np.atleast_1d(np.asarray(groups, dtype=object))]
        if len(labels) != d:
            raise ForestInputError(
                f"one label for each of the {d} features is needed",
                field="feature_groups",
                value=f"{len(labels)} labels",
                fix="give a feature that stands alone a label of its own",
            )
        names = tuple(dict.fromkeys(labels))
        index = {name: i for i, name in enumerate(names)}
        group = np.array([index[label] for label in labels], dtype=np.int32)
    price = _prices(costs, group, names, list(map(str, feature_names)))
    return FeatureCosts(group=group, price=price, names=names)


def _prices(
    costs: ArrayLike | Mapping[str, float] | None,
    group: NDArray[np.int32],
    names: tuple[str, ...],
    features: list[str],
) -> NDArray[np.float64]:
    if costs is None:
        return np.ones(len(names))
    if isinstance(costs, Mapping):
        given = {str(name): value for name, value in costs.items()}
        known = set(features) | set(names)
        if unknown := sorted(set(given) - known):
            raise ForestInputError(
                "there is no feature or group of that name",
                field="feature_costs",
                value=unknown[0],
                fix=f"known names: {', '.join(sorted(known)[:8])}"
                + (", ..." if len(known) > 8 else ""),
            )
        per_feature = [
            given.get(feature, given.get(names[group[i]])) for i, feature in enumerate(features)
        ]
        if None in per_feature:
            raise ForestInputError(
                "this feature has no price",
                field="feature_costs",
                value=features[per_feature.index(None)],
                fix="price every feature; 0 for one that is free",
            )
        array = _numbers(per_feature)
    else:
        array = _numbers(costs)
        if array.ndim == 0:
            array = np.full(len(features), float(array))
    if array.shape != (len(features),):
        raise ForestInputError(
            f"one price for each of the {len(features)} features is needed",
            field="feature_costs",
            value=f"shape {array.shape}",
            fix="an array over features, a mapping from names, or a single number",
        )
    wrong = ~np.isfinite(array) | (array < 0)
    if wrong.any():
        at = int(np.flatnonzero(wrong)[0])
        raise ForestInputError(
            f"the price of feature '{features[at]}' must be a finite number, 0 or more",
            field="feature_costs",
            value=float(array[at]),
        )
    price = np.zeros(len(names))
    price[group] = array
    if (differs := price[group] != array).any():
        at = int(np.flatnonzero(differs)[0])
        raise ForestInputError(
            f"group '{names[group[at]]}' has two prices, {array[at]:g} and {price[group[at]]:g}; "
            "a group is paid once, so its features carry one price",
            field="feature_costs",
            value=float(array[at]),
        )
    return price


def _numbers(prices: Any) -> NDArray[np.float64]:
    """Prices as an array of numbers."""
    try:
        return np.asarray(prices, dtype=np.float64)
    except (TypeError, ValueError):
        raise ForestInputError(
            "prices are numbers", field="feature_costs", value=prices, fix="1.0 for each feature"
        ) from None


def check_forest(estimator: Any) -> None:
    """Refuse what is no fitted, single-output scikit-learn forest.

    Raises:
        ForestInputError: not a random forest or extra-trees estimator.
        NotFittedError: not fitted.
        UnsupportedForestError: several outputs.
    """
    if not isinstance(estimator, FORESTS):
        raise ForestInputError(
            "a scikit-learn random forest or extra-trees model is needed",
            field="estimator",
            value=type(estimator).__name__,
            fix=f"one of {', '.join(kind.__name__ for kind in FORESTS)}; "
            "for gradient boosting see BoostingPruner",
        )
    check_is_fitted(estimator)
    if estimator.n_outputs_ != 1:
        raise UnsupportedForestError(
            "only forests with one output can be pruned",
            field="estimator",
            value=f"{estimator.n_outputs_} outputs",
            fix="fit one forest for each output",
        )
