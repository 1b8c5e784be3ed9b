"""LightGBM with its per-row feature penalties (``cegb_penalty_feature_lazy``), as a baseline.

Peter, Diego, Hamprecht and Nadler, "Cost efficient gradient boosting" (NIPS 2017): the greedy
growth of GreedyMiser inside LightGBM; a row pays for a feature the first time a tree asks.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from sklearn.base import is_classifier

from secateur.errors import MissingExtra
from secateur.forests.checks import FeatureCosts
from secateur.forests.flat import LEAF, FlatForest, FlatTree
from secateur.forests.metrics import cost_of_trees

if TYPE_CHECKING:
    from secateur.forests.compare import Split

TRADEOFFS = (0.0, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


class LightGBMModel:
    """A fitted LightGBM estimator that prices itself as forests here do."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.forest = flatten_booster(model.booster_.dump_model())

    @property
    def n_nodes(self) -> int:
        """Nodes of all trees."""
        return self.forest.n_nodes

    def score(self, x: NDArray, y: NDArray) -> float:
        """Accuracy or R^2."""
        return float(self.model.score(x, y))

    def lazy_cost(self, x: NDArray[np.float32], costs: FeatureCosts) -> float:
        """The mean price of the groups an example needs."""
        return cost_of_trees(self.forest, costs, x)


def lightgbm_candidates(split: Split) -> list[tuple[float, Any]]:
    """Boosted models over trade-offs between loss and feature cost.

    Prices are divided by their mean and by the number of rows, so that a trade-off of 1 charges
    an average feature, asked for by every row, one unit of summed loss for each row.

    LightGBM knows no groups: each feature of one is charged the group's price while growing; the
    costs reported for the models do count a group once.

    Raises:
        MissingExtra: LightGBM is not installed.
    """
    if not find_spec("lightgbm"):
        raise MissingExtra("lightgbm", "forests-lightgbm", "the lightgbm-lazy baseline")
    import lightgbm

    kind = lightgbm.LGBMClassifier if is_classifier(split.forest) else lightgbm.LGBMRegressor
    prices = split.costs.price[split.costs.group]
    relative = prices / max(float(prices.mean()), 1e-12)
    out = []
    for tradeoff in TRADEOFFS:
        penalties: dict[str, Any] = {}
        if tradeoff > 0:
            penalties = {
                "cegb_tradeoff": tradeoff,
                "cegb_penalty_feature_lazy": (relative / 10).tolist(),
            }
        model = kind(
            n_estimators=len(split.forest.estimators_),
            learning_rate=0.1,
            random_state=split.seed,
            n_jobs=1,
            verbose=-1,
            **penalties,
        )
        out.append((tradeoff, LightGBMModel(model.fit(split.x_train, split.y_train))))
    return out


def flatten_booster(dump: dict[str, Any]) -> FlatForest:
    """The trees of ``Booster.dump_model()``; numerical splits only."""
    return FlatForest(tuple(_flat_tree(info["tree_structure"]) for info in dump["tree_info"]))


def _flat_tree(root: dict[str, Any]) -> FlatTree:
    left: list[int] = []
    right: list[int] = []
    rows: list[tuple[int, float, bool, float, float]] = []

    def visit(node: dict[str, Any]) -> int:
        number = len(rows)
        left.append(LEAF)
        right.append(LEAF)
        if "split_feature" not in node:
            rows.append((-2, 0.0, False, node["leaf_value"], node.get("leaf_weight", 0.0)))
            return number
        rows.append(
            (
                node["split_feature"],
                float(node["threshold"]),
                bool(node["default_left"]),
                node["internal_value"],
                node["internal_weight"],
            )
        )
        left[number] = visit(node["left_child"])
        right[number] = visit(node["right_child"])
        return number

    visit(root)
    feature, threshold, missing_left, value, weight = zip(*rows, strict=True)
    return FlatTree(
        left=np.array(left, dtype=np.int32),
        right=np.array(right, dtype=np.int32),
        feature=np.array(feature, dtype=np.int32),
        threshold=np.array(threshold, dtype=np.float64),
        missing_left=np.array(missing_left, dtype=np.bool_),
        value=np.array(value, dtype=np.float64)[:, None],
        weight=np.array(weight, dtype=np.float64),
        impurity=np.zeros(len(rows)),
    )
