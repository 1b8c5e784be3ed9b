"""What all estimators here share: a forest inside, and a price for what it asks for."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import csr_array
from sklearn.base import BaseEstimator, MetaEstimatorMixin, clone, is_classifier
from sklearn.frozen import FrozenEstimator
from sklearn.metrics import accuracy_score, r2_score
from sklearn.utils import get_tags
from sklearn.utils.metaestimators import available_if
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data

from secateur.forests.checks import FORESTS, FeatureCosts, ForestInputError, check_forest
from secateur.forests.checks import feature_costs as read_costs
from secateur.forests.data_roles import Examples, hold_out
from secateur.forests.lazy import Fetch, LazyPrediction, predict_lazy
from secateur.forests.metrics import expected_feature_cost, feature_usage
from secateur.progress import SILENT, Progress


def _inner_has(name: str) -> Any:
    def check(self: Any) -> bool:
        getattr(getattr(self, "estimator_", self.estimator), name)
        return True

    return check


class BudgetedForest(MetaEstimatorMixin, BaseEstimator):
    """A forest that knows what its features cost. Base of the pruner and of its baselines.

    After ``fit``, ``estimator_`` is an ordinary scikit-learn forest and ``costs_`` the prices.
    """

    estimator: Any
    feature_costs: Any
    feature_groups: Any
    prefit: bool
    validation_fraction: float
    random_state: Any
    estimator_: Any
    unpruned_: Any
    costs_: FeatureCosts

    def fit(
        self,
        X: Any,
        y: ArrayLike,
        sample_weight: ArrayLike | None = None,
        *,
        X_val: Any = None,
        y_val: ArrayLike | None = None,
        sample_weight_val: ArrayLike | None = None,
        progress: Progress = SILENT,
    ) -> Self:
        """Grow the forest (unless ``prefit``) and prune it.

        Args:
            X, y, sample_weight: the examples; see ``prefit`` and ``validation_fraction``.
            X_val, y_val, sample_weight_val: validation examples of your own.
            progress: where to show it.

        Raises:
            ForestInputError: a parameter or the data are wrong, or nothing fits the budget.
        """
        self._check_parameters()
        roles = self._forest_and_roles(X, y, sample_weight, X_val, y_val, sample_weight_val)
        self.unpruned_ = roles[0]
        self._prune(*roles, progress)
        return self

    @abstractmethod
    def _check_parameters(self) -> None:
        """Refuse wrong parameters before anything is grown."""

    @abstractmethod
    def _prune(
        self, forest: Any, train: Examples | None, validation: Examples | None, progress: Progress
    ) -> None:
        """Set ``estimator_`` and what is known about it."""

    def _wants_validation(self) -> bool:
        """Whether validation examples must be there, held out of X if not given."""
        return True

    def predict(self, X: Any) -> NDArray:
        """(n,) labels or values."""
        check_is_fitted(self, "estimator_")
        return self.estimator_.predict(X)

    @available_if(_inner_has("predict_proba"))
    def predict_proba(self, X: Any) -> NDArray[np.float64]:
        """(n, n_classes) class probabilities: the mean over trees."""
        check_is_fitted(self, "estimator_")
        return self.estimator_.predict_proba(X)

    def score(self, X: Any, y: ArrayLike, sample_weight: ArrayLike | None = None) -> float:
        """Accuracy, or R^2 for regression."""
        metric = accuracy_score if is_classifier(self) else r2_score
        return float(metric(y, self.predict(X), sample_weight=sample_weight))

    def feature_usage(self, X: Any) -> csr_array:
        """(n, n_groups) sparse bool: which groups each example needs, paid once across trees."""
        return feature_usage(self.estimator_, self.costs_, self._floats(X))

    def expected_cost(self, X: Any, sample_weight: ArrayLike | None = None) -> float:
        """The mean price of the groups an example needs."""
        return expected_feature_cost(self.estimator_, self.costs_, self._floats(X), sample_weight)

    def predict_lazy(self, fetch: Fetch, n: int) -> LazyPrediction:
        """Predict ``n`` examples, calling ``fetch(features, rows)`` only for what they need."""
        check_is_fitted(self, "estimator_")
        return predict_lazy(self.estimator_, self.costs_, fetch, n)

    @property
    def classes_(self) -> NDArray:
        """The labels, for classification."""
        return self.estimator_.classes_

    @property
    def feature_importances_(self) -> NDArray[np.float64]:
        """Impurity importances of the pruned forest."""
        return self.estimator_.feature_importances_

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        inner = get_tags(self.estimator)
        tags.estimator_type = inner.estimator_type
        tags.classifier_tags = inner.classifier_tags
        if tags.classifier_tags is not None:
            tags.classifier_tags.multi_label = False
        tags.regressor_tags = inner.regressor_tags
        tags.target_tags.required = True
        tags.target_tags.multi_output = False
        tags.input_tags.sparse = False
        tags.input_tags.allow_nan = inner.input_tags.allow_nan
        return tags

    def _check_kind(self, estimator: Any) -> None:
        """Refuse what could not be pruned even if it were fitted."""
        if not isinstance(estimator, FORESTS):
            check_forest(estimator)

    def _check_fitted(self, estimator: Any) -> None:
        """Refuse a model that is not fitted, or was fitted to something else."""
        check_forest(estimator)

    def _floats(self, X: Any) -> NDArray[np.float32]:
        check_is_fitted(self, "estimator_")
        return np.ascontiguousarray(
            validate_data(self, X, reset=False, dtype=np.float32, ensure_all_finite="allow-nan")
        )

    def _examples(
        self, X: Any, y: ArrayLike, sample_weight: ArrayLike | None, *, reset: bool
    ) -> Examples:
        """Check a set of examples as scikit-learn does; X itself is passed on unchanged."""
        allow_nan = get_tags(self.estimator).input_tags.allow_nan
        finite = "allow-nan" if allow_nan else True
        numeric = not is_classifier(self)
        checked, target = validate_data(
            self, X, y, reset=reset, dtype=np.float32, ensure_all_finite=finite, y_numeric=numeric
        )
        if not numeric:
            check_classification_targets(target)
        weight = _check_sample_weight(
            sample_weight, checked, dtype=np.float64, ensure_non_negative=True
        )
        # A data frame keeps its names for the inner forest; anything else is taken as checked.
        return Examples(X if hasattr(X, "iloc") else checked, target, weight)

    def _forest_and_roles(
        self,
        X: Any,
        y: ArrayLike,
        sample_weight: ArrayLike | None,
        X_val: Any,
        y_val: ArrayLike | None,
        weight_val: ArrayLike | None,
    ) -> tuple[Any, Examples | None, Examples | None]:
        """The fitted forest, the examples it was trained on, and the validation examples."""
        if (X_val is None) != (y_val is None):
            raise ForestInputError("X_val and y_val go together", field="X_val")
        if X_val is None and weight_val is not None:
            raise ForestInputError(
                "weights of what? X_val is not given",
                field="sample_weight_val",
                fix="give X_val and y_val, or weigh X with sample_weight",
            )
        frozen = isinstance(self.estimator, FrozenEstimator)
        inner = self.estimator.estimator if frozen else self.estimator
        self._check_kind(inner)
        given = self._examples(X, y, sample_weight, reset=True)
        validation = None
        if X_val is not None:
            validation = self._examples(X_val, y_val, weight_val, reset=False)  # type: ignore[arg-type]
        train: Examples | None = given
        if self.prefit or frozen:
            forest = inner
            self._check_fitted(forest)
            if forest.n_features_in_ != self.n_features_in_:
                raise ForestInputError(
                    f"the forest expects {forest.n_features_in_} features, X has "
                    f"{self.n_features_in_}",
                    field="X",
                )
            ours, theirs = (getattr(o, "feature_names_in_", None) for o in (self, forest))
            if ours is not None and theirs is not None and list(ours) != list(theirs):
                raise ForestInputError(
                    "the forest was fitted on other columns, or in another order",
                    field="X",
                    fix="X[forest.feature_names_in_]",
                )
            if validation is None and self._wants_validation():
                train, validation = None, given
        else:
            if validation is None and self._wants_validation():
                train, validation = hold_out(
                    given, self.validation_fraction, is_classifier(self), self.random_state
                )
            assert train is not None
            forest = clone(inner)
            forest.fit(train.x, train.y, sample_weight=train.weight)
            self._check_fitted(forest)
        names = getattr(self, "feature_names_in_", [f"x{i}" for i in range(self.n_features_in_)])
        self.costs_ = read_costs(self.feature_costs, self.feature_groups, names)
        return forest, train, validation
