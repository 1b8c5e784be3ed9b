"""From a recipe's structure and allocation to how many units every group gives."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from secateur.allocation.plan import Plan, UnitCut
from secateur.allocation.structured import largest_share, solve_share, structured_counts
from secateur.errors import UsageError
from secateur.evaluation.flops import count_flops
from secateur.masks.target import Target
from secateur.models.anatomy import text_config
from secateur.models.units import Group, Units
from secateur.run.latency import align_widths, saved_time
from secateur.run.planning import make_plan, refuse_other_target
from secateur.run.session import Session, allocator_of

if TYPE_CHECKING:
    from secateur.recipe import Structure


def structured_plan(session: Session, units: Units) -> Plan:
    """The plan: units of each group, exact to what the target counts.

    Raises:
        UsageError: more is asked than can go; a saved plan of another model.
    """
    recipe, structure = session.recipe, session.recipe.structure
    share = recipe.target.sparsity
    groups = list(units)
    name, target = recipe.allocator[0], recipe.target
    if name.endswith(".json"):
        saved = Plan.load(Path(name))
        if saved.units:
            return _saved(session, units, saved)
        share = saved.target.sparsity  # of matrices: its ratios are wishes like an allocator's
        target = Target(share)
    else:
        _refuse_ranking(session)
    provenance: dict[str, object] = {
        "allocator": name,
        "ranking": structure.ranking,
        "kind": structure.target_kind,
    }
    if share == 0:
        return _plan(target, {g.key: UnitCut(g.n_units, 0, g.weights) for g in groups}, {})
    ratios = sizes = None
    if name != "uniform":
        if structure.uniform:
            raise UsageError(
                "equal widths in all layers leave an allocator nothing to say",
                field="allocation",
                value=name,
                fix="allocation: uniform, or uniform: false",
            )
        wished = make_plan(session)
        ratios = wished.ratios
        sizes = {n: rows * columns for n, (rows, columns) in wished.shapes.items()}
        provenance["wished_by"] = wished.provenance
    protect = protected_blocks(session, structure)

    def counts(part: float, kind: str = "ratio", total: float | None = None) -> dict[str, UnitCut]:
        return structured_counts(
            groups,
            part,
            kind=kind,  # type: ignore[arg-type]
            total=total,
            context=structure.context,
            round_to=structure.round_to,
            uniform=structure.uniform,
            at_least=structure.at_least,
            protect=protect,
            ratios=ratios,
            sizes=sizes,
        )

    model = session.loaded.model
    if structure.target_kind == "latency":
        _refuse_long(session, structure.context)
        with session.timed("latency"):
            most = largest_share(groups, structure.round_to, structure.at_least, protect)
            time_saved = saved_time(model, groups, structure.context, counts, session.progress)
            part = solve_share(time_saved, share, most, steps=6)
        session.notes.append(
            f"latency: {part:.1%} of the units' weights were found to save {share:.0%} of the time "
            f"of reading {structure.context} tokens here"
        )
        cuts = counts(part)
    elif structure.target_kind == "parameters":
        cuts = counts(share, "parameters", float(sum(p.numel() for p in model.parameters())))
    elif structure.target_kind == "flops":
        whole = count_flops(model, structure.context)["total"] / structure.context
        cuts = counts(share, "flops", whole)
    else:
        cuts = counts(share)
    if structure.align:
        with session.timed("latency"):
            cuts, note = align_widths(model, groups, cuts, structure, session.progress)
        session.notes.append(note)
    return _plan(target, cuts, provenance)


def choose_globally(
    groups: list[Group],
    scores: dict[str, Tensor],
    gone: dict[str, Tensor],
    plan: Plan,
    part: float,
    structure: Structure,
) -> dict[str, int]:
    """Units each group gives when all of a kind compete; ``at_least`` stay in each.

    Returns:
        Group key -> units gone in all after this round.
    """
    taken = {g.key: 0 for g in groups}
    for kind in {g.kind for g in groups}:
        members = [g for g in groups if g.kind == kind]
        wanted = round(part * sum(plan.units[g.key].removed for g in members))
        rows = []
        for order, group in enumerate(members):
            score = scores[group.key].double().cpu().clone()
            score[gone[group.key]] = float("-inf")
            ranked = torch.sort(score, stable=True)
            free = max(0, group.n_units - structure.at_least)
            rows += [(float(v), order, i) for i, v in enumerate(ranked.values[:free])]
        for _, order, _ in sorted(rows)[:wanted]:
            taken[members[order].key] += 1
    return taken


def _plan(target: Target, cuts: dict[str, UnitCut], provenance: dict[str, object]) -> Plan:
    return Plan(target, {}, {}, provenance, {}, cuts)


def _refuse_long(session: Session, context: int) -> None:
    """Times are measured by running the model, which must have positions for every token."""
    limit = getattr(text_config(session.loaded.model), "max_position_embeddings", None)
    if limit and context > limit:
        raise UsageError(
            f"the model has {limit} positions, so this cannot be timed",
            field="context",
            value=context,
            fix=f"context: {limit} or less",
        )


def protected_blocks(session: Session, structure: Structure) -> frozenset[int]:
    """Numbers of the blocks that are left alone.

    Raises:
        UsageError: a number the model has no block for.
    """
    blocks = len(session.view.blocks)
    for number in structure.protect:
        if not -blocks <= number < blocks:
            raise UsageError(
                f"the model has {blocks} blocks",
                field="protect",
                value=number,
                fix=f"from {-blocks} to {blocks - 1}",
            )
    return frozenset(number % blocks for number in structure.protect)


def _refuse_ranking(session: Session) -> None:
    """Stop where an allocator would rank single weights by a method that has no such scores."""
    allocator = allocator_of(session.recipe)
    if allocator is None:
        return
    own = getattr(allocator, "scores", None) == "method"
    if allocator.ranks_scores or allocator.tries or own:
        raise UsageError(
            f"it asks for '{session.recipe.method}'s scores of single weights, and that method "
            "ranks whole units",
            field="allocation",
            value=allocator.name,
            fix="owl, dlp, dsa, als, incremental, alphapruning, or atp with a beta; "
            "or search with another method and give its plan.json",
        )


def _saved(session: Session, units: Units, plan: Plan) -> Plan:
    path = session.recipe.allocator[0]
    refuse_other_target(session, plan)
    for group in units:
        cut = plan.units.get(group.key)
        if cut is None or cut.of != group.n_units or cut.removed >= cut.of:
            raise UsageError(
                f"the plan does not fit '{group.key}' with its {group.n_units} units",
                field="allocation",
                value=path,
                fix="a plan.json of a structured run of this model",
            )
        if cut.removed % group.even:
            raise UsageError(
                f"'{group.key}' must lose a multiple of {group.even} heads",
                field="allocation",
                value=cut.removed,
            )
    return plan


def share_of_weights(groups: Iterable[Group], removed: Callable[[Group], int]) -> float:
    """What ``removed`` units of each group are of the weights of all units of ``groups``."""
    groups = list(groups)
    whole = sum(g.n_units * g.weights for g in groups)
    return sum(removed(g) * g.weights for g in groups) / max(1, whole)
