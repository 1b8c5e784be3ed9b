"""All methods on the same forests and splits: what accuracy each buys at each cost.

A method offers a curve of prunings. At each budget the point with the best validation score
among those whose validation cost is within the budget is taken, as a user would, and its score
and cost on the test examples, which no one has looked at, are reported.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import clone, is_classifier
from sklearn.model_selection import train_test_split

from secateur.errors import MissingExtra
from secateur.forests.baselines import (
    CandidatePruner,
    CostComplexityPruner,
    DepthLimitPruner,
    GreedyPruner,
)
from secateur.forests.budgetrf import BudgetRF
from secateur.forests.checks import FeatureCosts, UnsupportedForestError, feature_costs
from secateur.forests.flat import flatten
from secateur.forests.lightgbm_lazy import lightgbm_candidates
from secateur.forests.metrics import expected_feature_cost
from secateur.forests.pruner import BudgetPruner
from secateur.progress import SILENT, Progress
from secateur.registry import Registry

PATH_POINTS = 30


@dataclass(frozen=True)
class Split:
    """One seed's data, forest and prices; ``x_*`` are float32."""

    forest: Any
    x_train: NDArray[np.float32]
    y_train: NDArray
    x_val: NDArray[np.float32]
    y_val: NDArray
    x_test: NDArray[np.float32]
    y_test: NDArray
    costs: FeatureCosts
    seed: int

    @property
    def priced(self) -> dict[str, Any]:
        """The prices as the estimators here take them."""
        group = self.costs.group
        return {"feature_costs": self.costs.price[group], "feature_groups": group}


@dataclass(frozen=True)
class CurvePoint:
    """A pruning's figures on the validation and the test examples."""

    knob: float
    val_score: float
    val_cost: float
    test_score: float
    test_cost: float
    nodes: int


