"""Boosted trees: the surrogate is right to second order, and a round must pay."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.datasets import load_breast_cancer, load_diabetes, load_iris
from sklearn.ensemble import (
    GradientBoostingClassifier,
    GradientBoostingRegressor,
    RandomForestClassifier,
)

from secateur.forests import BoostingPruner, ForestInputError
from secateur.forests.boosting import _derivatives, _loss, _mean_of_leaves, _rebuilt, _surrogate
from secateur.forests.flat import flatten_estimators


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
    flat = flatten_estimators(model.estimators_[:, 0])
    values = [_mean_of_leaves(tree) for tree in flat.trees]
    g, c = _derivatives(model, x, y)
    change = _surrogate(flat.trees[3], values[3], x, g, c, model.learning_rate)
    for h in np.flatnonzero(flat.trees[3].inner):
        keep = [np.ones(len(tree), dtype=bool) for tree in flat.trees]
        keep[3][h] = False
        cut = _rebuilt(model, flat, np.concatenate(keep), values)
        true = (_loss(cut, x, y) - _loss(model, x, y)) * len(y)
        assert change[h] == pytest.approx(true, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize(("case", "lam"), [(cancer, 0.005), (diabetes, 20.0)])
def test_rounds_lower_the_true_objective(case, lam: float) -> None:
    model, x, y = case()
    before = model.estimators_[0, 0].tree_.node_count
    pruner = BoostingPruner(model, lam=lam).fit(x, y)
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
    pruner = BoostingPruner(model, lam=0.0).fit(x, y)
    assert pruner.loss_ <= _loss(model, x, y)


def test_other_models_are_refused() -> None:
    x, y = load_iris(return_X_y=True)
    three = GradientBoostingClassifier(n_estimators=2).fit(x, y)
    for model in (three, RandomForestClassifier()):
        with pytest.raises(ForestInputError, match="binary classifier"):
            BoostingPruner(model).fit(x, y)
    model, x, y = cancer()
    with pytest.raises(ForestInputError, match="lam=-1"):
        BoostingPruner(model, lam=-1).fit(x, y)
    with pytest.raises(ForestInputError, match="30 features"):
        BoostingPruner(model).fit(x[:, :4], y)
