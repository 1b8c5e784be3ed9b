"""What must hold of pruned forests as scikit-learn sees them."""

from __future__ import annotations

import numpy as np
import pytest
from forest_cases import cancer_case, independent_objective, state, tiny_case
from sklearn.datasets import load_diabetes
from sklearn.ensemble import ExtraTreesClassifier, ExtraTreesRegressor, RandomForestRegressor

from secateur.forests import BudgetPruner
from secateur.forests.checks import feature_costs
from secateur.forests.flat import flatten
from secateur.forests.path import full_path
from secateur.forests.rebuild import rebuild_forest
from secateur.forests.solvers import solve

LAMBDAS = (1e-4, 1e-3, 3e-3, 1e-2, 3e-2)


def masked_prediction(forest, masks, x: np.ndarray) -> np.ndarray:
    """Mean over trees of the value where a walk that stops at cut nodes ends."""
    total = 0.0
    for estimator, kept in zip(forest.estimators_, masks, strict=True):
        tree = estimator.tree_
        rows = []
        for row in x:
            h = 0
            while kept[h]:
                go_left = row[tree.feature[h]] <= tree.threshold[h]
                h = tree.children_left[h] if go_left else tree.children_right[h]
            rows.append(
                tree.value[h, 0]
                / (tree.value[h, 0].sum() if estimator_is_classifier(estimator) else 1)
            )
        total = total + np.array(rows)
    return total / len(forest.estimators_)


def estimator_is_classifier(estimator) -> bool:
    return hasattr(estimator, "classes_")


@pytest.mark.parametrize("lam", LAMBDAS)
def test_objective_recomputed_from_the_rebuilt_forest(lam: float) -> None:
    forest, x, y, costs = cancer_case()
    pruner = BudgetPruner(forest, lam=lam, prefit=True).fit(x, y)
    again = independent_objective(pruner.estimator_, x, y, costs, lam)
    assert pruner.objective_ == pytest.approx(again, abs=1e-9)
    assert pruner.objective_ == pytest.approx(pruner.error_ + lam * pruner.cost_, abs=1e-12)
    assert pruner.cost_ == pytest.approx(pruner.expected_cost(x), abs=1e-9)
    assert pruner.dual_bound_ <= pruner.objective_ + 1e-12
    assert pruner.gap_ < 1e-9


@pytest.mark.parametrize("kind", ["classifier", "extra", "regressor", "extra regressor"])
def test_rebuilt_forest_predicts_as_the_masked_walk(kind: str) -> None:
    if "regressor" in kind:
        x, y = load_diabetes(return_X_y=True)
        x = x.astype(np.float32)
        model = (RandomForestRegressor if kind == "regressor" else ExtraTreesRegressor)(
            6, random_state=0
        )
        forest, lam = model.fit(x[:200], y[:200]), 200.0
        x, y = x[200:300], y[200:300]
    else:
        forest, x, y, _ = cancer_case(6)
        lam = 0.003
        if kind == "extra":
            forest = ExtraTreesClassifier(6, random_state=0).fit(x, y)
    pruner = BudgetPruner(forest, lam=lam, prefit=True).fit(x, y)
    assert 0 < sum(k.sum() for k in pruner.kept_) < flatten(forest).n_internal
    got = pruner.predict_proba(x) if "regressor" not in kind else pruner.predict(x)[:, None]
    np.testing.assert_allclose(got, masked_prediction(forest, pruner.kept_, x), rtol=1e-12)


