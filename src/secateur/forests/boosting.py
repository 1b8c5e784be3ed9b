"""Boosted trees on a feature budget: a heuristic, not the paper's programme.

A boosted model adds its trees up, so a tree has no error of its own. Around the present margin F
the loss of cutting node h is, to second order, the sum over the examples in h of
``g delta + h delta^2 / 2`` with ``delta`` the change of the margin, and this surrogate is again
additive over nodes: the same closure, the same cut. It ignores that cuts in several trees act
on the same margin together, hence a few rounds: solve around the pruned model, and keep a round
only if the true loss plus cost falls. There is no certificate for the model as a whole.
"""

from __future__ import annotations

import copy
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit
from sklearn.base import BaseEstimator, MetaEstimatorMixin, is_classifier
from sklearn.ensemble import GradientBoostingClassifier, GradientBoostingRegressor
from sklearn.utils.validation import check_is_fitted, validate_data

from secateur.forests.checks import FeatureCosts, ForestInputError, check_number
from secateur.forests.checks import feature_costs as read_costs
from secateur.forests.closure import ClosureProblem
from secateur.forests.flat import FlatForest, FlatTree, flatten_estimators
from secateur.forests.metrics import cost_of_trees
from secateur.forests.programme import closure_problem
from secateur.forests.rebuild import rebuild_tree
from secateur.forests.reduction import reduce_problem
from secateur.forests.routing import leaves
from secateur.forests.solvers import solve

BINARY = "a binary classifier or a regressor with squared error"


class BoostingPruner(MetaEstimatorMixin, BaseEstimator):
    """Prunes a fitted scikit-learn gradient boosting model for its features' costs (heuristic).

    Args:
        estimator: a fitted ``GradientBoostingRegressor`` (squared error) or binary
            ``GradientBoostingClassifier`` (log loss).
        feature_costs, feature_groups: as in ``BudgetPruner``.
        lam: the price of one cost unit in units of the loss (log loss, or half squared error).
        rounds: how often to solve around the pruned model.
        solver: as in ``BudgetPruner``.

    Attributes:
        estimator_: the pruned model, a genuine scikit-learn one.
        objective_: true loss plus lam times cost on the pruning examples.
        history_: the objective before pruning and after each round that was kept.
    """

    def __init__(
        self,
        estimator: Any,
        *,
        feature_costs: Any = None,
        feature_groups: Any = None,
        lam: float = 0.01,
        rounds: int = 4,
        solver: str = "auto",
    ) -> None:
        self.estimator = estimator
        self.feature_costs = feature_costs
        self.feature_groups = feature_groups
        self.lam = lam
        self.rounds = rounds
        self.solver = solver

    def fit(self, X: Any, y: ArrayLike) -> Self:
        """Prune on these examples (not those the model was fitted on).

        Raises:
            ForestInputError: another kind of model, or a wrong parameter.
        """
        check_number("lam", self.lam)
        _check_model(self.estimator)
        checked, target = validate_data(self, X, y, dtype=np.float32)
        x = np.ascontiguousarray(checked)
        if x.shape[1] != self.estimator.n_features_in_:
            raise ForestInputError(
                f"the model expects {self.estimator.n_features_in_} features", field="X"
            )
        names = getattr(self, "feature_names_in_", [f"x{i}" for i in range(x.shape[1])])
        self.costs_ = read_costs(self.feature_costs, self.feature_groups, names)
        model = self.estimator
        best = self._objective(model, x, target)
        self.history_ = [best]
        for _ in range(self.rounds):
            proposed = self._round(model, x, target)
            value = self._objective(proposed, x, target)
            if value >= best - 1e-12:
                break
            model, best = proposed, value
            self.history_.append(best)
        self.estimator_, self.objective_ = model, best
        self.loss_ = _loss(model, x, target)
        self.cost_ = self.expected_cost(X)
        return self

    def predict(self, X: Any) -> NDArray:
        """(n,) labels or values."""
        check_is_fitted(self, "estimator_")
        return self.estimator_.predict(X)

    def expected_cost(self, X: Any) -> float:
        """The mean price of what an example needs, each group paid once across trees."""
        check_is_fitted(self, "estimator_")
        x = validate_data(self, X, reset=False, dtype=np.float32)
        return _cost(self.estimator_, self.costs_, np.ascontiguousarray(x))

    def _objective(self, model: Any, x: NDArray[np.float32], y: NDArray) -> float:
        return _loss(model, x, y) + self.lam * _cost(model, self.costs_, x)

    def _round(self, model: Any, x: NDArray[np.float32], y: NDArray) -> Any:
        """Solve the surrogate around ``model`` and rebuild; cut nodes predict their leaves' mean."""
        trees = model.estimators_[:, 0]
        flat = flatten_estimators(trees)
        values = [_mean_of_leaves(tree) for tree in flat.trees]
        gradient, curvature = _derivatives(model, x, y)
        losses = [
            _surrogate(tree, value, x, gradient, curvature, model.learning_rate)
            for tree, value in zip(flat.trees, values, strict=True)
        ]
        problem, internal = closure_problem(flat, losses, self.costs_, x)
        kept = _solve(problem, self.lam * len(x), self.solver)
        everywhere = np.zeros(flat.n_nodes, dtype=np.bool_)
        everywhere[internal[kept]] = True
        return _rebuilt(model, flat, everywhere, values)


