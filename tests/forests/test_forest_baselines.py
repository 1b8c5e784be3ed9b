"""The baselines do what their names say, and the comparison is honest."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.datasets import load_breast_cancer, load_diabetes
from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor

from secateur.errors import UsageError
from secateur.forests import (
    BudgetPruner,
    BudgetRF,
    CostComplexityPruner,
    DepthLimitPruner,
    ForestInputError,
    GreedyPruner,
    Unpruned,
)
from secateur.forests.baselines import cost_complexity
from secateur.forests.compare import METHODS, compare
from secateur.forests.flat import flatten
from secateur.forests.metrics import (
    auc_cost,
    best_within,
    compression,
    expected_feature_cost,
    mean_distinct_features,
)
from secateur.forests.rebuild import rebuild_forest

X, Y = load_breast_cancer(return_X_y=True)
FOREST = RandomForestClassifier(6, random_state=0).fit(X[:300], Y[:300])
KINDS = [Unpruned, DepthLimitPruner, CostComplexityPruner, GreedyPruner]


@pytest.mark.parametrize("alpha", [0.002, 0.01, 0.05])
def test_cost_complexity_is_scikit_learns(alpha: float) -> None:
    grown = clone(FOREST).set_params(ccp_alpha=alpha).fit(X[:300], Y[:300])
    flat = flatten(FOREST)
    pruned = rebuild_forest(FOREST, flat, cost_complexity(flat, alpha))
    for ours, theirs in zip(pruned.estimators_, grown.estimators_, strict=True):
        assert ours.tree_.node_count == theirs.tree_.node_count
    np.testing.assert_array_equal(pruned.predict_proba(X), grown.predict_proba(X))


@pytest.mark.parametrize("kind", KINDS)
def test_baselines_share_the_interface(kind: type) -> None:
    pruner = kind(FOREST, prefit=True).fit(X[300:450], Y[300:450])
    assert pruner.candidates_[0].cost == max(c.cost for c in pruner.candidates_)
    for candidate in pruner.candidates_:
        assert candidate.score == pytest.approx(candidate.forest.score(X[300:450], Y[300:450]))
    if kind is Unpruned:
        with pytest.raises(ForestInputError, match="cheapest costs"):
            pruner.select(0.5)
        return
    pruner.select(6.0)
    assert pruner.expected_cost(X[300:450]) == pytest.approx(pruner.cost_)
    assert pruner.cost_ <= 6.0
    lazy = pruner.predict_lazy(lambda f, r: X[450:][np.ix_(r, f)], len(X) - 450)
    np.testing.assert_array_equal(lazy.prediction, pruner.predict(X[450:]))


def test_depth_limits_cut_at_their_depth() -> None:
    pruner = DepthLimitPruner(FOREST, prefit=True).fit(X[300:], Y[300:])
    for candidate in pruner.candidates_:
        depths = [t.get_depth() for t in candidate.forest.estimators_]
        assert max(depths) <= candidate.knob


def test_greedy_drops_whole_groups_one_at_a_time() -> None:
    groups = [f"g{i // 5}" for i in range(30)]
    pruner = GreedyPruner(FOREST, feature_groups=groups, prefit=True).fit(X[300:], Y[300:])
    by_knob = {c.knob: c.forest for c in pruner.candidates_}
    used = {
        knob: {groups[f] for t in flatten(forest).trees for f in t.feature[t.inner]}
        for knob, forest in by_knob.items()
    }
    knobs = sorted(by_knob)
    for fewer, more in zip(knobs[1:], knobs, strict=False):
        assert used[fewer] < used[more]
    assert used[knobs[-1]] == set()


def test_budgetrf_grows_cheaper_forests_with_larger_alpha() -> None:
    grower = BudgetRF(FOREST, prefit=True, random_state=0)
    grower.fit(X[:300], Y[:300], X_val=X[300:], y_val=Y[300:])
    by_alpha = sorted(grower.candidates_, key=lambda c: c.knob)
    assert by_alpha[0].cost > by_alpha[-1].cost
    assert by_alpha[0].score > 0.9
    for tree in by_alpha[0].forest.estimators_:
        assert (tree.tree_.children_left != 0).all()
        assert tree.predict(X[:5]).shape == (5,)
    with pytest.raises(ForestInputError, match="training examples"):
        BudgetRF(FOREST, prefit=True).fit(X[300:], Y[300:])


def test_budgetrf_prefers_cheap_features() -> None:
    prices = np.where(np.arange(30) < 10, 0.1, 10.0)
    grower = BudgetRF(FOREST, feature_costs=prices, prefit=True, random_state=0)
    grower.fit(X[:300], Y[:300], X_val=X[300:], y_val=Y[300:])
    usage = grower.feature_usage(X[300:]).toarray().mean(0)
    assert usage[:10].sum() > 3 * usage[10:].sum()


def test_a_comparison_is_the_same_again() -> None:
    one, two = (
        compare(
            X, Y, RandomForestClassifier(4), lambda seed: np.ones(30),
            methods=["budgetprune", "greedy", "budgetrf"], seeds=[3], budgets=(0.3, 0.6),
        )
        for _ in range(2)
    )  # fmt: skip
    assert one.scores == two.scores
    assert one.costs == two.costs


def test_budgetprune_beats_cost_complexity_in_the_middle() -> None:
    """The ordering that is robust over seeds (the one against GreedyPrune is not)."""
    result = compare(
        X,
        Y,
        RandomForestClassifier(15),
        lambda seed: np.ones(30),
        methods=["budgetprune", "ccp", "depth"],
        seeds=range(3),
        budgets=(0.2, 0.3, 0.4, 0.5, 0.9),
    )
    mean = {row["method"]: np.array(row["mean"]) for row in result.table()}
    assert (mean["budgetprune"][:2] > mean["ccp"][:2] + 0.02).all()
    assert (mean["budgetprune"][:3] > mean["depth"][:3] + 0.02).all()
    full = np.mean([score for score, _, _ in result.unpruned])
    assert mean["budgetprune"][-1] > full - 0.01


def test_filling_lies_between_the_points() -> None:
    pruner = BudgetPruner(FOREST, lam=0.0, prefit=True).fit(X[300:], Y[300:])
    path = pruner.prune_path()
    filled = pruner.filled_path(path)
    assert filled
    x = X[300:].astype(np.float32)
    for forest in filled:
        cost = expected_feature_cost(forest, pruner.costs_, x)
        point = int(np.searchsorted(path.cost, cost))
        assert 0 < point < len(path)
        # Nothing lies below the hull.
        error = np.mean([t.predict(x).astype(int) != Y[300:] for t in forest.estimators_])
        chord = np.interp(cost, path.cost, path.error)
        assert error >= chord - 1e-9


def test_regression_and_missing_packages_are_left_out_with_a_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, y = load_diabetes(return_X_y=True)
    monkeypatch.setattr("secateur.forests.lightgbm_lazy.find_spec", lambda name: None)
    result = compare(
        x,
        y,
        RandomForestRegressor(5),
        lambda seed: np.ones(10),
        methods=["budgetprune", "budgetrf", "lightgbm-lazy", "greedy"],
        seeds=[0],
        budgets=(0.5, 1.0),
    )
    assert set(result.left_out) == {"budgetrf", "lightgbm-lazy"}
    assert set(result.scores) == {"budgetprune", "greedy"}
    with pytest.raises(UsageError, match="did you mean 'greedy'"):
        METHODS["gredy"]


@pytest.mark.skipif(not find_spec("lightgbm"), reason="needs lightgbm")
def test_lightgbm_penalties_lower_the_cost() -> None:
    result = compare(
        X,
        Y,
        RandomForestClassifier(10),
        lambda seed: np.ones(30),
        methods=["lightgbm-lazy"],
        seeds=[0],
    )
    curve = sorted(result.curves["lightgbm-lazy"][0], key=lambda p: p.knob)
    assert curve[0].test_cost > 2 * curve[-1].test_cost


def test_figures_of_curves() -> None:
    assert best_within([0, 2, 4], [0.5, 0.9, 0.8], [-1, 1, 5]).tolist()[1:] == [0.5, 0.9]
    assert np.isnan(best_within([1.0], [0.5], [0.5])[0])
    # Half the budgets see 0.5, half see 0.9.
    assert auc_cost([0, 2], [0.5, 0.9], 4) == pytest.approx(0.7)
    pruner = BudgetPruner(FOREST, budget=4.0, prefit=True).fit(X[300:], Y[300:])
    x = X.astype(np.float32)
    assert mean_distinct_features(pruner.estimator_, pruner.costs_, x) == pytest.approx(
        pruner.expected_cost(X)
    )
    share = compression(pruner.estimator_, FOREST)
    kept = sum(int(k.sum()) for k in pruner.kept_)
    assert share == pytest.approx((2 * kept + 6) / flatten(FOREST).n_nodes)
