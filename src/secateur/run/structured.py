"""A structured run: load, plan, mask, repair, cut out, save, re-open, evaluate, report.

The folder, its lock, resume, evaluation and report are those of every other run.
"""

from __future__ import annotations

from contextlib import ExitStack
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch

from secateur.allocation.plan import Plan
from secateur.errors import NumericsError, UsageError, VerificationError
from secateur.evaluation.flops import count_flops
from secateur.masks.structured import StructuredMask
from secateur.methods.structured_base import ScoreJob, StructuredMethod, lowest
from secateur.models.anatomy import ModelView
from secateur.models.loading import Loaded
from secateur.models.shards import INDEX
from secateur.models.state import evaluating
from secateur.models.structured_saving import Form, form_of
from secateur.models.surgery import apply_mask, keep_original_config, shrink
from secateur.models.units import Group, Units, units_of
from secateur.progress import SILENT, Progress
from secateur.recipe import Recipe
from secateur.run.folder import RunFolder, writable
from secateur.run.measure import measure_quality
from secateur.run.recovered import recover_dense, recoverer_of
from secateur.run.results import publish
from secateur.run.session import Session, identity, prepare, resolve
from secateur.run.structured_blocks import prune_unit_blocks
from secateur.run.structured_plan import choose_globally, protected_blocks, structured_plan
from secateur.run.structured_results import assemble_structured, measure_structured_speed
from secateur.run.structured_saving import save_structured

GroupRecord = dict[str, Any]


def execute_structured(
    recipe: Recipe,
    *,
    out: Path | None = None,
    loaded: Loaded | None = None,
    calibration: Any = None,
    fresh: bool = False,
    progress: Progress = SILENT,
    command: str = "",
) -> Any:
    """Run a recipe whose method removes whole units; arguments as of ``runner.execute``."""
    from secateur.run.runner import Result, peak_memory

    recipe = _settled(recipe)
    _refuse(recipe)
    if out is not None:
        writable(out)
    session = prepare(recipe, loaded, calibration, progress)
    if session.ranks.world > 1:
        raise UsageError(
            "structured runs use one process", field="ranks", value=session.ranks.world
        )
    recoverer = recoverer_of(session, owned=loaded is None)
    method = cast(StructuredMethod, session.method)
    model = session.loaded.model
    keep_original_config(model)
    units = _units(session, method)
    with ExitStack() as stack:
        folder = None
        if out is not None:
            folder = stack.enter_context(RunFolder(out, identity(session), fresh=fresh))
            folder.save_recipe(recipe)
            folder.event("started", model=session.loaded.name, target=str(recipe.target))
        stack.enter_context(evaluating(model))
        plan = _planned(session, units, folder)
        judged = _dense_beside(session)
        quality = measure_quality(judged, folder)
        before = _profile(session)
        records: list[GroupRecord] = []
        with session.timed("pruning"):
            if method.driver == "blocks":
                mask, records = prune_unit_blocks(session, units, plan, folder)
            else:
                mask, records = _prune_by_score(session, units, plan, folder)
        _check_counts(units, mask, plan)
        peak = peak_memory()
        with session.timed("surgery"):
            apply_mask(model, mask)
            shrink(model, mask)
        session.view = judged.view = ModelView.of(model, recipe.blocks)
        recovery = None
        if recoverer is not None:
            recovery = recover_dense(session, recoverer, folder, quality)
        form = form_of(model)
        reopened = None
        if folder is not None:
            with session.timed("saving"):
                reopened = _saved(session, folder, form)
        report = assemble_structured(
            session,
            units=units,
            plan=plan,
            mask=mask,
            records=records,
            form=form,
            before=before,
            after=_profile(session),
            command=command,
            quality=quality(),
            speed=measure_structured_speed(session, owned=loaded is None),
            folder=folder,
            memory_peak=peak,
            reopened=reopened,
        )
        report["recovery"] = recovery
        if folder is not None:
            publish(report, folder)
            folder.event("finished", delivered=report["totals"]["delivered"])
            folder.drop_state()
    return Result(model, session.loaded.tokenizer, mask.gone, report, out)


