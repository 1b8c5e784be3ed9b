"""The command line's runs: read, grow, prune, measure, write. Everything measured is recorded."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.ensemble import (
    ExtraTreesClassifier,
    ExtraTreesRegressor,
    RandomForestClassifier,
    RandomForestRegressor,
)
from sklearn.model_selection import train_test_split

import secateur
from secateur.errors import UsageError
from secateur.files import write_json
from secateur.forests.compare import METHODS, Comparison, compare
from secateur.forests.flat import flatten
from secateur.forests.pruner import BudgetPruner, PrunePath
from secateur.forests.recipe import ForestRecipe
from secateur.forests.store import save_forest
from secateur.forests.tables import Table, read_costs, read_table
from secateur.progress import SILENT, Progress

DEFAULT_METHODS = ("budgetprune", "budgetprune-filled", "greedy", "ccp", "depth")


@dataclass(frozen=True)
class Parts:
    """Training, validation and test rows of a table."""

    train: NDArray[np.intp]
    validation: NDArray[np.intp]
    test: NDArray[np.intp]


def run_prune(recipe: ForestRecipe, out: Path, progress: Progress = SILENT) -> dict[str, Any]:
    """Grow, prune to the budget or lambda, measure on test rows; write the folder ``out``.

    Writes ``forest.npz`` (see ``store``), ``result.json`` and the report.
    """
    if (recipe.budget is None) == (recipe.lam is None):
        raise UsageError("give one of --budget and --lam", field="budget", value=recipe.budget)
    if recipe.budget is not None:
        _check_exact(recipe)
    check_folder(out)
    table, parts, pruner, seconds = _grow_and_prune(recipe, progress)
    start = time.perf_counter()
    # The page's curve; the primal-dual's prunings, near optima, are not nested and draw none.
    exact = "auto" if recipe.solver == "primal_dual" else None
    path = pruner.prune_path(points=recipe.points, solver=exact, progress=progress)
    seconds["path"] = time.perf_counter() - start
    record = _record("prune", recipe, table, parts, seconds)
    record |= {
        "before": _measured(pruner, pruner.unpruned_, table, parts.test),
        "after": _measured(pruner, pruner.estimator_, table, parts.test),
        "optimum": _optimum(pruner),
        "path": _path_rows(pruner, path, table, parts.test),
    }
    save_forest(pruner.estimator_, out / "forest.npz")
    return _written(record, out)


def run_path(recipe: ForestRecipe, out: Path, progress: Progress = SILENT) -> dict[str, Any]:
    """The optimal prunings over lambda, each measured on test rows; ``points=None`` for all."""
    _check_exact(recipe)
    check_folder(out)
    recipe = recipe.model_copy(update={"lam": 0.0, "budget": None})
    table, parts, pruner, seconds = _grow_and_prune(recipe, progress)
    start = time.perf_counter()
    path = pruner.prune_path(points=recipe.points, progress=progress)
    seconds["path"] = time.perf_counter() - start
    record = _record("path", recipe, table, parts, seconds)
    record |= {
        "before": _measured(pruner, pruner.unpruned_, table, parts.test),
        "path": _path_rows(pruner, path, table, parts.test),
        "complete": path.complete,
        "cuts": path.cuts,
    }
    return _written(record, out)


def run_compare(
    recipe: ForestRecipe,
    out: Path,
    *,
    methods: list[str] | None = None,
    seeds: int = 3,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """All methods on the same splits and forests; see ``compare``."""
    check_folder(out)
    table = read_table(recipe.data, recipe.target, recipe.task)
    costs, groups = read_costs(recipe.costs, table.names)
    prices = np.ones(len(table.names))
    if costs is not None:
        prices = np.array([costs[name] for name in table.names])
    start = time.perf_counter()
    result = compare(
        table.x.to_numpy(),
        table.y,
        _forest(recipe, table.classify),
        lambda seed: prices,
        groups=groups,
        methods=methods or list(DEFAULT_METHODS),
        seeds=range(seeds),
        progress=progress,
    )
    seconds = {"compare": time.perf_counter() - start}
    record = _record("compare", recipe, table, None, seconds)
    record |= _comparison(result, seeds)
    return _written(record, out)


def _check_exact(recipe: ForestRecipe) -> None:
    if recipe.solver == "primal_dual":
        raise UsageError(
            "a budget and a path need exact optima, which are nested; the primal-dual's are not",
            field="solver",
            value=recipe.solver,
            fix="--solver auto, or --lam with the primal-dual",
        )


def check_folder(out: Path) -> None:
    """Refuse an output folder that cannot be one, before any work is done."""
    if out.exists() and not out.is_dir():
        raise UsageError("a file of that name is in the way", field="out", value=str(out))


def _comparison(result: Comparison, seeds: int) -> dict[str, Any]:
    curves = {
        name: [[p.test_cost, p.test_score] for p in sorted(per_seed[0], key=lambda p: p.test_cost)]
        for name, per_seed in result.curves.items()
    }
    return {
        "seeds": seeds,
        "budgets": result.budgets,
        "table": result.table(),
        "curves": curves,
        "unpruned": result.unpruned,
        "left_out": result.left_out,
        "methods": METHODS.names(),
    }


def _grow_and_prune(
    recipe: ForestRecipe, progress: Progress
) -> tuple[Table, Parts, BudgetPruner, dict[str, float]]:
    table = read_table(recipe.data, recipe.target, recipe.task)
    costs, groups = read_costs(recipe.costs, table.names)
    parts = _parts(table, recipe)
    start = time.perf_counter()
    with progress.stage("forest", unit="trees"):
        forest = _forest(recipe, table.classify)
        forest.fit(table.x.iloc[parts.train], table.y[parts.train])
    grown = time.perf_counter()
    pruner = BudgetPruner(
        forest,
        feature_costs=costs,
        feature_groups=groups,
        lam=recipe.lam,
        budget=recipe.budget,
        fill=recipe.fill,
        error_source=recipe.error_source,
        node_loss=recipe.node_loss,
        cost_scope=recipe.cost_scope,
        solver=recipe.solver,
        prefit=True,
        n_jobs=recipe.jobs,
    )
    pruner.fit(
        table.x.iloc[parts.train],
        table.y[parts.train],
        X_val=table.x.iloc[parts.validation],
        y_val=table.y[parts.validation],
        progress=progress,
    )
    seconds = {"grow": grown - start, "prune": time.perf_counter() - grown}
    return table, parts, pruner, seconds


def _forest(recipe: ForestRecipe, classify: bool) -> Any:
    kinds = {
        ("random-forest", True): RandomForestClassifier,
        ("random-forest", False): RandomForestRegressor,
        ("extra-trees", True): ExtraTreesClassifier,
        ("extra-trees", False): ExtraTreesRegressor,
    }
    # Out-of-bag errors need bags, which extra-trees draw only when told to.
    bags = recipe.kind == "random-forest" or recipe.error_source in ("oob", "both")
    return kinds[recipe.kind, classify](
        recipe.trees, bootstrap=bags, random_state=recipe.seed, n_jobs=recipe.jobs
    )


def _parts(table: Table, recipe: ForestRecipe) -> Parts:
    rows = np.arange(len(table.y))
    labels = table.y if table.classify else None
    try:
        rest, test = train_test_split(
            rows, test_size=recipe.test, random_state=recipe.seed, stratify=labels
        )
        train, validation = train_test_split(
            rest,
            test_size=recipe.validation / (1 - recipe.test),
            random_state=recipe.seed,
            stratify=None if labels is None else labels[rest],
        )
    except ValueError as error:
        raise UsageError(
            f"the rows cannot be split: {error}", field="data", value=str(recipe.data)
        ) from error
    return Parts(train, validation, test)


def _measured(
    pruner: BudgetPruner, forest: Any, table: Table, rows: NDArray[np.intp]
) -> dict[str, Any]:
    from secateur.forests.metrics import expected_feature_cost, feature_usage, model_cost

    frame = table.x.iloc[rows]
    x = np.ascontiguousarray(frame.to_numpy(dtype=np.float32))
    usage = feature_usage(forest, pruner.costs_, x)
    return {
        "score": float(forest.score(frame, table.y[rows])),
        "cost": expected_feature_cost(forest, pruner.costs_, x),
        "features_per_example": float(usage.sum() / len(rows)),
        "model_cost": model_cost(forest, pruner.costs_),
        "nodes": flatten(forest).n_nodes,
        "usage": dict(zip(pruner.costs_.names, (usage.sum(0) / len(rows)).tolist(), strict=True)),
    }


def _optimum(pruner: BudgetPruner) -> dict[str, Any]:
    found: dict[str, Any] = {
        "lam": pruner.lam_,
        "objective": pruner.objective_,
        "dual_bound": pruner.dual_bound_,
        "gap": pruner.gap_,
        "error": pruner.error_,
        "cost": pruner.cost_,
        "solver": pruner.solver_,
    }
    if pruner.budget is not None:
        found["neighbours"] = [
            None if p is None else {"error": p.error, "cost": p.cost, "lam": p.lam}
            for p in pruner.neighbours_
        ]
    return found


def _path_rows(
    pruner: BudgetPruner, path: PrunePath, table: Table, rows: NDArray[np.intp]
) -> list[dict[str, float]]:
    out = []
    for i, point in enumerate(path.points):
        measured = _measured(pruner, pruner.forest_at(path, i), table, rows)
        out.append(
            {
                "lam": point.lam,
                "error": point.error,
                "cost": point.cost,
                "internal": point.internal,
                "test_score": measured["score"],
                "test_cost": measured["cost"],
            }
        )
    return out


def _record(
    command: str,
    recipe: ForestRecipe,
    table: Table,
    parts: Parts | None,
    seconds: dict[str, float],
) -> dict[str, Any]:
    rows = {"all": len(table.y)}
    if parts is not None:
        rows |= {name: len(getattr(parts, name)) for name in ("train", "validation", "test")}
    return {
        "secateur": secateur.__version__,
        "forest": command,
        "recipe": recipe.model_dump(mode="json"),
        "rows": rows,
        "features": len(table.names),
        "score": "accuracy" if table.classify else "R²",
        "seconds": seconds,
    }


def _written(record: dict[str, Any], out: Path) -> dict[str, Any]:
    from secateur.forests.report import write_forest_report

    write_json(out / "result.json", record)
    write_forest_report(record, out)
    return record
