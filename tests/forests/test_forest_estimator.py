"""BudgetPruner as a scikit-learn citizen: contract, data roles, prices, lazy prediction, bad input."""

from __future__ import annotations

import pickle
import warnings
from importlib.util import find_spec

import joblib
import numpy as np
import pytest
from sklearn.base import clone
from sklearn.datasets import load_breast_cancer, load_diabetes, load_iris
from sklearn.ensemble import (
    ExtraTreesClassifier,
    GradientBoostingClassifier,
    RandomForestClassifier,
    RandomForestRegressor,
)
from sklearn.exceptions import NotFittedError
from sklearn.frozen import FrozenEstimator
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from secateur.errors import UsageError
from secateur.forests import BudgetPruner, ForestInputError, GreedyPruner
from secateur.forests.flat import flatten

X, Y = load_breast_cancer(return_X_y=True)
FOREST = RandomForestClassifier(8, random_state=0)
BOOTSTRAP = "weights and repetitions draw different bags and hold-outs, as in any bagged forest"


def expected_failures(estimator) -> dict[str, str]:
    return {"check_sample_weight_equivalence_on_dense_data": BOOTSTRAP}


def changed(pruner: BudgetPruner, **parameters) -> BudgetPruner:
    """A copy with the same fitted forest inside, which ``clone`` would unfit."""
    return BudgetPruner(**(pruner.get_params(deep=False) | parameters))


@parametrize_with_checks(
    [
        BudgetPruner(RandomForestClassifier(3, random_state=0), lam=1e-3, random_state=0),
        BudgetPruner(RandomForestRegressor(3, random_state=0), lam=1e-3, random_state=0),
        GreedyPruner(ExtraTreesClassifier(3, random_state=0), random_state=0),
    ],
    expected_failed_checks=expected_failures,
)
def test_scikit_learn_contract(estimator, check) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check(estimator)


def test_pipeline_clone_grid_search_and_pickle() -> None:
    pipeline = make_pipeline(StandardScaler(), BudgetPruner(FOREST, budget=4.0, random_state=0))
    assert cross_val_score(pipeline, X, Y, cv=3).mean() > 0.85
    copied = clone(pipeline)
    search = GridSearchCV(copied, {"budgetpruner__budget": [1.0, 6.0]}, cv=2).fit(X, Y)
    again = pickle.loads(pickle.dumps(search.best_estimator_))
    np.testing.assert_array_equal(again.predict(X), search.predict(X))
    pruner = again[-1]
    assert pruner.expected_cost(again[0].transform(X)) >= 0
    with pytest.raises(ForestInputError, match="fit again"):
        pruner.prune_path()


def test_a_frozen_forest_is_pruned_as_it_is_and_survives_clone() -> None:
    forest = clone(FOREST).fit(X[:300], Y[:300])
    frozen = BudgetPruner(FrozenEstimator(forest), budget=3.0)
    search = GridSearchCV(frozen, {"budget": [1.0, 3.0]}, cv=2).fit(X[300:], Y[300:])
    assert search.best_estimator_.unpruned_ is not None
    frozen.fit(X[300:], Y[300:])
    same = BudgetPruner(forest, budget=3.0, prefit=True).fit(X[300:], Y[300:])
    np.testing.assert_array_equal(frozen.predict_proba(X), same.predict_proba(X))


def test_the_result_is_an_ordinary_forest() -> None:
    pruner = BudgetPruner(FOREST, budget=4.0, random_state=0).fit(X, Y)
    assert type(pruner.estimator_) is RandomForestClassifier
    revived = pickle.loads(pickle.dumps(pruner.estimator_))
    np.testing.assert_array_equal(revived.predict_proba(X), pruner.predict_proba(X))
    assert revived.feature_importances_.shape == (30,)
    assert flatten(revived).n_nodes < flatten(pruner.unpruned_).n_nodes