def _settled(recipe: Recipe) -> Recipe:
    """The recipe with the structure it leaves open filled in from the method."""
    method = cast(StructuredMethod, resolve(recipe)[0])
    structure = recipe.structure
    own_widths = structure.uniform or structure.round_to > 1 or structure.align
    usual = "local" if own_widths else method.usual_ranking
    filled = structure.model_copy(
        update={
            "kinds": structure.kinds or method.usual_kinds,
            "ranking": structure.ranking or usual,
        }
    )
    return recipe.model_copy(update={"structure": filled})


def _refuse(recipe: Recipe) -> None:
    """Settings that mean nothing where whole units go."""
    if recipe.target.is_pattern:
        raise UsageError(
            "whole units have no N:M pattern",
            field="sparsity",
            value=str(recipe.target),
            fix="a share in [0, 1), such as 0.25",
        )
    for field, usual in (("scope", None), ("update", None), ("stream", False)):
        if getattr(recipe, field) != usual:
            raise UsageError(
                f"has no meaning for '{recipe.method}', which removes whole units",
                field=field,
                value=getattr(recipe, field),
                fix=f"leave {field} out; what may be set is under 'structure' and in --option",
            )
    _refuse_recovery(recipe)
    for field in ("include", "exclude"):
        if getattr(recipe, field):
            raise UsageError(
                "whole units are chosen by kind and block, not by matrix",
                field=field,
                value=getattr(recipe, field),
                fix="structure: {kinds: [...], protect: [0, -1]}",
            )
    structure = recipe.structure
    if structure.align and (structure.uniform or structure.round_to > 1):
        raise UsageError(
            "alignment moves some widths up and others down",
            field="align",
            value=True,
            fix="round_to: 32 for widths that are all alike, or leave uniform and round_to out",
        )
    own_widths = structure.uniform or structure.round_to > 1 or structure.align
    if structure.ranking == "global" and own_widths:
        raise UsageError(
            "a global ranking gives every group its own width",
            field="ranking",
            value="global",
            fix="ranking: local, or leave uniform, round_to and align out",
        )


def _refuse_recovery(recipe: Recipe) -> None:
    """Recoveries that mean nothing, or cannot be written, where whole units are gone."""
    spec = recipe.recovery
    if spec is None:
        return
    if spec.rounds > 1:
        raise UsageError(
            "cycles of pruning and retraining are for masks of single weights",
            field="recovery.method",
            value=spec.method,
            fix="method: perp with train: [lora], or full",
        )
    if spec.method == "reconstruct" and {"stem", "layer"} & set(recipe.structure.kinds or ()):
        raise UsageError(
            "without the same width and layers its blocks have no dense counterparts",
            field="recovery.method",
            value=spec.method,
            fix="method: perp with train: [lora], or full",
        )
    if spec.add_biases:
        raise UsageError(
            "a cut model's config has no words for added biases",
            field="recovery.add_biases",
            value=True,
            fix="leave it out",
        )


def _units(session: Session, method: StructuredMethod) -> Units:
    structure = session.recipe.structure
    units = units_of(session.loaded.model, structure.kinds or (), structure.gqa)
    for group in units:
        wrong = group.kind not in method.kinds
        if wrong or (method.driver == "blocks" and group.block is None):
            raise UsageError(
                f"'{session.recipe.method}' does not cut {group.kind}",
                field="kinds",
                value=group.kind,
                fix=f"kinds: {sorted(method.kinds)}",
            )
    if structure.ranking == "global" and any(g.even > 1 for g in units):
        raise UsageError(
            "heads that must go evenly cannot be ranked over all layers",
            field="ranking",
            value="global",
            fix="gqa: groups, or ranking: local",
        )
    return units


def _dense_beside(session: Session) -> Session:
    """The session whose dense logits outlive the cut.

    They are made from stored hidden states by the model's own head and call of its blocks,
    which a cut of the residual width or of layers changes: then a copy of the model is kept.
    """
    lasting = not {"stem", "layer"} & set(session.recipe.structure.kinds or ())
    if lasting or session.evaluation is None:
        return session
    return replace(
        session, view=ModelView.of(deepcopy(session.loaded.model), session.recipe.blocks)
    )


def _profile(session: Session) -> dict[str, Any]:
    """Parameters and FLOPs of the model as it is."""
    model, context = session.loaded.model, session.recipe.structure.context
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "prefill": count_flops(model, context),
        "decode": count_flops(model, context, decode=True),
    }


