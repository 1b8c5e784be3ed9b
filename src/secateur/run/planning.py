"""From a recipe's allocation to a plan with exact counts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from secateur.allocation.global_rank import global_plan
from secateur.allocation.plan import Plan, uniform
from secateur.errors import UsageError
from secateur.evidence.gather import gather_inputs
from secateur.evidence.gradients import of_matrix
from secateur.evidence.statistics import Evidence
from secateur.methods import Need
from secateur.run.evidence import gather_gradients
from secateur.run.session import Session


def make_plan(session: Session, root: Path | None = None) -> Plan:
    """Spread the target over the matrices as the recipe's allocation says."""
    recipe, shapes = session.recipe, session.shapes
    if session.scope.kind == "global" or recipe.allocation == "global":
        if session.method.requirements():
            session.notes.append(
                "a global ranking compares activation scores across layers, whose scales differ: "
                "quality usually suffers (use scope row or block)"
            )
        return global_plan(_dense_scores(session, root), recipe.target)
    if recipe.allocation == "uniform":
        return uniform(shapes, recipe.target)
    path = Path(recipe.allocation)
    if path.suffix == ".json":
        plan = Plan.load(path)
        if plan.shapes != shapes:
            odd = sorted(set(plan.shapes) ^ set(shapes))
            raise UsageError(
                f"the plan is of another model ({len(odd)} matrices differ, e.g. "
                f"{odd[0] if odd else 'in shape'})",
                field="allocation",
                value=recipe.allocation,
            )
        if "sparsity" in recipe.model_fields_set and plan.target != recipe.target:
            raise UsageError(
                f"the plan was made for {plan.target}",
                field="sparsity",
                value=str(recipe.target),
                fix=f"--sparsity {plan.target}, or leave it to the plan",
            )
        return plan
    raise UsageError(
        "unknown allocation",
        field="allocation",
        value=recipe.allocation,
        fix="uniform, global, or the path of a plan.json",
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
                yield m.name, session.method.score(m.tensor().float(), evidence)