def test_budget_holds_on_the_pruning_examples_and_neighbours_enclose_it() -> None:
    forest = clone(FOREST).fit(X[:300], Y[:300])
    for budget in (0.0, 1.5, 5.0, 100.0):
        pruner = BudgetPruner(forest, budget=budget, prefit=True).fit(X[300:], Y[300:])
        within, above = pruner.neighbours_
        assert pruner.expected_cost(X[300:]) == pytest.approx(within.cost) == pruner.cost_
        assert within.cost <= budget
        if above is not None:
            assert above.cost > budget
            # Both neighbours are optimal where they meet.
            meet = [p.error + above.lam * p.cost for p in (within, above)]
            assert meet[0] == pytest.approx(meet[1])
            optimum = BudgetPruner(forest, lam=above.lam, prefit=True).fit(X[300:], Y[300:])
            assert optimum.objective_ == pytest.approx(meet[0])


def test_greedy_fill_reaches_budgets_between_hull_points_with_a_certified_gap() -> None:
    forest = clone(FOREST).fit(X[:300], Y[:300])
    hull = BudgetPruner(forest, lam=0.0, prefit=True).fit(X[300:], Y[300:])
    cost = hull.prune_path().cost
    step = int(np.diff(cost).argmax())
    budget = float(cost[step] + cost[step + 1]) / 2
    plain = BudgetPruner(forest, budget=budget, prefit=True).fit(X[300:], Y[300:])
    filled = changed(plain, fill="greedy").fit(X[300:], Y[300:])
    assert filled.cost_ <= budget
    assert filled.error_ <= plain.error_
    assert filled.objective_ == pytest.approx(filled.dual_bound_ + filled.gap_)
    assert filled.expected_cost(X[300:]) == pytest.approx(filled.cost_)


def test_prune_path_set_lambda_and_select_agree() -> None:
    forest = clone(FOREST).fit(X[:300], Y[:300])
    pruner = BudgetPruner(forest, lam=1e-3, prefit=True).fit(X[300:], Y[300:])
    path = pruner.prune_path()
    assert path.complete
    for i in range(1, len(path) - 1, 3):
        lam = float(np.sqrt(path.points[i].lam * path.points[i + 1].lam))
        pruner.set_lambda(lam)
        assert (pruner.error_, pruner.cost_) == pytest.approx((path.error[i], path.cost[i]))
        pruner.select(path.cost[i] * 1.0001)
        assert pruner.cost_ == pytest.approx(path.cost[i])
        same = pruner.forest_at(path, i)
        np.testing.assert_array_equal(same.predict_proba(X), pruner.predict_proba(X))
    some = pruner.prune_path(lams=[1e-4, 1e-3, 1e-2])
    pruner.set_lambda(1e-3)
    assert np.isclose(some.cost, pruner.cost_).any()


@pytest.mark.parametrize("source", ["train", "oob", "both"])
def test_error_sources_use_the_bags(source: str) -> None:
    forest = clone(FOREST).fit(X, Y)
    pruner = BudgetPruner(forest, lam=1e-3, error_source=source, prefit=True).fit(X, Y)
    errors = []
    for tree, bag in zip(pruner.estimator_.estimators_, forest.estimators_samples_, strict=True):
        times = np.bincount(bag, minlength=len(Y))
        weight = {"train": times, "oob": times == 0, "both": np.maximum(times, 1)}[source]
        errors.append(np.average(tree.predict(X).astype(int) != Y, weights=weight))
    assert pruner.error_ == pytest.approx(np.mean(errors))
    assert pruner.cost_ == pytest.approx(pruner.expected_cost(X))
    if source == "oob":  # no price: reduced-error pruning still happens
        free = changed(pruner, lam=0.0, error_source="oob").fit(X, Y)
        assert flatten(free.estimator_).n_nodes < flatten(forest).n_nodes


