"""GreedyPrune: take one feature group after another out of the whole forest.

Used as the baseline the paper names, and to reach budgets between two optimal prunings, where
no lambda leads.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from secateur.forests.checks import FeatureCosts
from secateur.forests.closure import ClosureProblem
from secateur.forests.flat import FlatForest


def group_of_splits(flat: FlatForest, costs: FeatureCosts) -> NDArray[np.int32]:
    """(n_internal,) int32: the group each split of the forest asks for."""
    return costs.group[np.concatenate([tree.feature[tree.inner] for tree in flat.trees])]


def greedy_chain(
    problem: ClosureProblem, group: NDArray[np.int32], kept: NDArray[np.bool_]
) -> Iterator[NDArray[np.bool_]]:
    """Ever smaller prunings: each drops every split on one group, and all that hangs below.

    The group that goes is the one that loses least gain for each unit of cost saved.

    Args:
        group: (n,) the group of each of the problem's nodes.
        kept: (n,) the closed set to start from; not itself yielded.
    """
    while kept.any():
        gain, cost = problem.measure(kept)
        best, best_ratio = kept, np.inf
        for k in np.unique(group[kept]):
            without = _without_group(problem.parent, group, kept, k)
            less_gain, less_cost = problem.measure(without)
            # Groups that save nothing come last, unless removing them helps.
            ratio = (gain - less_gain) / max(cost - less_cost, 1e-12)
            if ratio < best_ratio:
                best, best_ratio = without, ratio
        kept = best
        yield kept


@njit(nogil=True, cache=True)
def _without_group(parent: Any, group: Any, kept: Any, k: int) -> Any:
    out = np.zeros_like(kept)
    for h in range(len(kept)):
        out[h] = kept[h] and group[h] != k and (parent[h] < 0 or out[parent[h]])
    return out
