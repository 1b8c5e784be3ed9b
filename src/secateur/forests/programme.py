"""From a forest and two sets of examples to the closure problem, and back.

Two kinds of evidence enter and may come from different examples: how wrong each node would be
as a leaf (error examples), and which features each example meets where (cost examples).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from secateur.forests.checks import FeatureCosts, ForestInputError
from secateur.forests.closure import ClosureProblem
from secateur.forests.flat import FlatForest, FlatTree
from secateur.forests.losses import node_losses
from secateur.forests.reduction import reduce_problem
from secateur.forests.routing import check_key_space, first_uses, over_trees


@dataclass(frozen=True)
class ErrorExamples:
    """Examples that say how wrong a node is.

    Attributes:
        x: (n, d) float32.
        target: (n,) class indices or real values.
        weight: (n,) weights, or one such array for every tree (bootstrap bags).
        loss: a name from ``losses``.
    """

    x: NDArray[np.float32]
    target: NDArray
    weight: NDArray[np.float64] | list[NDArray[np.float64]]
    loss: str


@dataclass(frozen=True)
class Programme:
    """A forest's pruning problem in user units.

    objective = error + lam * cost, with ``error`` the mean over trees of the mean loss over
    error examples, and ``cost`` the mean over cost examples of the prices of the groups they
    need (or, for ``cost_scope="model"``, the price of all groups the forest still uses).

    Attributes:
        full: the problem over all internal nodes.
        reduced, nodes: what the solvers see, and its nodes' numbers in ``full``.
        internal: (n_internal,) numbers of the internal nodes among all nodes.
        base_error: the error with every tree cut to its root.
        unit: what one raw loss unit is worth in ``error``.
    """

    full: ClosureProblem
    reduced: ClosureProblem
    nodes: NDArray[np.intp]
    internal: NDArray[np.intp]
    n_nodes: int
    base_error: float
    unit: float

    def price(self, lam: float) -> float:
        """``lam`` in raw loss units."""
        return lam / self.unit

    def error(self, gain: Any) -> Any:
        """The error of prunings with this raw gain."""
        return self.base_error - self.unit * gain

    def measure(self, kept: NDArray[np.bool_]) -> tuple[float, float]:
        """Error and cost of a pruning given over all internal nodes."""
        gain, cost = self.full.measure(kept)
        return float(self.error(gain)), cost

    def lift(self, kept: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """From nodes of ``reduced`` to all internal nodes."""
        out = np.zeros(self.full.n_nodes, dtype=np.bool_)
        out[self.nodes[kept]] = True
        return out

    def over_all_nodes(self, kept: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """From internal nodes to all nodes, leaves included."""
        out = np.zeros(self.n_nodes, dtype=np.bool_)
        out[self.internal[kept]] = True
        return out


def build_programme(
    forest: FlatForest,
    errors: ErrorExamples,
    costs: FeatureCosts,
    cost_x: NDArray[np.float32],
    cost_weight: NDArray[np.float64] | None = None,
    *,
    cost_scope: str = "example",
    n_jobs: int | None = None,
) -> Programme:
    """Route both sets of examples through every tree and set up the closure problem.

    Raises:
        ForestInputError: no examples, no weight, or more (group, example) pairs than 2^31.
    """
    if len(cost_x) == 0 or len(errors.x) == 0:
        raise ForestInputError("pruning needs examples", field="X_val", value="0 examples")
    losses = over_trees(
        node_losses, forest, errors.x, errors.target, errors.weight, errors.loss, n_jobs=n_jobs
    )
    scaled, base, unit = _common_unit(losses, errors, len(forest.trees))
    problem, internal = closure_problem(
        forest, scaled, costs, cost_x, cost_weight, cost_scope=cost_scope, n_jobs=n_jobs
    )
    reduced, nodes = reduce_problem(problem)
    return Programme(problem, reduced, nodes, internal, forest.n_nodes, base, unit)


def closure_problem(
    forest: FlatForest,
    losses: list[NDArray[np.float64]],
    costs: FeatureCosts,
    cost_x: NDArray[np.float32],
    cost_weight: NDArray[np.float64] | None = None,
    *,
    cost_scope: str = "example",
    n_jobs: int | None = None,
) -> tuple[ClosureProblem, NDArray[np.intp]]:
    """The closure problem for given node losses, one array (n_nodes,) a tree.

    Returns:
        The problem over internal nodes, and their numbers among all nodes.
    """
    parent, tree, gain, internal = _internal_nodes(forest, losses)
    group = costs.priced_group
    if cost_scope == "model":
        parts = over_trees(_first_in_tree, forest, group, n_jobs=n_jobs)
        charge = costs.price.copy()
    else:
        n_groups = len(costs.price)
        check_key_space(n_groups, len(cost_x))
        parts = over_trees(first_uses, forest, cost_x, group, n_groups, n_jobs=n_jobs)
        weight = np.ones(len(cost_x)) if cost_weight is None else cost_weight
        if not weight.sum() > 0:
            raise ForestInputError("weights must not all be zero", field="sample_weight")
        charge = np.outer(costs.price, weight / weight.sum()).ravel()
    return _gather(forest, parent, tree, gain, parts, charge), internal


def _common_unit(
    losses: list[NDArray[np.float64]], errors: ErrorExamples, n_trees: int
) -> tuple[list[NDArray[np.float64]], float, float]:
    """Losses of all trees on one scale; whole counts stay whole when trees see equal weight."""
    if isinstance(errors.weight, list):
        weight = np.array([w.sum() for w in errors.weight])
    else:
        weight = np.full(n_trees, errors.weight.sum())
    reference = weight.max()
    if not reference > 0:
        raise ForestInputError("weights must not all be zero", field="sample_weight")
    # A tree without error examples has nothing to say; its gains stay zero.
    factor = np.divide(reference, weight, out=np.ones(n_trees), where=weight > 0)
    scaled = [loss * f for loss, f in zip(losses, factor, strict=True)]
    unit = 1.0 / (reference * n_trees)
    return scaled, unit * float(sum(loss[0] for loss in scaled)), unit


def _internal_nodes(
    forest: FlatForest, losses: list[NDArray[np.float64]]
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float64], NDArray[np.intp]]:
    """Parents, trees, gains and numbers of the internal nodes of all trees."""
    parents, trees, gains, internals, before = [], [], [], [], 0
    for t, (tree, loss) in enumerate(zip(forest.trees, losses, strict=True)):
        inside = np.flatnonzero(tree.inner)
        number = np.full(len(tree) + 1, -1, dtype=np.int64)
        number[inside] = np.arange(len(inside)) + before
        above = tree.parent[inside]
        parents.append(np.where(above >= 0, number[above], -1))
        gain = loss[inside] - loss[tree.left[inside]] - loss[tree.right[inside]]
        # Rounding noise, relative to the losses themselves: the targets' scale does not matter.
        gain[np.abs(gain) <= 1e-12 * np.abs(loss).max(initial=0.0)] = 0.0
        gains.append(gain)
        trees.append(np.full(len(inside), t))
        internals.append(inside + forest.offset[t])
        before += len(inside)
    return (
        np.concatenate(parents).astype(np.int32),
        np.concatenate(trees).astype(np.int32),
        np.concatenate(gains),
        np.concatenate(internals),
    )


def _gather(
    forest: FlatForest,
    parent: NDArray[np.int32],
    tree: NDArray[np.int32],
    gain: NDArray[np.float64],
    parts: list[tuple[NDArray[np.int64], NDArray[np.int32]]],
    charge: NDArray[np.float64],
) -> ClosureProblem:
    """First-use lists of all trees in one, without keys that cost nothing."""
    counts = [np.diff(ptr)[tree.inner] for tree, (ptr, _) in zip(forest.trees, parts, strict=True)]
    ptr = np.concatenate([[0], np.cumsum(np.concatenate(counts))]).astype(np.int64)
    key = np.concatenate([part for _, part in parts])
    problem = ClosureProblem(parent, tree, gain, np.zeros(len(gain)), ptr, key, charge)
    every = np.ones(problem.n_nodes, dtype=np.bool_)
    if (charge[key] > 0).all():
        return problem.restrict(every)[0]
    return problem.without_keys(charge <= 0).restrict(every)[0]


def _first_in_tree(
    tree: FlatTree, t: int, group: NDArray[np.int32]
) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """First-use lists for ``cost_scope="model"``: a node pays unless an ancestor asks already."""
    asks = _asks_first(tree.parent, tree.left, np.where(tree.inner, tree.feature, 0), group)
    ptr = np.concatenate([[0], np.cumsum(asks >= 0)]).astype(np.int64)
    return ptr, asks[asks >= 0].astype(np.int32)


@njit(nogil=True, cache=True)
def _asks_first(parent: Any, left: Any, feature: Any, group: Any) -> Any:
    asks = np.full(len(parent), -1, np.int32)
    for h in range(len(parent)):
        if left[h] < 0:
            continue
        k = group[feature[h]]
        up = parent[h]
        while up >= 0 and group[feature[up]] != k:
            up = parent[up]
        if up < 0:
            asks[h] = k
    return asks