def test_regression_prunes_squared_error() -> None:
    x, y = load_diabetes(return_X_y=True)
    forest = RandomForestRegressor(10, random_state=0).fit(x[:250], y[:250])
    pruner = BudgetPruner(forest, lam=30.0, prefit=True).fit(x[250:], y[250:])
    tree_errors = [
        np.mean((t.predict(x[250:]) - y[250:]) ** 2) for t in pruner.estimator_.estimators_
    ]
    assert pruner.error_ == pytest.approx(np.mean(tree_errors))
    assert 0 < pruner.cost_ < 10
    lazy = pruner.predict_lazy(lambda f, r: x[250:][np.ix_(r, f)], len(y) - 250)
    np.testing.assert_allclose(lazy.prediction, pruner.predict(x[250:]))
    assert lazy.probability is None


def test_predict_lazy_asks_for_nothing_else_and_charges_the_expected_cost() -> None:
    groups = [f"g{i // 3}" for i in range(30)]
    prices = {f"g{i}": float(i) for i in range(10)}
    pruner = BudgetPruner(
        FOREST, feature_costs=prices, feature_groups=groups, budget=8.0, random_state=0
    ).fit(X, Y)
    asked = np.zeros((len(X), 10), dtype=bool)

    def fetch(features: np.ndarray, rows: np.ndarray) -> np.ndarray:
        group = {int(pruner.costs_.group[f]) for f in features}
        assert len(group) == 1
        assert not asked[rows, group.pop()].any(), "asked twice"
        asked[rows, pruner.costs_.group[features[0]]] = True
        return X[np.ix_(rows, features)]

    lazy = pruner.predict_lazy(fetch, len(X))
    np.testing.assert_array_equal(lazy.prediction, pruner.predict(X))
    np.testing.assert_array_equal(lazy.probability, pruner.predict_proba(X))
    np.testing.assert_array_equal(asked, pruner.feature_usage(X).toarray())
    np.testing.assert_array_equal(asked, lazy.fetched)
    assert lazy.paid.sum() == pytest.approx(pruner.expected_cost(X) * len(X))
    with pytest.raises(ForestInputError, match="shape"):
        pruner.predict_lazy(lambda features, rows: np.zeros(3), 10)