def test_rebuilt_trees_are_consistent() -> None:
    forest, x, y, _ = cancer_case()
    pruner = BudgetPruner(forest, lam=3e-3, prefit=True).fit(x, y)
    for estimator, kept in zip(pruner.estimator_.estimators_, pruner.kept_, strict=True):
        tree = estimator.tree_
        assert tree.node_count == 2 * kept.sum() + 1
        assert tree.n_leaves == kept.sum() + 1 == estimator.get_n_leaves()
        leaf = tree.children_left < 0
        assert (tree.feature[leaf] == -2).all()
        assert (tree.threshold[leaf] == -2).all()
        for h in np.flatnonzero(~leaf):
            children = [tree.children_left[h], tree.children_right[h]]
            assert children[0] == h + 1  # pre-order
            assert tree.n_node_samples[h] == tree.n_node_samples[children].sum()
        depth = tree.decision_path(x).sum(1).max() - 1
        assert estimator.get_depth() >= depth
    everything = [
        np.asarray(k) for k in flatten(forest).split(np.ones(flatten(forest).n_nodes, bool))
    ]
    whole = rebuild_forest(forest, flatten(forest), np.concatenate(everything))
    for before, after in zip(forest.estimators_, whole.estimators_, strict=True):
        assert before.get_depth() == after.get_depth()
        np.testing.assert_array_equal(before.tree_.threshold, after.tree_.threshold)
        np.testing.assert_array_equal(before.tree_.impurity, after.tree_.impurity)


def test_duplicated_examples_are_weights() -> None:
    forest, x, y, costs = tiny_case(4, trees=4, depth=4)
    times = np.arange(len(y)) % 3 + 1.0
    weighted = state(forest, x, y, costs, times)
    rows = np.repeat(np.arange(len(y)), times.astype(int))
    repeated = state(forest, x[rows], y[rows], costs)
    for lam in LAMBDAS:
        one = weighted.lift(solve(weighted.reduced, weighted.price(lam), "push_relabel").kept)
        two = repeated.lift(solve(repeated.reduced, repeated.price(lam), "push_relabel").kept)
        assert (one == two).all()
        assert weighted.measure(one) == pytest.approx(repeated.measure(two))


def test_duplicated_trees_share_their_costs() -> None:
    """Twice the same trees: the mean error and the shared cost stay, so does the pruning."""
    forest, x, y, costs = cancer_case(5)
    single = state(forest, x, y, costs)
    forest.estimators_ = forest.estimators_ * 2
    double = state(forest, x, y, costs)
    for lam in LAMBDAS:
        one = single.lift(solve(single.reduced, single.price(lam), "push_relabel").kept)
        two = double.lift(solve(double.reduced, double.price(lam), "push_relabel").kept)
        assert (np.tile(one, 2) == two).all()
        assert single.measure(one) == pytest.approx(double.measure(two))


def test_order_of_trees_examples_and_features_does_not_matter() -> None:
    forest, x, y, costs = cancer_case(6)
    programme = state(forest, x, y, costs)
    rng = np.random.default_rng(0)
    rows = rng.permutation(len(y))
    forest.estimators_ = [forest.estimators_[t] for t in rng.permutation(6)]
    shuffled = state(forest, x[rows], y[rows], costs)
    for lam in LAMBDAS:
        one = solve(programme.reduced, programme.price(lam), "push_relabel")
        two = solve(shuffled.reduced, shuffled.price(lam), "push_relabel")
        assert one.profit == pytest.approx(two.profit)
        assert one.kept.sum() == two.kept.sum()


def test_one_group_costs_its_price_times_the_share_that_asks() -> None:
    forest, x, y, _ = cancer_case(5)
    costs = feature_costs(3.0, ["all"] * 30, [f"x{i}" for i in range(30)])
    programme = state(forest, x, y, costs)
    for lam in (1e-3, 0.05):
        kept = programme.lift(solve(programme.reduced, programme.price(lam), "push_relabel").kept)
        _, cost = programme.measure(kept)
        # With one group an example pays as soon as any root splits: all or nothing.
        assert cost == pytest.approx(3.0 * kept.any())


