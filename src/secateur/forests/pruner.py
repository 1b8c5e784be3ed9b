"""BudgetPrune as a scikit-learn estimator."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import is_classifier
from sklearn.utils.validation import check_is_fitted

from secateur.forests.checks import ForestInputError, check_lam_or_budget, check_number
from secateur.forests.data_roles import Examples, error_examples
from secateur.forests.estimator import BudgetedForest
from secateur.forests.flat import flatten
from secateur.forests.greedy import greedy_chain, group_of_splits
from secateur.forests.losses import resolve_loss
from secateur.forests.path import PricePath, bracket, full_path, grid_path
from secateur.forests.programme import Programme, build_programme
from secateur.forests.rebuild import rebuild_forest
from secateur.forests.solvers import resolve_solver, solve
from secateur.forests.solvers.interface import PrimalDualOptions
from secateur.progress import SILENT, Progress


@dataclass(frozen=True)
class PathPoint:
    """One optimal pruning.

    Attributes:
        lam: the largest lambda below which it is optimal (``inf`` for the cheapest).
        error, cost: on the error and the cost examples.
        internal: splitting nodes left.
    """

    lam: float
    error: float
    cost: float
    internal: int


@dataclass(frozen=True)
class PrunePath:
    """Optimal prunings from the cheapest to the most accurate.

    ``complete`` says whether every breakpoint is there; if not, each point is optimal still.
    """

    points: tuple[PathPoint, ...]
    complete: bool
    cuts: int
    raw: PricePath

    def __len__(self) -> int:
        return len(self.points)

    @property
    def lams(self) -> NDArray[np.float64]:
        """Breakpoints, falling."""
        return np.array([point.lam for point in self.points[1:]])

    @property
    def error(self) -> NDArray[np.float64]:
        """(points,) falling."""
        return np.array([point.error for point in self.points])

    @property
    def cost(self) -> NDArray[np.float64]:
        """(points,) rising."""
        return np.array([point.cost for point in self.points])


class BudgetPruner(BudgetedForest):
    """Prunes a forest so that error plus lambda times expected feature cost is minimal.

    Nan, Wang and Saligrama, "Pruning Random Forests for Prediction on a Budget", NIPS 2016. The
    error is the mean over trees of each tree's own loss; the cost is what an example pays on
    average for the features its paths through all trees need, each feature (or group) once.

    Args:
        estimator: a random forest or extra-trees model, classifier or regressor.
        feature_costs: prices: an array over features, a mapping from names, one number, or None (1).
        feature_groups: a label per feature; a group is bought whole and paid once.
        lam: the price of one cost unit in units of error. Exactly one of ``lam`` and ``budget``.
        budget: the most that an average cost example may pay. Only prunings on the convex hull
            of (cost, error) are optimal for some lambda; the most accurate of those within the
            budget is taken and ``neighbours_`` holds it and the next one above.
        fill: ``hull`` stops there. ``greedy`` looks between the two: from the one above, whole
            feature groups go, cheapest loss first, until the budget holds; the result is taken
            if it errs less. ``gap_`` then says how far below its error any pruning of that
            cost could be.
        error_source: ``validation``, ``train`` (each tree's bag), ``oob`` or ``both``.
        node_loss: ``error``, ``gini``, ``brier``, ``log`` or ``squared``; ``auto`` is ``error`` or,
            for regression, ``squared``.
        cost_scope: ``example`` (pay what an example needs) or ``model`` (pay what the model uses).
        solver: ``auto`` (``maxflow``: OR-tools if installed, else our own push-relabel),
            ``ortools``, ``push_relabel``, ``primal_dual``, ``lp``. A budget needs an exact one.
        max_iter, tol: the primal-dual's most rounds, and the relative gap that ends it earlier.
        steps, step_m: its step rule, ``averaged`` or ``published``, and the latter's constant.
        prefit: take ``estimator`` as fitted, as is done with a ``sklearn.frozen.FrozenEstimator``
            (which also survives ``clone``). ``fit(X, y)`` is then given the pruning examples, or
            the forest's training set when ``X_val`` is given too or ``error_source`` needs it.
        validation_fraction: held out of X when a validation set is needed and none is given.
        drop_stumps: leave out trees cut to their root.
        n_jobs: threads for the trees, through joblib.
        random_state: of the hold-out split.

    Attributes:
        estimator_: the pruned forest, a genuine scikit-learn one.
        unpruned_: the forest before.
        lam_, objective_, dual_bound_, gap_: ``dual_bound_ <= optimum <= objective_``.
        error_, cost_: of the pruning, on its error and cost examples.
        kept_: per tree, (n_nodes,) bool over ``unpruned_``'s nodes: those that still split.
        neighbours_: with ``budget``: points within and above it (the latter may be None).

    >>> from sklearn.datasets import load_iris
    >>> from sklearn.ensemble import RandomForestClassifier
    >>> X, y = load_iris(return_X_y=True)
    >>> forest = RandomForestClassifier(10, random_state=0)
    >>> pruner = BudgetPruner(forest, budget=2.0, random_state=0).fit(X, y)
    >>> pruner.cost_ <= 2.0
    True
    """

    def __init__(
        self,
        estimator: Any,
        *,
        feature_costs: Any = None,
        feature_groups: Any = None,
        lam: float | None = None,
        budget: float | None = None,
        fill: str = "hull",
        error_source: str = "validation",
        node_loss: str = "auto",
        cost_scope: str = "example",
        solver: str = "auto",
        max_iter: int = 200,
        tol: float = 1e-6,
        steps: str = "averaged",
        step_m: float = 500.0,
        prefit: bool = False,
        validation_fraction: float = 0.3,
        drop_stumps: bool = False,
        n_jobs: int | None = None,
        random_state: Any = None,
    ) -> None:
        self.estimator = estimator
        self.feature_costs = feature_costs
        self.feature_groups = feature_groups
        self.lam = lam
        self.budget = budget
        self.fill = fill
        self.error_source = error_source
        self.node_loss = node_loss
        self.cost_scope = cost_scope
        self.solver = solver
        self.max_iter = max_iter
        self.tol = tol
        self.steps = steps
        self.step_m = step_m
        self.prefit = prefit
        self.validation_fraction = validation_fraction
        self.drop_stumps = drop_stumps
        self.n_jobs = n_jobs
        self.random_state = random_state

    def _wants_validation(self) -> bool:
        return self.error_source == "validation"

    def _prune(
        self, forest: Any, train: Examples | None, validation: Examples | None, progress: Progress
    ) -> None:
        self._flat = flatten(forest)
        self._programme = self._state_programme(forest, train, validation)
        if self.lam is not None:
            self.set_lambda(self.lam, progress=progress)
        else:
            assert self.budget is not None
            self.select(self.budget, progress=progress)

    def set_lambda(self, lam: float, *, progress: Progress = SILENT) -> Self:
        """Prune for another lambda; nothing is routed or grown again."""
        programme = self._stated()
        check_number("lam", lam)
        price, options = programme.price(lam), self._primal_dual_options()
        cut = solve(programme.reduced, price, self.solver, options, progress)
        self._adopt(lam, programme.lift(cut.kept))
        self.dual_bound_ = programme.base_error - programme.unit * cut.bound
        self.gap_ = max(0.0, self.objective_ - self.dual_bound_)
        self.n_iter_ = max(1, cut.iterations)
        self.solver_ = cut.solver
        self.history_ = cut.history
        return self

    def select(self, budget: float, *, progress: Progress = SILENT) -> Self:
        """Prune to the most accurate hull point whose cost is within ``budget``."""
        programme = self._stated()
        check_number("budget", budget)
        raw, index = bracket(
            programme.reduced, budget, solver=self._exact_solver("budget"), progress=progress
        )
        path = self._in_user_units(raw)
        within = path.points[index]
        above = path.points[index + 1] if index + 1 < len(path) else None
        self.neighbours_ = (within, above)
        self._adopt(above.lam if above else 0.0, programme.lift(raw.kept_at_point(index)))
        self.dual_bound_, self.gap_ = self.objective_, 0.0
        self.n_iter_ = max(1, raw.cuts)
        self.solver_ = resolve_solver(self.solver)
        if self.fill == "greedy" and above is not None:
            self._fill(budget, raw.kept_at_point(index + 1))
        return self

    def _fill(self, budget: float, kept: NDArray[np.bool_]) -> None:
        """Adopt the first pruning within the budget on the greedy way down, if it errs less."""
        programme = self._stated()
        group = group_of_splits(self._flat, self.costs_)[programme.nodes]
        for smaller in greedy_chain(programme.reduced, group, kept):
            error, cost = programme.measure(programme.lift(smaller))
            if cost > budget * (1 + 1e-9):
                continue
            if error < self.error_:
                # At this lambda the two neighbours tie, and nothing is below their line.
                self._adopt(self.lam_, programme.lift(smaller))
                self.gap_ = max(0.0, self.objective_ - self.dual_bound_)
            return

    def prune_path(
        self,
        *,
        points: int | None = None,
        lams: ArrayLike | None = None,
        solver: str | None = None,
        progress: Progress = SILENT,
    ) -> PrunePath:
        """Optimal prunings over lambda; the estimator itself stays as it is.

        Args:
            points: only this many, those that matter most for the curve; None for all.
            lams: the optima at these values instead.
            solver: an exact one; None for the estimator's own.
        """
        if points is not None and (not isinstance(points, Integral) or points < 2):
            raise ForestInputError(
                "must be 2 or more: the cheapest and the most accurate are always there",
                field="points",
                value=points,
                fix="None for every breakpoint",
            )
        programme, solver = self._stated(), self._exact_solver("prune_path", solver)
        if lams is not None:
            for lam in np.atleast_1d(np.asarray(lams, dtype=np.float64)):
                check_number("lams", float(lam))
            prices = [programme.price(lam) for lam in np.atleast_1d(lams)]
            raw = grid_path(programme.reduced, prices, solver=solver, progress=progress)
        else:
            raw = full_path(programme.reduced, points=points, solver=solver, progress=progress)
        self.path_ = self._in_user_units(raw)
        return self.path_

    def filled_path(self, path: PrunePath, *, least_step: float = 0.02) -> list[Any]:
        """Forests between a path's points, where they lie far apart: greedy ways down.

        Args:
            least_step: only gaps of more than this share of the largest cost are filled.
        """
        programme = self._stated()
        group = group_of_splits(self._flat, self.costs_)[programme.nodes]
        forests = []
        for point in range(1, len(path)):
            low, high = path.cost[point - 1], path.cost[point]
            if high - low <= least_step * path.cost[-1]:
                continue
            last = high
            for kept in greedy_chain(programme.reduced, group, path.raw.kept_at_point(point)):
                _, cost = programme.measure(programme.lift(kept))
                if cost <= low:
                    break
                if last - cost > 0.5 * least_step * path.cost[-1]:
                    forests.append(self._rebuild(programme.lift(kept)))
                    last = cost
        return forests

    def forest_at(self, path: PrunePath, point: int) -> Any:
        """The rebuilt forest of one of a path's points; negative numbers count from the end."""
        if not isinstance(point, Integral) or not -len(path) <= point < len(path):
            raise ForestInputError(
                f"the path has {len(path)} points", field="point", value=point,
                fix=f"0 (the cheapest) to {len(path) - 1}",
            )  # fmt: skip
        point = int(point) % len(path)
        return self._rebuild(self._stated().lift(path.raw.kept_at_point(point)))

    def _state_programme(
        self, forest: Any, train: Examples | None, validation: Examples | None
    ) -> Programme:
        loss = resolve_loss(self.node_loss, is_classifier(self))
        errors = error_examples(forest, self.error_source, train, validation, loss)
        payers = validation if validation is not None else train
        assert payers is not None
        return build_programme(
            self._flat,
            errors,
            self.costs_,
            payers.dense(),
            payers.weight,
            cost_scope=self.cost_scope,
            n_jobs=self.n_jobs,
        )

    def _adopt(self, lam: float, kept: NDArray[np.bool_]) -> None:
        programme = self._stated()
        self.error_, self.cost_ = programme.measure(kept)
        self.lam_ = float(lam)
        self.objective_ = self.error_ + self.lam_ * self.cost_
        self.kept_ = [part.copy() for part in self._flat.split(programme.over_all_nodes(kept))]
        self.estimator_ = self._rebuild(kept)

    def _rebuild(self, kept: NDArray[np.bool_]) -> Any:
        everywhere = self._stated().over_all_nodes(kept)
        return rebuild_forest(self.unpruned_, self._flat, everywhere, drop_stumps=self.drop_stumps)

    def _in_user_units(self, raw: PricePath) -> PrunePath:
        programme = self._stated()
        lams = np.append(np.inf, raw.breakpoints * programme.unit)
        error = programme.error(raw.gain)
        level = np.append(np.inf, raw.breakpoints)
        internal = [int((raw.cut_at >= bound).sum()) for bound in level]
        points = tuple(
            PathPoint(float(a), float(b), float(c), d)
            for a, b, c, d in zip(lams, error, raw.cost, internal, strict=True)
        )
        return PrunePath(points, raw.complete, raw.cuts, raw)

    def _stated(self) -> Programme:
        check_is_fitted(self, "unpruned_")
        programme: Programme | None = getattr(self, "_programme", None)
        if programme is None:
            raise ForestInputError(
                "the pruning problem is not saved with the estimator; only its result is",
                fix="fit again to prune for another lambda or budget",
            )
        return programme

    def _primal_dual_options(self) -> PrimalDualOptions:
        return PrimalDualOptions(self.max_iter, self.tol, self.steps, self.step_m, self.n_jobs)

    def _exact_solver(self, purpose: str, asked: str | None = None) -> str:
        solver = resolve_solver(asked or self.solver)
        if solver == "primal_dual":
            raise ForestInputError(
                f"{purpose} needs exact optima, which are nested; the primal-dual's are not",
                field="solver",
                value=solver,
                fix="solver='auto'",
            )
        return solver

    def _check_parameters(self) -> None:
        check_lam_or_budget(self.lam, self.budget)
        if self.fill not in ("hull", "greedy"):
            raise ForestInputError("unknown", field="fill", value=self.fill, fix="hull or greedy")
        if self.cost_scope not in ("example", "model"):
            raise ForestInputError(
                "unknown", field="cost_scope", value=self.cost_scope, fix="'example' or 'model'"
            )
        resolve_solver(self.solver)
        self._primal_dual_options()
        if self.budget is not None:
            self._exact_solver("budget")

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        # The problem may hold gigabytes and is only needed to prune again.
        return {k: v for k, v in state.items() if k not in ("_programme", "_flat")}