def test_data_frames_keep_their_names() -> None:
    frame = load_iris(as_frame=True)
    prices = {
        "sepal length (cm)": 1,
        "sepal width (cm)": 1,
        "petal length (cm)": 5,
        "petal width (cm)": 5,
    }
    pruner = BudgetPruner(
        RandomForestClassifier(5, random_state=0), feature_costs=prices, budget=5.0, random_state=0
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pruner.fit(frame.data, frame.target).predict(frame.data)
        pruner.expected_cost(frame.data)
        data = frame.data.to_numpy()
        lazy = pruner.predict_lazy(lambda f, r: data[np.ix_(r, f)], len(data))
    np.testing.assert_array_equal(lazy.prediction, pruner.predict(frame.data))
    assert list(pruner.costs_.names) == list(frame.data.columns)
    with pytest.raises(ForestInputError, match="petal size"):
        clone(pruner).set_params(feature_costs=prices | {"petal size": 1}).fit(
            frame.data, frame.target
        )
    del prices["petal width (cm)"]
    with pytest.raises(ForestInputError, match="petal width"):
        clone(pruner).set_params(feature_costs=prices).fit(frame.data, frame.target)


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"lam": None}, "none given"),
        ({"budget": 2.0}, "both given"),
        ({"lam": -1.0}, "lam=-1.0"),
        ({"lam": float("nan")}, "lam=nan"),
        ({"lam": None, "budget": -3}, "budget=-3"),
        ({"lam": None, "budget": "much"}, "budget='much'"),
        ({"feature_costs": np.r_[-1.0, np.ones(29)]}, "x0"),
        ({"feature_costs": np.r_[np.ones(29), np.nan]}, "x29"),
        ({"feature_costs": [1.0, 2.0]}, "each of the 30"),
        ({"feature_costs": ["dear"] * 30}, "prices are numbers"),
        ({"feature_costs": {f"x{i}": "dear" for i in range(30)}}, "prices are numbers"),
        ({"feature_groups": 3}, "1 labels"),
        ({"validation_fraction": "half"}, "validation_fraction='half'"),
        ({"lam": True}, "lam=True"),
        ({"feature_groups": ["a"]}, "feature_groups"),
        ({"feature_groups": ["a"] * 30, "feature_costs": np.arange(30.0)}, "two prices"),
        ({"error_source": "test"}, "error_source='test'"),
        ({"node_loss": "squared"}, "node_loss='squared'"),
        ({"cost_scope": "tree"}, "cost_scope='tree'"),
        ({"solver": "simplex"}, "solver='simplex'"),
        ({"fill": "all"}, "fill='all'"),
        ({"steps": "long"}, "steps='long'"),
        ({"max_iter": 0}, "max_iter=0"),
        ({"validation_fraction": 1.5}, "validation_fraction=1.5"),
        ({"lam": None, "budget": 1.0, "solver": "primal_dual"}, "nested"),
        ({"estimator": GradientBoostingClassifier()}, "GradientBoostingClassifier"),
        (
            {"estimator": RandomForestClassifier(2, bootstrap=False), "error_source": "oob"},
            "bootstrap",
        ),
    ],
)
def test_wrong_parameters_are_named(parameters: dict, words: str) -> None:
    pruner = BudgetPruner(FOREST, lam=1e-3).set_params(**parameters)
    with pytest.raises(ValueError, match=words) as caught:
        pruner.fit(X, Y)
    assert isinstance(caught.value, UsageError)


def test_wrong_data_is_named() -> None:
    forest = clone(FOREST).fit(X, Y)
    pruner = BudgetPruner(forest, lam=1e-3, prefit=True)
    with pytest.raises(ForestInputError, match="go together"):
        pruner.fit(X, Y, X_val=X)
    with pytest.raises(ForestInputError, match="30 features"):
        pruner.fit(X[:, :5], Y)
    with pytest.raises(ValueError, match="0 sample"):
        pruner.fit(X, Y, X_val=X[:0], y_val=Y[:0])
    with pytest.raises(ValueError, match="zero"):
        pruner.fit(X, Y, sample_weight=np.zeros(len(Y)))
    with pytest.raises(ForestInputError, match="its order"):
        changed(pruner, error_source="oob").fit(X[:100], Y[:100])
    with pytest.raises(NotFittedError):
        BudgetPruner(RandomForestClassifier(), lam=1.0, prefit=True).fit(X, Y)
    with pytest.raises(NotFittedError):
        BudgetPruner(FOREST, lam=1.0).predict(X)
    two = RandomForestClassifier(2).fit(X, np.stack([Y, 1 - Y], 1))
    with pytest.raises(ForestInputError, match="one output"):
        BudgetPruner(two, lam=1.0, prefit=True).fit(X, Y)


def test_wrong_requests_of_a_fitted_pruner_are_named() -> None:
    pruner = BudgetPruner(FOREST, lam=1e-3, random_state=0).fit(X, Y)
    path = pruner.prune_path(points=3)
    for call, words in (
        (lambda: pruner.predict_lazy(lambda f, r: X[r][:, f], -1), "n=-1"),
        (lambda: pruner.predict_lazy(lambda f, r: X[r][:, f], 2.5), "n=2.5"),
        (lambda: pruner.predict_lazy(lambda f, r: ["a"] * len(r), 2), "no array of numbers"),
        (lambda: pruner.predict_lazy(X, 2), "must be a function"),
        (lambda: pruner.prune_path(points=1), "points=1"),
        (lambda: pruner.forest_at(path, 3), "has 3 points"),
    ):
        with pytest.raises(ForestInputError, match=words):
            call()
    last, same = pruner.forest_at(path, -1), pruner.forest_at(path, 2)
    assert (last.predict_proba(X) == same.predict_proba(X)).all()


