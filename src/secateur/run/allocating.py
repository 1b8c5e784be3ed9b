"""Plans without pruning: one made, or those of several allocators side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from secateur.allocation import Allocator, Plan, allocators
from secateur.errors import UsageError
from secateur.models.loading import Loaded
from secateur.models.state import evaluating
from secateur.progress import SILENT, Progress
from secateur.recipe import Recipe
from secateur.run.planning import make_plan, problem_of
from secateur.run.session import allocator_of, prepare, readings_of


def allocate_plan(
    recipe: Recipe,
    *,
    loaded: Loaded | None = None,
    calibration: Any = None,
    evidence: Path | None = None,
    progress: Progress = SILENT,
) -> Plan:
    """The plan a run of ``recipe`` would follow; nothing is pruned.

    Args:
        recipe: model, target, method and allocation.
        loaded: a model in memory instead of ``recipe.model``; it is not changed.
        calibration: token windows or texts in memory, instead of the recipe's text.
        evidence: folder where what is read off the model is kept for other plans.
        progress: where to report.
    """
    session = prepare(_lean(recipe), loaded, calibration, progress)
    with evaluating(session.loaded.model):
        return make_plan(session, evidence)


def _lean(recipe: Recipe) -> Recipe:
    """Without a method, where its scores are not asked for: then it needs no calibration."""
    allocator = allocator_of(recipe)
    if allocator is not None and (allocator.ranks_scores or allocator.searches):
        return recipe
    free = {"method": "magnitude", "options": {}, "update": "none", "reconstruct": "block"}
    return recipe.model_copy(update=free)


def compare_allocators(
    recipe: Recipe,
    names: Sequence[str],
    *,
    evidence: Path | None = None,
    progress: Progress = SILENT,
) -> dict[str, Plan]:
    """The plan of each allocator for one model and target, from one dense pass.

    Args:
        recipe: model, target and method; its allocation is not used.
        names: of allocators (with their default options), or paths of saved plans.
        evidence: folder where what is read off the model is kept.
        progress: where to report.

    Raises:
        UsageError: an unknown allocator, or plans of different models.
    """
    known: dict[str, Allocator] = {
        n: allocators[n].with_options({}) for n in names if not n.endswith(".json")
    }
    plans = {n: Plan.load(Path(n)) for n in names if n.endswith(".json")}
    if known:
        # The one that reads most decides whether calibration windows are drawn.
        neediest = max(known, key=lambda n: _reads(recipe, n))
        session = prepare(_with(recipe, neediest), None, None, progress)
        with evaluating(session.loaded.model):
            problem = problem_of(session, tuple(known.values()), evidence)
            for name, allocator in known.items():
                problem.notes.clear()
                progress.note(f"allocating: {name}")
                plans[name] = allocator.plan(problem)
    first = next(iter(plans.values()))
    for name, plan in plans.items():
        if plan.shapes != first.shapes:
            raise UsageError("the plan is of another model", field="plan", value=name)
    return {n: plans[n] for n in names}


def _with(recipe: Recipe, name: str) -> Recipe:
    return recipe.model_copy(update={"allocation": name})


def _reads(recipe: Recipe, name: str) -> bool:
    kind = allocators[name]
    needs = any(r.inputs or r.sample for r in readings_of(_with(recipe, name)))
    return needs or kind.searches