def _planned(session: Session, units: Units, folder: RunFolder | None) -> Plan:
    record = folder.read("plan.json") if folder is not None else None
    if record is not None:
        return Plan.of_record(record)
    with session.timed("allocation"):
        plan = structured_plan(session, units)
    if folder is not None:
        folder.save("plan.json", plan.record())
    return plan


def _prune_by_score(
    session: Session, units: Units, plan: Plan, folder: RunFolder | None
) -> tuple[StructuredMask, list[GroupRecord]]:
    """Rank, remove a part, rank again; a killed run goes on after its last finished round."""
    method = cast(StructuredMethod, session.method)
    structure = session.recipe.structure
    mask, start = _resumed(folder, method.rounds)
    if start:
        apply_mask(session.loaded.model, mask)
    records: dict[str, GroupRecord] = {}
    kept = protected_blocks(session, structure)
    compete = structure.ranking == "global"
    groups = [g for g in units if plan.units[g.key].removed or (compete and g.block not in kept)]
    with session.progress.stage("pruning", total=method.rounds, unit="rounds") as advance:
        advance(start)
        for number in range(start, method.rounds):
            gone = {g.key: mask.of(g) for g in groups}
            scores = method.scores(
                ScoreJob(
                    session.loaded.model,
                    groups,
                    gone,
                    session.calibration,
                    session.recipe.calibration.batch_tokens,
                    number,
                    method.rounds,
                    session.recipe.calibration.seed,
                    session.progress,
                    session.notes,
                )
            )
            for group in groups:
                _check_scores(group, scores, gone[group.key])
            part = (number + 1) / method.rounds
            counts = {g.key: _step(g, plan.units[g.key].removed, part) for g in groups}
            if compete:
                counts = choose_globally(groups, scores, gone, plan, part, structure)
            for group in groups:
                chosen = lowest(scores[group.key], counts[group.key], gone[group.key], group.even)
                mask.remove(group, chosen)
                if structure.gqa == "duplicate" and group.kind == "head":
                    mask.duplicated.add(group.key)
                if number == 0:
                    records[group.key] = {"scores": [float(s) for s in scores[group.key]]}
            apply_mask(session.loaded.model, mask)
            if folder is not None:
                mask.save(folder.inner / "state" / f"round-{number:03d}.json")
            advance(1)
    return mask, [{"key": g.key, **records.get(g.key, {})} for g in units]


def _step(group: Group, count: int, part: float) -> int:
    """The first rounds' share of ``count``, in whole lots."""
    return round(count // group.even * part) * group.even


def _resumed(folder: RunFolder | None, rounds: int) -> tuple[StructuredMask, int]:
    if folder is not None:
        for number in reversed(range(rounds)):
            path = folder.inner / "state" / f"round-{number:03d}.json"
            if path.is_file():
                folder.event("resumed", rounds=number + 1)
                return StructuredMask.load(path), number + 1
    return StructuredMask(), 0


def _check_scores(group: Group, scores: dict[str, torch.Tensor], gone: torch.Tensor) -> None:
    score = scores.get(group.key)
    if score is None or score.shape != (group.n_units,):
        raise VerificationError(
            f"the method gave no score of shape ({group.n_units},) for '{group.key}'",
            fix="report it to the method's author",
        )
    if not torch.isfinite(score.cpu()[~gone]).all():
        raise NumericsError(
            f"the scores of '{group.key}' hold NaN or infinity",
            fix="use --dtype float32, or check the calibration text",
        )


def _check_counts(units: Units, mask: StructuredMask, plan: Plan) -> None:
    """What was delivered is what the plan asked."""
    if plan.provenance.get("ranking") == "global":
        return
    for group in units:
        asked = plan.units[group.key].removed
        found = int(mask.of(group).sum())
        if found != asked:
            raise VerificationError(f"'{group.key}' should lose {asked} units, not {found}")


def _saved(session: Session, folder: RunFolder, form: Form) -> dict[str, Any]:
    """Written, opened again and compared; a folder that does not hold must not look like a model."""
    try:
        record = save_structured(session, folder, form)
    except BaseException:
        (folder.path / INDEX).unlink(missing_ok=True)
        raise
    folder.event("reopened", **record)
    return record
