"""Small forests, and a second opinion on what a pruning is worth that shares no code."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
from sklearn.ensemble import RandomForestClassifier

from secateur.forests.checks import feature_costs
from secateur.forests.flat import flatten
from secateur.forests.programme import ErrorExamples, Programme, build_programme
from secateur.forests.rebuild import rebuild_forest


def tiny_case(seed: int, *, trees: int = 3, depth: int = 2, groups: list[str] | None = None):
    """A forest with three classes, validation data with noise, and uneven prices."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((60, 4)).astype(np.float32)
    y = (x[:, 0] + x[:, 1] * x[:, 2] > 0).astype(int) + (x[:, 3] > 0.5)
    noisy = np.where(rng.random(60) < 0.2, rng.integers(0, 3, 60), y)
    forest = RandomForestClassifier(trees, max_depth=depth, max_features=2, random_state=seed)
    forest.fit(x[:30], noisy[:30])
    prices = rng.choice([0.5, 1.0, 3.0], size=4)
    if groups:
        prices = np.array(
            [{g: i + 1.0 for i, g in enumerate(dict.fromkeys(groups))}[g] for g in groups]
        )
    costs = feature_costs(prices, groups, [f"x{i}" for i in range(4)])
    return forest, x[30:], noisy[30:], costs


def state(forest, x, y, costs, weight=None, **options) -> Programme:
    """The programme with the same examples for error and cost."""
    weight = np.ones(len(y)) if weight is None else weight
    target = np.searchsorted(forest.classes_, y)
    errors = ErrorExamples(x, target, weight, options.pop("loss", "error"))
    return build_programme(flatten(forest), errors, costs, x, weight, **options)


def independent_objective(forest, x, y, costs, lam: float, weight=None) -> float:
    """Mean tree error + lam * cost, by scikit-learn's own prediction and decision paths."""
    weight = np.ones(len(y)) if weight is None else weight
    wrong = np.zeros(len(y))
    needed = np.zeros((len(y), len(costs.price)), dtype=bool)
    for tree in forest.estimators_:
        wrong += forest.classes_[tree.predict(x).astype(int)] != y
        path = tree.decision_path(x).tocsr()
        for i in range(len(y)):
            features = tree.tree_.feature[path.indices[path.indptr[i] : path.indptr[i + 1]]]
            needed[i, costs.group[features[features >= 0]]] = True
    error = np.average(wrong / len(forest.estimators_), weights=weight)
    return float(error + lam * np.average(needed @ costs.price, weights=weight))


def closed_sets(parent: np.ndarray) -> Iterator[np.ndarray]:
    """All sets of nodes that hold every member's parent."""
    n = len(parent)
    every = (np.arange(2**n)[:, None] >> np.arange(n)) % 2 == 1
    orphan = every & (parent >= 0) & ~every[:, parent]
    yield from every[~orphan.any(1)]


def tree_closures(forest) -> list[list[np.ndarray]]:
    """Every pruning of every tree, as masks over its nodes."""
    out = []
    for estimator in forest.estimators_:
        tree = estimator.tree_
        inner = np.flatnonzero(tree.children_left >= 0)
        parent = np.full(tree.node_count, -1)
        for h in inner:
            parent[tree.children_left[h]] = parent[tree.children_right[h]] = h
        number = {h: i for i, h in enumerate(inner)}
        above = np.array([number.get(parent[h], -1) for h in inner], dtype=int)
        masks = []
        for kept in closed_sets(above):
            mask = np.zeros(tree.node_count, dtype=bool)
            mask[inner[kept]] = True
            masks.append(mask)
        out.append(masks)
    return out


def every_pruned_forest(forest) -> Iterator[tuple[np.ndarray, object]]:
    """Every combination of prunings, rebuilt."""
    flat = flatten(forest)
    for combination in itertools.product(*tree_closures(forest)):
        kept = np.concatenate(combination)
        yield kept, rebuild_forest(forest, flat, kept)


def cancer_case(trees: int = 12, **options):
    """A real forest over 30 features, with a validation half."""
    from sklearn.datasets import load_breast_cancer
    from sklearn.model_selection import train_test_split

    x, y = load_breast_cancer(return_X_y=True)
    x_tr, x_val, y_tr, y_val = train_test_split(
        x.astype(np.float32), y, test_size=0.5, random_state=0
    )
    forest = RandomForestClassifier(trees, random_state=0, **options).fit(x_tr, y_tr)
    costs = feature_costs(None, None, [f"x{i}" for i in range(30)])
    return forest, x_val, y_val, costs
