"""Who plays which part: the forest's training set, its error examples, its cost examples."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import train_test_split

from secateur.forests.checks import ForestInputError
from secateur.forests.losses import encode_labels
from secateur.forests.programme import ErrorExamples

SOURCES = ("validation", "oob", "train", "both")


@dataclass(frozen=True)
class Examples:
    """A set of examples: any X scikit-learn takes, targets (n,), weights (n,)."""

    x: Any
    y: NDArray
    weight: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.y)

    def dense(self) -> NDArray[np.float32]:
        """What trees see: C-contiguous float32, whatever X was."""
        return np.ascontiguousarray(np.asarray(self.x, dtype=np.float32))


def hold_out(
    examples: Examples, fraction: float, classifier: bool, seed: Any
) -> tuple[Examples, Examples]:
    """Split off ``fraction`` of the examples for pruning, by class where classes allow it."""
    if not isinstance(fraction, Real) or not 0 < fraction < 1:
        raise ForestInputError(
            "must lie between 0 and 1", field="validation_fraction", value=fraction
        )
    if len(examples) < 2:
        raise ForestInputError(
            f"{len(examples)} sample cannot be split into a training and a validation part",
            field="X",
            value="n_samples=1",
            fix="give more samples, or X_val and y_val",
        )
    arrays = (np.arange(len(examples)),)
    split: dict[str, Any] = {"test_size": fraction, "random_state": seed}
    try:
        grow, prune = train_test_split(
            *arrays, stratify=examples.y if classifier else None, **split
        )
    except ValueError:  # a class too rare to be on both sides
        grow, prune = train_test_split(*arrays, **split)
    return _take(examples, grow), _take(examples, prune)


def _take(examples: Examples, rows: NDArray[np.intp]) -> Examples:
    x = examples.x.iloc[rows] if hasattr(examples.x, "iloc") else np.asarray(examples.x)[rows]
    return Examples(x, examples.y[rows], examples.weight[rows])


def error_examples(
    forest: Any, source: str, train: Examples | None, validation: Examples | None, loss: str
) -> ErrorExamples:
    """The examples whose losses decide, in the role ``error_source`` gives them.

    ``validation``: the validation examples, all of them in every tree. ``train``: each tree's own
    bag, with repetitions, as the published code does by default; ``oob``: the training examples
    outside a tree's bag; ``both``: the two together.
    """
    if source not in SOURCES:
        raise ForestInputError(
            "unknown", field="error_source", value=source, fix=f"one of {', '.join(SOURCES)}"
        )
    chosen = validation if source == "validation" else train
    if chosen is None or len(chosen) == 0:
        role = "validation" if source == "validation" else "the forest's training"
        raise ForestInputError(
            f"needs {role} examples", field="error_source", value=source, fix="give them to fit"
        )
    weight: NDArray[np.float64] | list[NDArray[np.float64]] = chosen.weight
    if source != "validation":
        weight = _bag_weights(forest, source, chosen)
    if hasattr(forest, "classes_"):
        target: NDArray = encode_labels(chosen.y, forest.classes_)
    else:
        target = np.asarray(chosen.y, dtype=np.float64)
    return ErrorExamples(chosen.dense(), target, weight, loss)


def _bag_weights(forest: Any, source: str, train: Examples) -> list[NDArray[np.float64]]:
    if len(train) != getattr(forest, "_n_samples", len(train)):
        raise ForestInputError(
            f"the forest was trained on {forest._n_samples} samples, these are {len(train)}",
            field="error_source",
            value=source,
            fix="pass the very training set, in its order, as X and y",
        )
    if not forest.bootstrap and source in ("oob", "both"):
        raise ForestInputError(
            "this forest was grown without bootstrap, so no example is out of bag",
            field="error_source",
            value=source,
            fix="error_source='validation' with X_val and y_val, or bootstrap=True",
        )
    weights = []
    for bag in forest.estimators_samples_:
        times = np.bincount(bag, minlength=len(train)).astype(np.float64)
        if source == "oob":
            times = (times == 0).astype(np.float64)
        elif source == "both":
            times = np.maximum(times, 1.0)
        weights.append(times * train.weight)
    return weights