def test_unseen_labels_count_as_wrong_with_a_warning() -> None:
    x, y = load_iris(return_X_y=True)
    forest = RandomForestClassifier(5, random_state=0).fit(x[:100], y[:100])
    pruner = BudgetPruner(forest, lam=0.0, prefit=True)
    with pytest.warns(UserWarning, match="always wrong"):
        pruner.fit(x, y)
    assert pruner.error_ >= 1 / 3 - 1e-12


def test_single_leaf_trees_and_unused_features() -> None:
    x = np.ones((40, 3))
    y = np.arange(40) % 2
    forest = RandomForestClassifier(3, random_state=0).fit(x, y)
    pruner = BudgetPruner(forest, budget=1.0, prefit=True).fit(x, y)
    assert pruner.cost_ == 0
    assert pruner.feature_usage(x).nnz == 0
    assert pruner.prune_path().complete
    x[:, 1] = y
    forest = RandomForestClassifier(3, random_state=0, max_features=None).fit(x, y)
    pruner = BudgetPruner(forest, lam=1e-3, prefit=True).fit(x, y)
    assert set(pruner.feature_usage(x).indices) == {1}


def test_drop_stumps_leaves_only_trees_that_split() -> None:
    forest = clone(FOREST).fit(X[:300], Y[:300])
    kept = BudgetPruner(forest, budget=1.0, prefit=True).fit(X[300:], Y[300:])
    splitting = sum(t.tree_.node_count > 1 for t in kept.estimator_.estimators_)
    dropped = changed(kept, drop_stumps=True).fit(X[300:], Y[300:])
    assert 0 < len(dropped.estimator_.estimators_) == splitting < 8
    assert dropped.estimator_.n_estimators == splitting


def test_weights_of_validation_examples_are_repetitions() -> None:
    forest = clone(FOREST).fit(X[:300], Y[:300])
    times = np.arange(len(Y) - 300) % 3
    rows = 300 + np.repeat(np.arange(len(times)), times)
    weighted = BudgetPruner(forest, lam=3e-3, prefit=True)
    weighted.fit(X[:300], Y[:300], X_val=X[300:], y_val=Y[300:], sample_weight_val=times)
    repeated = changed(weighted).fit(X[:300], Y[:300], X_val=X[rows], y_val=Y[rows])
    assert weighted.objective_ == pytest.approx(repeated.objective_)
    assert weighted.cost_ == pytest.approx(weighted.expected_cost(X[300:], times))
    np.testing.assert_array_equal(weighted.predict(X), repeated.predict(X))
    with pytest.raises(ForestInputError, match="X_val is not given"):
        changed(weighted).fit(X, Y, sample_weight_val=times)
    with pytest.raises(ValueError, match="sample_weight"):
        changed(weighted).fit(X, Y, X_val=X, y_val=Y, sample_weight_val=times)


def test_primal_dual_reports_its_gap() -> None:
    forest = clone(FOREST).fit(X[:300], Y[:300])
    exact = BudgetPruner(forest, lam=3e-3, prefit=True).fit(X[300:], Y[300:])
    near = changed(exact, solver="primal_dual").fit(X[300:], Y[300:])
    assert near.dual_bound_ <= exact.objective_ + 1e-12 <= near.objective_ + 1e-9
    assert near.gap_ == pytest.approx(near.objective_ - near.dual_bound_)


