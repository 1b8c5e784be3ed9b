"""Boosted trees: the surrogate is right to second order, and a round must pay."""

from __future__ import annotations

import pickle
import warnings

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.datasets import load_breast_cancer, load_diabetes, load_iris
from sklearn.ensemble import (
    GradientBoostingClassifier,
    GradientBoostingRegressor,
    RandomForestClassifier,
)
from sklearn.utils.estimator_checks import parametrize_with_checks

from secateur.forests import BoostingPruner, ForestInputError
from secateur.forests.boosting import _derivatives, _loss, _mean_of_leaves, _rebuilt, _surrogate
from secateur.forests.data_roles import Examples
from secateur.forests.flat import flatten


def cancer():
    x, y = load_breast_cancer(return_X_y=True)
    model = GradientBoostingClassifier(n_estimators=30, random_state=0).fit(x[:300], y[:300])
    return model, x[300:].astype(np.float32), y[300:]


def diabetes():
    x, y = load_diabetes(return_X_y=True)
    model = GradientBoostingRegressor(n_estimators=30, random_state=0).fit(x[:250], y[:250])
    return model, x[250:].astype(np.float32), y[250:]


def test_for_squared_error_the_surrogate_of_one_tree_is_exact() -> None:
    model, x, y = diabetes()
    examples = Examples(x, y, np.ones(len(y)))
    flat = flatten(model)
    values = [_mean_of_leaves(tree) for tree in flat.trees]
    g, c = _derivatives(model, examples)
    change = _surrogate(flat.trees[3], values[3], x, g, c, model.learning_rate)
    for h in np.flatnonzero(flat.trees[3].inner):
        keep = [np.ones(len(tree), dtype=bool) for tree in flat.trees]
        keep[3][h] = False
        cut = _rebuilt(model, flat, np.concatenate(keep), values)
        true = (_loss(cut, examples) - _loss(model, examples)) * len(y)
        assert change[h] == pytest.approx(true, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize(("case", "lam"), [(cancer, 0.005), (diabetes, 20.0)])
def test_rounds_lower_the_true_objective(case, lam: float) -> None:
    model, x, y = case()
    before = model.estimators_[0, 0].tree_.node_count
    pruner = BoostingPruner(model, lam=lam, prefit=True).fit(x, y)
    assert (np.diff(pruner.history_) < 0).all()
    assert len(pruner.history_) > 1
    assert pruner.objective_ == pytest.approx(pruner.loss_ + lam * pruner.cost_)
    assert type(pruner.estimator_) is type(model)
    np.testing.assert_array_equal(pruner.predict(x), pruner.estimator_.predict(x))
    used = np.zeros((len(x), x.shape[1]), dtype=bool)
    for tree in pruner.estimator_.estimators_[:, 0]:
        path = tree.decision_path(x).tocoo()
        feature = tree.tree_.feature[path.col]
        used[path.row[feature >= 0], feature[feature >= 0]] = True
    assert pruner.cost_ == pytest.approx(used.sum(1).mean())
    assert model.estimators_[0, 0].tree_.node_count == before


def test_no_price_keeps_or_improves_the_loss() -> None:
    model, x, y = cancer()
    pruner = BoostingPruner(model, lam=0.0, prefit=True).fit(x, y)
    assert pruner.loss_ <= _loss(model, Examples(x, y, np.ones(len(y))))


def test_other_models_are_refused() -> None:
    x, y = load_iris(return_X_y=True)
    three = GradientBoostingClassifier(n_estimators=2).fit(x, y)
    for model in (three, RandomForestClassifier()):
        with pytest.raises(ForestInputError, match="binary classifier"):
            BoostingPruner(model, lam=0.01, prefit=True).fit(x, y)
    model, x, y = cancer()
    with pytest.raises(ForestInputError, match="lam=-1"):
        BoostingPruner(model, lam=-1, prefit=True).fit(x, y)
    with pytest.raises(ForestInputError, match="30 features"):
        BoostingPruner(model, lam=0.01, prefit=True).fit(x[:, :4], y)


def test_the_interface_is_the_pruners() -> None:
    _, x, y = cancer()
    model = GradientBoostingClassifier(n_estimators=20, random_state=0)
    pruner = BoostingPruner(
        model, feature_groups=[f"g{i // 3}" for i in range(30)], lam=0.01, random_state=0
    ).fit(x, y)
    assert type(pruner.estimator_) is GradientBoostingClassifier
    assert pruner.cost_ < pruner.costs_.total
    usage = pruner.feature_usage(x).toarray()
    assert usage.shape == (len(x), 10)
    assert pruner.expected_cost(x) == pytest.approx(usage.sum(1).mean())
    lazy = pruner.predict_lazy(lambda f, r: x[np.ix_(r, f)], len(x))
    np.testing.assert_array_equal(lazy.prediction, pruner.predict(x))
    np.testing.assert_array_equal(lazy.probability, pruner.predict_proba(x))
    np.testing.assert_array_equal(lazy.fetched, usage)
    assert pruner.score(x, y) == pruner.estimator_.score(x, y)
    again = pickle.loads(pickle.dumps(pruner))
    np.testing.assert_array_equal(again.predict(x), pruner.predict(x))
    assert clone(pruner).get_params()["lam"] == 0.01


@pytest.mark.parametrize("budget", [0.0, 2.0, 5.0, 1e3])
def test_a_budget_is_kept_and_weights_are_repetitions(budget: float) -> None:
    model, x, y = cancer()
    times = np.arange(len(y)) % 3
    weighted = BoostingPruner(model, budget=budget, prefit=True).fit(x, y, sample_weight=times)
    assert weighted.cost_ <= budget
    assert weighted.cost_ == pytest.approx(weighted.expected_cost(x, times))
    rows = np.repeat(np.arange(len(y)), times)
    repeated = BoostingPruner(model, budget=budget, prefit=True).fit(x[rows], y[rows])
    assert repeated.objective_ == pytest.approx(weighted.objective_)
    assert repeated.cost_ == pytest.approx(weighted.cost_)


WEIGHTS = "the hold-out splits weighted and repeated rows differently"


@parametrize_with_checks(
    [
        BoostingPruner(
            GradientBoostingRegressor(n_estimators=20, random_state=0), lam=1e-5, random_state=0
        ),
        BoostingPruner(
            GradientBoostingClassifier(n_estimators=20, random_state=0), budget=50.0, random_state=0
        ),
    ],
    expected_failed_checks=lambda _: {"check_sample_weight_equivalence_on_dense_data": WEIGHTS},
)
def test_scikit_learn_contract_of_boosting(estimator, check) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check(estimator)
