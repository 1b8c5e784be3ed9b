"""From a recipe's allocation to a plan with exact counts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from secateur.allocation import Allocator, Plan, Problem
from secateur.errors import UsageError
from secateur.evidence.gather import gather_inputs
from secateur.evidence.gradients import of_matrix
from secateur.evidence.statistics import Evidence
from secateur.methods import Need
from secateur.run.evidence import gather_gradients
from secateur.run.readings import gather_readings
from secateur.run.session import Session, allocator_of
from secateur.run.trial_of import Trial


def make_plan(session: Session, root: Path | None = None) -> Plan:
    """Spread the target over the matrices as the recipe's allocation says.

    Args:
        root: folder where what is read off the dense model is kept, and taken from.
    """
    allocator = allocator_of(session.recipe)
    if allocator is None:
        return _saved(session)
    problem = problem_of(session, (allocator,), root)
    plan = allocator.plan(problem)
    session.notes += [f"allocation: {note}" for note in problem.notes]
    if allocator.name == "global" and session.method.requirements():
        session.notes.append(
            "a global ranking compares activation scores across layers, whose scales differ: "
            "quality usually suffers (use scope row or block)"
        )
    return session.ranks.spread(0, plan)


def problem_of(session: Session, among: Sequence[Allocator], root: Path | None = None) -> Problem:
    """What allocators are told of the session's model; their readings cost one dense pass.

    Args:
        among: the allocators that will be asked; what they read is gathered once for all.
        root: folder where readings are kept.
    """
    readings = [r for allocator in among for r in allocator.readings()]
    view = session.view
    problem = Problem(
        target=session.recipe.target,
        shapes=session.shapes,
        blocks=tuple(tuple(m.name for m in b.matrices) for b in view.blocks if b.matrices),
        roles={m.name: m.role for m in view.matrices()},
        weights=lambda: _weights(session),
        scores=lambda: _dense_scores(session, root),
        trial=Trial(session, lambda: _dense_scores(session, root), root),
        progress=session.progress,
    )
    for allocator in among:
        allocator.refuse_bounds(problem)
    return replace(problem, readings=gather_readings(session, readings, root) if readings else {})


def _weights(session: Session) -> Iterator[tuple[str, Tensor]]:
    for block in session.view.blocks:
        with session.present(block):
            for m in block.matrices:
                yield m.name, m.tensor().float()


def _saved(session: Session) -> Plan:
    """A plan from a file, if it is this model's and meets what the recipe asks."""
    recipe, shapes = session.recipe, session.shapes
    path = recipe.allocator[0]
    plan = Plan.load(Path(path))
    if plan.shapes != shapes:
        odd = sorted(set(plan.shapes) ^ set(shapes))
        raise UsageError(
            f"the plan is of another model ({len(odd)} matrices differ, e.g. "
            f"{odd[0] if odd else 'in shape'})",
            field="allocation",
            value=path,
        )
    refuse_other_target(session, plan)
    largest = max((rows * columns for rows, columns in shapes.values()), default=0)
    slack = 0 if plan.target.group is None else largest // plan.target.group
    if abs(plan.removed - plan.target.count(plan.elements)) > slack:
        session.notes.append(
            f"the plan removes {plan.removed / plan.elements:.3%} of the weights, not the "
            f"{plan.target} it was made for (edited by hand?)"
        )
    searched = plan.provenance.get("made_by", {}).get("search", {}).get("windows", {})
    measured = {} if session.evaluation is None else session.evaluation.record
    if searched.get("text") and searched["text"] == measured.get("text"):
        session.notes.append(
            "the plan was searched on the very text that quality is measured on: "
            "that quality is flattering (evaluate on another text)"
        )
    return plan


def refuse_other_target(session: Session, plan: Plan) -> None:
    """Stop where the recipe asks for one sparsity and its saved plan is for another.

    Raises:
        UsageError: naming both.
    """
    recipe = session.recipe
    if "sparsity" in recipe.model_fields_set and plan.target != recipe.target:
        raise UsageError(
            f"the plan was made for {plan.target}",
            field="sparsity",
            value=str(recipe.target),
            fix=f"--sparsity {plan.target}, or leave it to the plan",
        )


def _dense_scores(session: Session, root: Path | None) -> Iterator[tuple[str, Tensor]]:
    """Scores of every matrix from the dense model's evidence, in the model's order."""
    replay = session.replay(session.calibration) if session.calibration is not None else None
    gradients = gather_gradients(session, root)
    gram = Need.GRAM in session.method.requirements()
    for block in session.view.blocks:
        with session.present(block):
            moments: dict[str, Any] = {}
            if replay is not None:
                inputs, replay.hidden = gather_inputs(replay, block, gram=gram)
                session.ranks.sum_inputs(inputs)
                moments = inputs.moments
            for m in block.matrices:
                sums = gradients(block.index) if gradients else None
                evidence = Evidence(
                    m.name,
                    moments.get(m.name),
                    None if sums is None else of_matrix(sums, m),
                    len(session.calibration) if session.calibration else 0,
                )
                yield m.name, session.ranker.score(m.tensor().float(), evidence)