@pytest.mark.skipif(not find_spec("skl2onnx"), reason="needs skl2onnx and onnxruntime")
def test_onnx_of_the_pruned_forest() -> None:
    from onnxruntime import InferenceSession
    from skl2onnx import to_onnx

    pruner = BudgetPruner(FOREST, budget=4.0, random_state=0).fit(X.astype(np.float32), Y)
    x = X.astype(np.float32)
    model = to_onnx(pruner.estimator_, x[:1], options={"zipmap": False})
    labels, probabilities = InferenceSession(model.SerializeToString()).run(None, {"X": x})
    np.testing.assert_array_equal(labels, pruner.predict(x))
    np.testing.assert_allclose(probabilities, pruner.predict_proba(x), atol=1e-5)


@pytest.mark.parametrize("backend", ["loky", "threading"])
def test_any_joblib_backend_gives_the_same(backend: str) -> None:

    forest = clone(FOREST).fit(X[:300], Y[:300])
    alone = BudgetPruner(forest, lam=3e-3, prefit=True).fit(X[300:], Y[300:])
    with joblib.parallel_config(backend=backend, n_jobs=2):
        spread = changed(alone).fit(X[300:], Y[300:])
    assert spread.objective_ == alone.objective_
    for one, two in zip(alone.kept_, spread.kept_, strict=True):
        np.testing.assert_array_equal(one, two)


def on_a_cluster(backend: str) -> None:
    """The same optimum, and that the work really went to the backend that was asked for."""
    forest = clone(FOREST).fit(X[:300], Y[:300])
    alone = BudgetPruner(forest, lam=3e-3, prefit=True).fit(X[300:], Y[300:])
    with joblib.parallel_config(backend=backend, n_jobs=2):
        chosen = joblib.Parallel(prefer="threads")._backend
        assert backend in type(chosen).__module__.lower() + type(chosen).__name__.lower()
        spread = changed(alone).fit(X[300:], Y[300:])
    assert spread.objective_ == alone.objective_
    for ours, theirs in zip(spread.kept_, alone.kept_, strict=True):
        assert (ours == theirs).all()


@pytest.mark.slow  # workers are processes, and import everything anew
@pytest.mark.skipif(not find_spec("distributed"), reason="needs dask.distributed")
def test_trees_on_a_dask_cluster() -> None:
    from distributed import Client, LocalCluster

    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        Client(cluster),
    ):
        on_a_cluster("dask")


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("ray"), reason="needs ray")
def test_trees_on_a_ray_cluster() -> None:
    import ray
    from ray.util.joblib import register_ray

    register_ray()
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        on_a_cluster("ray")
    finally:
        ray.shutdown()


def test_a_fitted_forest_with_other_columns_is_refused() -> None:
    frame, y = load_iris(return_X_y=True, as_frame=True)
    forest = RandomForestClassifier(4, random_state=0).fit(frame, y)
    turned = frame[list(frame.columns[::-1])]
    with pytest.raises(ForestInputError, match="another order"):
        BudgetPruner(forest, lam=0.0, prefit=True).fit(turned, y)
    BudgetPruner(forest, lam=0.0, prefit=True).fit(turned[forest.feature_names_in_], y)


@pytest.mark.parametrize("scale", [1e-9, 1e9])
def test_the_scale_of_the_target_does_not_matter(scale) -> None:
    x, y = load_diabetes(return_X_y=True)

    def kept(target) -> int:
        forest = RandomForestRegressor(4, max_depth=5, random_state=0)
        pruner = BudgetPruner(forest, lam=0.0, random_state=0).fit(x, target)
        return sum(tree.tree_.node_count for tree in pruner.estimator_.estimators_)

    assert abs(kept(y * scale) - kept(y)) <= 2


def test_a_hull_point_that_costs_the_budget_is_within_it() -> None:
    path = BudgetPruner(FOREST, lam=0.0, random_state=0).fit(X, Y).prune_path()
    points = path.points
    for point in points[:: max(1, len(points) // 6)]:
        pruner = BudgetPruner(FOREST, budget=point.cost, random_state=0).fit(X, Y)
        assert pruner.cost_ == pytest.approx(point.cost, rel=1e-8)