def _solve(problem: ClosureProblem, price: float, solver: str) -> NDArray[np.bool_]:
    smaller, nodes = reduce_problem(problem)
    kept = np.zeros(problem.n_nodes, dtype=np.bool_)
    kept[nodes[solve(smaller, price, solver).kept]] = True
    return kept


def _surrogate(
    tree: FlatTree,
    value: NDArray[np.float64],
    x: NDArray[np.float32],
    gradient: NDArray[np.float64],
    curvature: NDArray[np.float64],
    rate: float,
) -> NDArray[np.float64]:
    """(n_nodes,) second-order change of the summed loss if the node's examples got its value."""
    leaf = leaves(tree, x)
    own = value[leaf]
    columns = (gradient, gradient * own, curvature, curvature * own, curvature * own * own)
    sums = np.stack([np.bincount(leaf, weights=c, minlength=len(tree)) for c in columns], 1)
    for h in np.flatnonzero(tree.inner)[::-1]:
        sums[h] += sums[tree.left[h]] + sums[tree.right[h]]
    g, gv, c, cv, cvv = sums.T
    return rate * (value * g - gv) + 0.5 * rate**2 * (value**2 * c - 2 * value * cv + cvv)


def _mean_of_leaves(tree: FlatTree) -> NDArray[np.float64]:
    """(n_nodes,) leaf values averaged over training samples: scikit-learn updates leaves only."""
    value = tree.value[:, 0].copy()
    for h in np.flatnonzero(tree.inner)[::-1]:
        left, right = tree.left[h], tree.right[h]
        total = tree.weight[left] + tree.weight[right]
        value[h] = (tree.weight[left] * value[left] + tree.weight[right] * value[right]) / total
    return value


def _derivatives(model: Any, x: NDArray, y: NDArray) -> tuple[NDArray, NDArray]:
    """First and second derivatives of each example's loss by its margin."""
    if is_classifier(model):
        p = expit(model.decision_function(x))
        return p - (y == model.classes_[1]), p * (1 - p)
    return model.predict(x) - y, np.ones(len(y))


def _loss(model: Any, x: NDArray, y: NDArray) -> float:
    if is_classifier(model):
        sign = np.where(y == model.classes_[1], -1.0, 1.0)
        return float(np.logaddexp(0, sign * model.decision_function(x)).mean())
    return float(0.5 * np.square(model.predict(x) - y).mean())


def _cost(model: Any, costs: FeatureCosts, x: NDArray[np.float32]) -> float:
    return cost_of_trees(flatten_estimators(model.estimators_[:, 0]), costs, x)


def _rebuilt(
    model: Any, flat: FlatForest, kept: NDArray[np.bool_], values: list[NDArray[np.float64]]
) -> Any:
    pruned = copy.copy(model)
    trees = []
    for estimator, keep, value in zip(
        model.estimators_[:, 0], flat.split(kept), values, strict=True
    ):
        valued = copy.deepcopy(estimator.tree_)
        valued.value[:, 0, 0] = value
        copied = copy.copy(estimator)
        copied.tree_ = rebuild_tree(valued, keep)
        trees.append(copied)
    pruned.estimators_ = np.array(trees, dtype=object)[:, None]
    return pruned


def _check_model(model: Any) -> None:
    if not isinstance(model, GradientBoostingClassifier | GradientBoostingRegressor):
        raise ForestInputError(
            f"only {BINARY} of scikit-learn's GradientBoosting family is pruned",
            field="estimator",
            value=type(model).__name__,
        )
    check_is_fitted(model)
    loss = "log_loss" if is_classifier(model) else "squared_error"
    if model.loss != loss or model.estimators_.shape[1] != 1:
        raise ForestInputError(f"only {BINARY} is pruned", field="estimator", value=model.loss)
