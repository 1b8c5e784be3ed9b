"""What BudgetPrune is measured against, in the same clothes.

Every baseline turns a fitted forest into a sequence of candidates, from large to small, and
takes the candidate that is best on the validation examples among those within the budget. They
share the estimator base, so ``feature_usage``, ``expected_cost`` and ``predict_lazy`` work alike.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from sklearn.base import is_classifier

from secateur.forests.checks import ForestInputError, check_number
from secateur.forests.closure import best_closure
from secateur.forests.data_roles import Examples, error_examples
from secateur.forests.estimator import BudgetedForest
from secateur.forests.flat import FlatForest, FlatTree, flatten
from secateur.forests.greedy import greedy_chain, group_of_splits
from secateur.forests.losses import resolve_loss
from secateur.forests.metrics import expected_feature_cost
from secateur.forests.programme import build_programme
from secateur.forests.rebuild import rebuild_forest
from secateur.progress import Progress


@dataclass(frozen=True)
class Candidate:
    """A pruning a baseline offers.

    Attributes:
        knob: what it was made with: an alpha, a depth, the number of groups removed.
        score: accuracy or R^2 on the validation examples.
        cost: expected cost on the validation examples.
    """

    knob: float
    score: float
    cost: float
    forest: Any


class CandidatePruner(BudgetedForest):
    """A baseline: ``fit`` grows (or takes) a forest, offers candidates and picks one.

    Args:
        estimator: as in ``BudgetPruner``.
        feature_costs, feature_groups: as in ``BudgetPruner``.
        budget: the most an average validation example may pay; None takes the best score.
        prefit, validation_fraction, n_jobs, random_state: as in ``BudgetPruner``.

    Attributes:
        candidates_: all candidates, costliest first.
        estimator_: the forest chosen.
    """

    def __init__(
        self,
        estimator: Any,
        *,
        feature_costs: Any = None,
        feature_groups: Any = None,
        budget: float | None = None,
        prefit: bool = False,
        validation_fraction: float = 0.3,
        n_jobs: int | None = None,
        random_state: Any = None,
    ) -> None:
        self.estimator = estimator
        self.feature_costs = feature_costs
        self.feature_groups = feature_groups
        self.budget = budget
        self.prefit = prefit
        self.validation_fraction = validation_fraction
        self.n_jobs = n_jobs
        self.random_state = random_state

    def _check_parameters(self) -> None:
        if self.budget is not None:
            check_number("budget", self.budget)

    def _prune(
        self, forest: Any, train: Examples | None, validation: Examples | None, progress: Progress
    ) -> None:
        assert validation is not None
        found = [
            Candidate(
                knob,
                _score(candidate, validation),
                expected_feature_cost(
                    candidate, self.costs_, validation.dense(), validation.weight
                ),
                candidate,
            )
            for knob, candidate in self._candidates(forest, train, validation, progress)
        ]
        self.candidates_ = sorted(found, key=lambda c: (-c.cost, c.knob))
        self.select(np.inf if self.budget is None else self.budget)

    def select(self, budget: float) -> Self:
        """Take the candidate with the best validation score among those within ``budget``."""
        within = [c for c in self.candidates_ if c.cost <= budget * (1 + 1e-12)]
        if not within:
            cheapest = min(c.cost for c in self.candidates_)
            raise ForestInputError(
                f"no candidate is that cheap; the cheapest costs {cheapest:g}",
                field="budget",
                value=budget,
            )
        self.chosen_ = max(within, key=lambda c: (c.score, -c.cost))
        self.estimator_ = self.chosen_.forest
        self.cost_ = self.chosen_.cost
        return self

    @abstractmethod
    def _candidates(
        self, forest: Any, train: Examples | None, validation: Examples, progress: Progress
    ) -> Iterator[tuple[float, Any]]:
        """Knobs and forests."""


class Unpruned(CandidatePruner):
    """The forest as it was grown."""

    def _candidates(
        self, forest: Any, train: Examples | None, validation: Examples, progress: Progress
    ) -> Iterator[tuple[float, Any]]:
        yield 0.0, forest


class DepthLimitPruner(CandidatePruner):
    """All trees cut at one depth; candidates are all depths."""

    def _candidates(
        self, forest: Any, train: Examples | None, validation: Examples, progress: Progress
    ) -> Iterator[tuple[float, Any]]:
        flat = flatten(forest)
        depth = np.concatenate([tree.depth for tree in flat.trees])
        for limit in range(int(depth.max()) + 1):
            yield float(limit), rebuild_forest(forest, flat, depth < limit)


class CostComplexityPruner(CandidatePruner):
    """Minimal cost-complexity pruning at one alpha for all trees, as ``ccp_alpha`` does it.

    Breiman et al. (1984): a branch goes unless it lowers the training impurity by more than
    alpha for each leaf it adds. Candidates are a geometric grid of alphas.
    """

    n_alphas = 40

    def _candidates(
        self, forest: Any, train: Examples | None, validation: Examples, progress: Progress
    ) -> Iterator[tuple[float, Any]]:
        flat = flatten(forest)
        highest = max(float(impurity_decrease(tree).max(initial=0)) for tree in flat.trees)
        yield 0.0, forest
        for alpha in np.geomspace(1.01 * highest, 1e-4 * highest, self.n_alphas):
            if alpha > 0:
                yield float(alpha), rebuild_forest(forest, flat, cost_complexity(flat, alpha))


def impurity_decrease(tree: FlatTree) -> NDArray[np.float64]:
    """(n_nodes,) the training impurity a split removes, as a share of the tree's weight."""
    risk = tree.impurity * tree.weight / tree.weight[0]
    decrease = np.zeros(len(tree))
    inside = np.flatnonzero(tree.inner)
    decrease[inside] = risk[inside] - risk[tree.left[inside]] - risk[tree.right[inside]]
    return decrease


def cost_complexity(flat: FlatForest, alpha: float) -> NDArray[np.bool_]:
    """(n_nodes,) the splits that stay at ``alpha``: again a best closure, each split paying alpha."""
    kept = []
    for tree in flat.trees:
        net = np.where(tree.inner, impurity_decrease(tree) - alpha, -np.inf)
        kept.append(best_closure(tree.parent, net)[0])
    return np.concatenate(kept)


class GreedyPruner(CandidatePruner):
    """GreedyPrune: again and again, every split on one feature group goes, with all below it.

    The group removed is the one that raises the mean tree error on the validation examples
    least for each unit of cost saved. The paper names this baseline without spelling it out.
    """

    def _candidates(
        self, forest: Any, train: Examples | None, validation: Examples, progress: Progress
    ) -> Iterator[tuple[float, Any]]:
        flat = flatten(forest)
        loss = resolve_loss("auto", is_classifier(forest))
        errors = error_examples(forest, "validation", train, validation, loss)
        programme = build_programme(
            flat, errors, self.costs_, validation.dense(), validation.weight, n_jobs=self.n_jobs
        )
        group = group_of_splits(flat, self.costs_)
        every = np.ones(programme.full.n_nodes, dtype=np.bool_)
        yield 0.0, forest
        with progress.stage("greedy", total=len(np.unique(group)), unit="groups") as advance:
            for removed, kept in enumerate(greedy_chain(programme.full, group, every), 1):
                advance(1)
                everywhere = programme.over_all_nodes(kept)
                yield float(removed), rebuild_forest(forest, flat, everywhere)


def _score(forest: Any, examples: Examples) -> float:
    return float(forest.score(examples.x, examples.y, sample_weight=examples.weight))