def test_free_features_cost_nothing_and_stay() -> None:
    forest, x, y, _ = cancer_case(8)
    free = feature_costs(0.0, None, [f"x{i}" for i in range(30)])
    programme = state(forest, x, y, free)
    path = full_path(programme.reduced, solver="push_relabel")
    assert len(path.breakpoints) == 0
    assert path.cost.tolist() == [0.0]
    some = feature_costs([0.0] * 15 + [1.0] * 15, None, [f"x{i}" for i in range(30)])
    dear = BudgetPruner(forest, feature_costs=some.price, budget=0.0, prefit=True).fit(x, y)
    assert dear.cost_ == 0
    assert dear.expected_cost(x) == 0
    assert sum(k.sum() for k in dear.kept_) > 0
    used = {int(f) for t in dear.estimator_.estimators_ for f in t.tree_.feature if f >= 0}
    assert used <= set(range(15))


def test_lambda_to_infinity_leaves_the_prior() -> None:
    forest, x, y, _ = cancer_case(5)
    pruner = BudgetPruner(forest, lam=1e6, prefit=True).fit(x, y)
    assert pruner.cost_ == 0
    prior = np.mean([t.tree_.value[0, 0] for t in forest.estimators_], axis=0)
    np.testing.assert_allclose(pruner.predict_proba(x), np.tile(prior, (len(x), 1)))


def test_model_scope_pays_once_for_what_the_model_uses() -> None:
    from secateur.forests.metrics import model_cost

    forest, x, y, costs = cancer_case(5)
    for lam in (1e-3, 1e-2):
        pruner = BudgetPruner(forest, lam=lam, cost_scope="model", prefit=True).fit(x, y)
        assert pruner.cost_ == pytest.approx(model_cost(pruner.estimator_, costs))
    programme = state(forest, x, y, costs, cost_scope="model")
    for lam in LAMBDAS:
        price = programme.price(lam)
        exact, oracle = (solve(programme.reduced, price, s) for s in ("push_relabel", "lp"))
        assert exact.profit == pytest.approx(oracle.profit)


@pytest.mark.parametrize("loss", ["error", "gini", "brier", "log"])
def test_node_losses_match_their_definitions(loss: str) -> None:
    forest, x, y, costs = tiny_case(6, trees=2, depth=3)
    programme = state(forest, x, y, costs, loss=loss)
    kept = programme.lift(solve(programme.reduced, programme.price(0.01), "push_relabel").kept)
    error, _ = programme.measure(kept)
    pruned = rebuild_forest(forest, flatten(forest), programme.over_all_nodes(kept))
    target = np.searchsorted(forest.classes_, y)
    total = 0.0
    for tree in pruned.estimators_:
        p, leaf = tree.predict_proba(x), tree.apply(x)
        own = p[np.arange(len(y)), target]
        if loss == "error":
            total += np.mean(p.argmax(1) != target)
        elif loss == "brier":
            total += np.mean(np.square(p).sum(1) - 2 * own + 1)
        elif loss == "log":
            n = tree.tree_.weighted_n_node_samples[leaf]
            total += np.mean(-np.log((own * n + 1) / (n + p.shape[1])))
        else:
            for h in np.unique(leaf):
                share = np.bincount(target[leaf == h], minlength=3) / (leaf == h).sum()
                total += (leaf == h).mean() * (1 - np.square(share).sum())
    assert error == pytest.approx(total / 2, abs=1e-12)


def test_missing_values_follow_the_trees() -> None:
    forest, x, y, _ = cancer_case(6)
    rng = np.random.default_rng(0)
    x = np.where(rng.random(x.shape) < 0.1, np.nan, x).astype(np.float32)
    forest.fit(x, y)
    pruner = BudgetPruner(forest, lam=3e-3, prefit=True).fit(x, y)
    wrong = [
        np.mean(forest.classes_[t.predict(x).astype(int)] != y)
        for t in pruner.estimator_.estimators_
    ]
    assert pruner.error_ == pytest.approx(np.mean(wrong))
    assert pruner.cost_ == pytest.approx(pruner.expected_cost(x))
