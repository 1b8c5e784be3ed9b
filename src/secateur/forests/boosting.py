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
from numbers import Integral
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit
from sklearn.base import is_classifier
from sklearn.ensemble import GradientBoostingClassifier, GradientBoostingRegressor
from sklearn.utils.validation import check_is_fitted

from secateur.forests.checks import ForestInputError, check_lam_or_budget
from secateur.forests.closure import ClosureProblem
from secateur.forests.data_roles import Examples
from secateur.forests.estimator import BudgetedForest
from secateur.forests.flat import FlatForest, FlatTree, flatten
from secateur.forests.metrics import expected_feature_cost
from secateur.forests.programme import closure_problem
from secateur.forests.rebuild import rebuild_tree
from secateur.forests.reduction import reduce_problem
from secateur.forests.routing import leaves
from secateur.forests.solvers import solve
from secateur.progress import Progress

BINARY = "a binary classifier or a regressor with squared error"
BISECTIONS = 20


class BoostingPruner(BudgetedForest):
    """Prunes a scikit-learn gradient boosting model for its features' costs (heuristic).

    Args:
        estimator: a ``GradientBoostingRegressor`` (squared error) or a binary
            ``GradientBoostingClassifier`` (log loss).
        feature_costs, feature_groups: as in ``BudgetPruner``.
        lam: the price of one cost unit in units of the loss (log loss, or half squared error).
            Exactly one of ``lam`` and ``budget``.
        budget: the most an average pruning example may pay. Lambda is bisected, and the pruning
            met on the way that has the least loss within the budget is taken.
        rounds: how often to solve around the pruned model.
        solver: as in ``BudgetPruner``.
        prefit, validation_fraction, n_jobs, random_state: as in ``BudgetPruner``.

    Attributes:
        estimator_: the pruned model, a genuine scikit-learn one.
        unpruned_: the model before.
        lam_, objective_, loss_, cost_: of the pruning, on the pruning examples; the objective is
            the true loss plus lam times cost. There is no bound: it is a heuristic.
        history_: the objective before pruning and after each round that was kept.
    """

    def __init__(
        self,
        estimator: Any,
        *,
        feature_costs: Any = None,
        feature_groups: Any = None,
        lam: float | None = None,
        budget: float | None = None,
        rounds: int = 4,
        solver: str = "auto",
        prefit: bool = False,
        validation_fraction: float = 0.3,
        n_jobs: int | None = None,
        random_state: Any = None,
    ) -> None:
        self.estimator = estimator
        self.feature_costs = feature_costs
        self.feature_groups = feature_groups
        self.lam = lam
        self.budget = budget
        self.rounds = rounds
        self.solver = solver
        self.prefit = prefit
        self.validation_fraction = validation_fraction
        self.n_jobs = n_jobs
        self.random_state = random_state

    def _check_parameters(self) -> None:
        check_lam_or_budget(self.lam, self.budget)
        if not isinstance(self.rounds, Integral) or self.rounds < 1:
            raise ForestInputError("must be 1 or more", field="rounds", value=self.rounds)

    def _prune(
        self, forest: Any, train: Examples | None, validation: Examples | None, progress: Progress
    ) -> None:
        assert validation is not None
        if not validation.weight.sum() > 0:
            raise ForestInputError("weights must not all be zero", field="sample_weight")
        if self.lam is not None:
            self._adopt(self.lam, *self._pruned(self.lam, validation), validation)
        else:
            self._bisect(validation, progress)

    @property
    def n_iter_(self) -> int:
        """Rounds that were kept, and the one that ended them."""
        return len(self.history_)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        if tags.classifier_tags is not None:
            tags.classifier_tags.multi_class = False
        return tags

    def _check_kind(self, estimator: Any) -> None:
        if not isinstance(estimator, GradientBoostingClassifier | GradientBoostingRegressor):
            raise ForestInputError(
                f"only {BINARY} of scikit-learn's GradientBoosting family is pruned",
                field="estimator",
                value=type(estimator).__name__,
            )
        if estimator.loss != ("log_loss" if is_classifier(estimator) else "squared_error"):
            raise ForestInputError(
                f"only {BINARY} is pruned", field="estimator", value=estimator.loss
            )

    def _check_fitted(self, estimator: Any) -> None:
        check_is_fitted(estimator)
        if estimator.estimators_.shape[1] != 1:
            raise ForestInputError(
                f"only {BINARY} is pruned. Only binary classification is supported. "
                "The type of the target is multiclass",
                field="estimator",
                value=f"{estimator.estimators_.shape[1]} classes",
            )

    def _bisect(self, examples: Examples, progress: Progress) -> None:
        """Adopt the least loss within the budget that bisection over lambda meets."""
        assert self.budget is not None
        limit = self.budget * (1 + 1e-9)
        low, high = 0.0, None
        best: tuple[float, float, Any, list[float]] | None = None
        lam = 0.0
        with progress.stage("budget", total=BISECTIONS, unit="prices") as advance:
            for _ in range(BISECTIONS):
                model, history = self._pruned(lam, examples)
                advance(1)
                if self._cost(model, examples) <= limit:
                    loss = _loss(model, examples)
                    if best is None or loss < best[0]:
                        best = (loss, lam, model, history)
                    high = lam
                    if lam == 0:
                        break
                else:
                    low = lam
                if high is None:
                    total = max(self.costs_.total, 1e-12)
                    lam = 10 * low if low else 1e-3 * _loss(self.unpruned_, examples) / total
                else:
                    lam = float(np.sqrt(low * high)) if low else high / 10
        if best is None:
            raise ForestInputError(
                "no pruning found is that cheap", field="budget", value=self.budget,
                fix="a larger budget, or lam=",
            )  # fmt: skip
        _, lam, model, history = best
        self._adopt(lam, model, history, examples)

    def _adopt(self, lam: float, model: Any, history: list[float], examples: Examples) -> None:
        self.lam_ = float(lam)
        self.estimator_, self.history_ = model, history
        self.loss_, self.cost_ = _loss(model, examples), self._cost(model, examples)
        self.objective_ = self.loss_ + self.lam_ * self.cost_

    def _pruned(self, lam: float, examples: Examples) -> tuple[Any, list[float]]:
        """The model after all rounds that lower the objective, and the objectives."""
        model = self.unpruned_
        history = [_loss(model, examples) + lam * self._cost(model, examples)]
        for _ in range(self.rounds):
            proposed = self._round(model, lam, examples)
            value = _loss(proposed, examples) + lam * self._cost(proposed, examples)
            if value >= history[-1] - 1e-12:
                break
            model = proposed
            history.append(value)
        return model, history

    def _cost(self, model: Any, examples: Examples) -> float:
        return expected_feature_cost(model, self.costs_, examples.dense(), examples.weight)

    def _round(self, model: Any, lam: float, examples: Examples) -> Any:
        """Solve the surrogate around ``model`` and rebuild; cut nodes predict their leaves' mean."""
        x, weight = examples.dense(), examples.weight
        flat = flatten(model)
        values = [_mean_of_leaves(tree) for tree in flat.trees]
        gradient, curvature = (weight * d for d in _derivatives(model, examples))
        losses = [
            _surrogate(tree, value, x, gradient, curvature, model.learning_rate)
            for tree, value in zip(flat.trees, values, strict=True)
        ]
        problem, internal = closure_problem(
            flat, losses, self.costs_, x, weight, n_jobs=self.n_jobs
        )
        kept = _solve(problem, lam * weight.sum(), self.solver)
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


def _derivatives(model: Any, examples: Examples) -> tuple[NDArray, NDArray]:
    """First and second derivatives of each example's loss by its margin."""
    if is_classifier(model):
        p = expit(model.decision_function(examples.x))
        return p - (examples.y == model.classes_[1]), p * (1 - p)
    return model.predict(examples.x) - examples.y, np.ones(len(examples))


def _loss(model: Any, examples: Examples) -> float:
    if is_classifier(model):
        sign = np.where(examples.y == model.classes_[1], -1.0, 1.0)
        loss = np.logaddexp(0, sign * model.decision_function(examples.x))
    else:
        loss = 0.5 * np.square(model.predict(examples.x) - examples.y)
    return float(np.average(loss, weights=examples.weight))


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
