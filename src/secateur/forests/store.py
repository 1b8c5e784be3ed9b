"""Forests on disk without pickle: one ``.npz`` of plain arrays that any numpy reads."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.tree import (
    DecisionTreeClassifier,
    DecisionTreeRegressor,
    ExtraTreeClassifier,
    ExtraTreeRegressor,
)
from sklearn.tree._tree import Tree

from secateur.files import replacing
from secateur.forests.checks import FORESTS, ForestInputError, check_forest

FORMAT = "secateur-forest-1"
_TREES = {
    "RandomForestClassifier": DecisionTreeClassifier,
    "ExtraTreesClassifier": ExtraTreeClassifier,
    "RandomForestRegressor": DecisionTreeRegressor,
    "ExtraTreesRegressor": ExtraTreeRegressor,
}


def save_forest(forest: Any, path: Path | str) -> None:
    """Write a fitted forest, all or nothing.

    Node arrays of all trees are laid end to end under scikit-learn's own column names.
    """
    check_forest(forest)
    states = [estimator.tree_.__getstate__() for estimator in forest.estimators_]
    nodes = np.concatenate([state["nodes"] for state in states])
    arrays: dict[str, Any] = {name: nodes[name] for name in nodes.dtype.names or ()}
    arrays["values"] = np.concatenate([state["values"] for state in states])
    arrays["node_count"] = np.array([state["node_count"] for state in states])
    arrays["max_depth"] = np.array([state["max_depth"] for state in states])
    if hasattr(forest, "classes_"):
        arrays["classes"] = _plain(forest.classes_)
    if hasattr(forest, "feature_names_in_"):
        arrays["feature_names"] = _plain(forest.feature_names_in_)
    parameters = {
        key: value
        for key, value in forest.get_params(deep=False).items()
        if isinstance(value, str | int | float | bool | None)
    }
    header = {
        "format": FORMAT,
        "kind": type(forest).__name__,
        "n_features": int(forest.n_features_in_),
        "parameters": parameters,
    }
    with replacing(Path(path)) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, header=np.array(json.dumps(header)), **arrays)


def load_forest(path: Path | str) -> Any:
    """Read a forest written by ``save_forest``: an ordinary scikit-learn estimator.

    Raises:
        ForestInputError: not such a file.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        header = json.loads(str(arrays["header"]))
        if header["format"] != FORMAT:
            raise ValueError(header["format"])
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ForestInputError(
            f"not a forest written by save_forest: {error}", field="path", value=str(path)
        ) from error
    kinds = {kind.__name__: kind for kind in FORESTS}
    forest = kinds[header["kind"]](**header["parameters"])
    forest.n_features_in_ = header["n_features"]
    forest.n_outputs_ = 1
    if "classes" in arrays:
        forest.classes_ = arrays["classes"]
        forest.n_classes_ = len(forest.classes_)
    if "feature_names" in arrays:
        forest.feature_names_in_ = arrays["feature_names"].astype(object)
    ends = np.cumsum(arrays["node_count"])
    forest.estimators_ = [
        _estimator(forest, arrays, slice(end - count, end), int(depth))
        for end, count, depth in zip(ends, arrays["node_count"], arrays["max_depth"], strict=True)
    ]
    forest.estimator_ = _TREES[header["kind"]]()
    return forest


def _estimator(forest: Any, arrays: dict[str, Any], rows: slice, depth: int) -> Any:
    n_classes = getattr(forest, "n_classes_", 1)
    tree = Tree(forest.n_features_in_, np.array([n_classes], dtype=np.intp), 1)
    layout = tree.__getstate__()["nodes"].dtype
    nodes = np.zeros(rows.stop - rows.start, dtype=layout)
    for name in layout.names or ():
        nodes[name] = arrays[name][rows]
    values = np.ascontiguousarray(arrays["values"][rows])
    tree.__setstate__(
        {"max_depth": depth, "node_count": len(nodes), "nodes": nodes, "values": values}
    )
    estimator = _TREES[type(forest).__name__]()
    estimator.tree_ = tree
    estimator.n_features_in_, estimator.n_outputs_ = forest.n_features_in_, 1
    if hasattr(forest, "classes_"):
        # Trees inside a forest know classes by number only, as scikit-learn fits them.
        estimator.classes_ = np.arange(n_classes, dtype=np.float64)
        estimator.n_classes_ = n_classes
    return estimator


def _plain(array: Any) -> Any:
    return array.astype(str) if array.dtype == object else array
