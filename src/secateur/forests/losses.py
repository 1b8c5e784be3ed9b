"""How wrong a forest is at a node: any loss that adds up over the examples reaching it.

BudgetPrune needs, for every node, the loss its error examples would suffer if the tree ended
there. Routing examples to leaves once and adding up towards the root gives all nodes at once.
"""

from __future__ import annotations

import warnings
from typing import Any, Literal

import numpy as np
from numba import njit
from numpy.typing import NDArray

from secateur.forests.checks import ForestInputError
from secateur.forests.flat import FlatTree
from secateur.forests.routing import leaves

NodeLoss = Literal["error", "gini", "brier", "log", "squared"]
CLASSIFICATION: tuple[str, ...] = ("error", "gini", "brier", "log")
REGRESSION: tuple[str, ...] = ("squared",)


def resolve_loss(node_loss: str, classifier: bool) -> str:
    """``auto`` resolved, and a loss of the wrong task refused."""
    allowed = CLASSIFICATION if classifier else REGRESSION
    if node_loss == "auto":
        return allowed[0]
    if node_loss not in allowed:
        raise ForestInputError(
            f"not a loss for {'classification' if classifier else 'regression'}",
            field="node_loss",
            value=node_loss,
            fix=f"one of {', '.join(('auto', *allowed))}",
        )
    return node_loss


def encode_labels(y: NDArray, classes: NDArray) -> NDArray[np.int64]:
    """(n,) the index of each label in ``classes``; unknown ones get ``len(classes)``.

    A label the forest never saw counts as always wrong, with a warning.
    """
    y = np.asarray(y)
    index = np.searchsorted(classes, y)
    index = np.minimum(index, len(classes) - 1)
    unknown = classes[index] != y
    if unknown.any():
        warnings.warn(
            f"{int(unknown.sum())} examples carry labels the forest was not trained on "
            f"(first: {y[unknown][0]!r}); they count as always wrong",
            UserWarning,
            stacklevel=3,
        )
    return np.where(unknown, len(classes), index)


def node_losses(
    tree: FlatTree,
    t: int,
    x: NDArray[np.float32],
    target: NDArray,
    weight: NDArray[np.float64] | list[NDArray[np.float64]],
    loss: str,
) -> NDArray[np.float64]:
    """The weighted loss of the examples that reach each node, were it a leaf.

    Args:
        target: (n,) class indices (``len(classes)``: unknown), or real values.
        weight: (n,) the examples' weights, or a list with such an array for every tree (bags).

    Returns:
        (n_nodes,) sums of weight * loss; divide by the tree's total weight for a mean.
    """
    w = weight[t] if isinstance(weight, list) else weight
    leaf = leaves(tree, x)
    if loss == "squared":
        return _squared(tree, leaf, target, w)
    return _classification(tree, leaf, target, w, loss)


@njit(nogil=True, cache=True)
def _towards_root(left: Any, right: Any, sums: Any) -> None:
    """Add children's rows of ``sums`` (n_nodes, columns) to their parents', bottom up."""
    for h in range(len(left) - 1, -1, -1):
        if left[h] >= 0:
            for c in range(sums.shape[1]):
                sums[h, c] += sums[left[h], c] + sums[right[h], c]


def _classification(
    tree: FlatTree,
    leaf: NDArray[np.int32],
    target: NDArray[np.int64],
    w: NDArray[np.float64],
    loss: str,
) -> NDArray[np.float64]:
    n_classes = tree.value.shape[1]
    # One more column collects labels the forest does not know.
    columns = n_classes + 1
    flat = np.bincount(leaf * columns + target, weights=w, minlength=len(tree) * columns)
    counts = flat.reshape(len(tree), columns)
    _towards_root(tree.left, tree.right, counts)
    total = counts.sum(1)
    if loss == "error":
        return total - counts[np.arange(len(tree)), tree.value.argmax(1)]
    if loss == "gini":
        squares = np.square(counts).sum(1)
        return total - np.divide(squares, total, out=np.zeros_like(total), where=total > 0)
    mass = tree.value.sum(1, keepdims=True)
    p = tree.value / np.where(mass > 0, mass, 1)
    known, unknown = counts[:, :n_classes], counts[:, n_classes]
    if loss == "brier":
        norm = np.square(p).sum(1)
        return total * (1 + norm) - 2 * (known * p).sum(1)
    # Laplace's rule keeps pure leaves finite; the training weight says how sure a leaf may be.
    seen = tree.weight[:, None]
    smooth = (p * seen + 1) / (seen + n_classes)
    return -(known * np.log(smooth)).sum(1) + unknown * np.log(seen[:, 0] + n_classes)


def _squared(
    tree: FlatTree, leaf: NDArray[np.int32], y: NDArray[np.float64], w: NDArray[np.float64]
) -> NDArray[np.float64]:
    n = len(tree)
    # Centred on the root's own value, or the three sums would cancel for targets far from 0.
    centre = tree.value[0, 0]
    z = y - centre
    moments = np.stack([np.bincount(leaf, weights=w * z**k, minlength=n) for k in (0, 1, 2)], 1)
    _towards_root(tree.left, tree.right, moments)
    v = tree.value[:, 0] - centre
    return moments[:, 2] - 2 * v * moments[:, 1] + v * v * moments[:, 0]