@dataclass
class Comparison:
    """Curves of every method and seed, and the test scores within budgets.

    Attributes:
        budgets: fractions of the unpruned forest's cost.
        curves: method -> one curve per seed.
        scores, costs: method -> (n_seeds, n_budgets) on test examples; NaN: nothing that cheap.
        unpruned: per seed, (test score, test cost, nodes) of the forest before.
    """

    budgets: list[float]
    curves: dict[str, list[list[CurvePoint]]] = field(default_factory=dict)
    scores: dict[str, list[list[float]]] = field(default_factory=dict)
    costs: dict[str, list[list[float]]] = field(default_factory=dict)
    unpruned: list[tuple[float, float, int]] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)

    def table(self) -> list[dict[str, Any]]:
        """One row per method: mean and standard deviation over seeds at each budget."""
        rows = []
        for method, per_seed in self.scores.items():
            score = np.array(per_seed, dtype=np.float64)
            mean, deviation = score.mean(0), score.std(0)
            rows.append({"method": method, "mean": mean.tolist(), "deviation": deviation.tolist()})
        return rows

    def record(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return asdict(self)


Candidates = Callable[[Split], list[tuple[float, Any]]]


def _budget_prune(source: str, loss: str, *, filled: bool = False) -> Candidates:
    def candidates(split: Split) -> list[tuple[float, Any]]:
        pruner = BudgetPruner(
            split.forest,
            **split.priced,
            lam=0.0,
            error_source=source,
            node_loss=loss if is_classifier(split.forest) else "auto",
            prefit=True,
        )
        pruner.fit(split.x_train, split.y_train, X_val=split.x_val, y_val=split.y_val)
        path = pruner.prune_path(points=PATH_POINTS)
        lams = [point.lam for point in path.points]
        found = [(lam, pruner.forest_at(path, i)) for i, lam in enumerate(lams)]
        if filled:
            found += [(float("nan"), forest) for forest in pruner.filled_path(path)]
        return found

    return candidates


def _baseline(kind: type[CandidatePruner]) -> Candidates:
    def candidates(split: Split) -> list[tuple[float, Any]]:
        pruner = kind(split.forest, **split.priced, prefit=True, random_state=split.seed)
        pruner.fit(split.x_train, split.y_train, X_val=split.x_val, y_val=split.y_val)
        return [(c.knob, c.forest) for c in pruner.candidates_]

    return candidates


METHODS: Registry[Candidates] = Registry(
    "forest method",
    {
        "budgetprune": _budget_prune("validation", "auto"),
        "budgetprune-filled": _budget_prune("validation", "auto", filled=True),
        "budgetprune-gini": _budget_prune("validation", "gini"),
        "budgetprune-train": _budget_prune("train", "auto"),
        "greedy": _baseline(GreedyPruner),
        "ccp": _baseline(CostComplexityPruner),
        "depth": _baseline(DepthLimitPruner),
        "budgetrf": _baseline(BudgetRF),
        "lightgbm-lazy": lightgbm_candidates,
    },
)


def compare(
    X: NDArray,
    y: NDArray,
    estimator: Any,
    prices: Callable[[int], ArrayLike],
    *,
    groups: Sequence[Any] | None = None,
    methods: Sequence[str],
    seeds: Sequence[int] = (0, 1, 2),
    budgets: Sequence[float] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
    progress: Progress = SILENT,
) -> Comparison:
    """Run every method on every seed's split (half train, a quarter each validation and test).

    Args:
        prices: seed -> (n_features,) feature costs.
        groups: a label per feature; a group is bought whole and paid once.
        methods: names from ``METHODS``; one whose package is missing is left out and noted.
    """
    chosen = {name: METHODS[name] for name in methods}
    result = Comparison(budgets=[float(b) for b in budgets])
    with progress.stage("compare", total=len(seeds) * len(methods), unit="runs") as advance:
        for seed in seeds:
            names = [f"x{i}" for i in range(np.shape(X)[1])]
            split = make_split(X, y, estimator, feature_costs(prices(seed), groups, names), seed)
            full = _figures(split.forest, split, np.inf)
            result.unpruned.append((full.test_score, full.test_cost, full.nodes))
            for name, method in chosen.items():
                advance(1)
                if name in result.left_out:
                    continue
                try:
                    curve = [_figures(f, split, knob) for knob, f in method(split)]
                except (MissingExtra, UnsupportedForestError) as reason:
                    result.left_out[name] = str(reason).splitlines()[0]
                    continue
                _enter(result, name, curve, full)
    return result


def make_split(X: NDArray, y: NDArray, estimator: Any, costs: FeatureCosts, seed: int) -> Split:
    """Split the data and grow this seed's forest on the training half."""
    x = np.ascontiguousarray(X, dtype=np.float32)
    classify = is_classifier(estimator)
    x_train, x_rest, y_train, y_rest = train_test_split(
        x, y, test_size=0.5, random_state=seed, stratify=y if classify else None
    )
    x_val, x_test, y_val, y_test = train_test_split(
        x_rest, y_rest, test_size=0.5, random_state=seed, stratify=y_rest if classify else None
    )
    forest = clone(estimator).set_params(random_state=seed).fit(x_train, y_train)
    return Split(forest, x_train, y_train, x_val, y_val, x_test, y_test, costs, seed)


def _figures(forest: Any, split: Split, knob: float) -> CurvePoint:
    costs = split.costs
    if hasattr(forest, "lazy_cost"):  # a model that is no scikit-learn forest prices itself
        val_cost, test_cost = (
            forest.lazy_cost(split.x_val, costs),
            forest.lazy_cost(split.x_test, costs),
        )
        nodes = forest.n_nodes
    else:
        val_cost = expected_feature_cost(forest, costs, split.x_val)
        test_cost = expected_feature_cost(forest, costs, split.x_test)
        nodes = flatten(forest).n_nodes
    return CurvePoint(
        float(knob),
        float(forest.score(split.x_val, split.y_val)),
        val_cost,
        float(forest.score(split.x_test, split.y_test)),
        test_cost,
        nodes,
    )


def _enter(result: Comparison, name: str, curve: list[CurvePoint], full: CurvePoint) -> None:
    scores, costs = [], []
    for fraction in result.budgets:
        within = [p for p in curve if p.val_cost <= fraction * full.val_cost * (1 + 1e-9)]
        best = max(within, key=lambda p: (p.val_score, -p.val_cost), default=None)
        scores.append(best.test_score if best else float("nan"))
        costs.append(best.test_cost if best else float("nan"))
    result.curves.setdefault(name, []).append(curve)
    result.scores.setdefault(name, []).append(scores)
    result.costs.setdefault(name, []).append(costs)
