"""A recipe executed step by step: load, plan, prune, save, verify, evaluate, report.

In a folder every step leaves what the next needs, so the same command run again goes on
where a killed one stopped, and gives the same bytes.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from secateur.allocation.plan import Plan
from secateur.errors import UsageError
from secateur.evidence.store import EvidenceStore
from secateur.masks.store import JoinedMasks
from secateur.methods import Need, methods
from secateur.methods.maskllm import MaskLLM
from secateur.methods.structured_base import StructuredMethod
from secateur.models.loading import Loaded
from secateur.models.shards import INDEX
from secateur.models.state import evaluating
from secateur.progress import SILENT, Progress
from secateur.recipe import Recipe, Structure
from secateur.run.checkpoint import Checkpoint
from secateur.run.engine import BlockResult, Engine
from secateur.run.evidence import gather_gradients
from secateur.run.finish import finish_checkpoint, verify_zeros
from secateur.run.folder import RECOVERED, RunFolder, writable
from secateur.run.learned import check_learned, learn
from secateur.run.measure import measure_quality, measure_size, measure_speed
from secateur.run.planning import make_plan
from secateur.run.recovered import earlier_cycles, recover, recoverer_of
from secateur.run.recovery import Recoverer
from secateur.run.results import assemble, publish
from secateur.run.session import Session, identity, prepare
from secateur.run.verifying import reopen


@dataclass
class Result:
    """What a run made.

    Attributes:
        model: the pruned model, ready to use (None when its weights were streamed to ``folder``).
        tokenizer: the tokenizer it came with, if any.
        masks: matrix name -> (d_out, d_in) bool, True where the weight is gone (read from
            ``folder`` one by one when the weights were streamed there).
        report: everything measured, as in ``report.json``.
        folder: where it lies on disk, if anywhere.
    """

    model: nn.Module | None
    tokenizer: Any
    masks: Mapping[str, Tensor]
    report: dict[str, Any]
    folder: Path | None = None


def execute(
    recipe: Recipe,
    *,
    out: Path | None = None,
    loaded: Loaded | None = None,
    calibration: Any = None,
    evidence: Path | None = None,
    fresh: bool = False,
    progress: Progress = SILENT,
    command: str = "",
) -> Result:
    """Run a recipe.

    Args:
        recipe: what to do.
        out: the run's folder; None keeps everything in memory.
        loaded: a model already in memory (it is pruned in place), instead of ``recipe.model``.
        calibration: token windows or texts already in memory, instead of the recipe's text.
        evidence: folder where dense evidence is kept for other runs.
        fresh: throw away what an earlier run left in ``out``.
        progress: where to report.
        command: how to run this again, for the report.

    Raises:
        SecateurError: whatever went wrong, naming field, value and fix. What was finished in
            ``out`` stays there and is taken up by the next run.
    """
    if recipe.pretraining is not None:
        from secateur.run.pretraining import pretrain_recipe

        return pretrain_recipe(
            recipe,
            out=out,
            loaded=loaded,
            text=calibration,
            fresh=fresh,
            progress=progress,
            command=command,
        )
    if issubclass(methods[recipe.method], StructuredMethod):
        from secateur.run.structured import execute_structured

        return cast(
            Result,
            execute_structured(
                recipe,
                out=out,
                loaded=loaded,
                calibration=calibration,
                fresh=fresh,
                progress=progress,
                command=command,
            ),
        )
    if recipe.structure != Structure():
        settings = recipe.structure.model_dump(exclude_defaults=True)
        raise UsageError(
            f"has no meaning for '{recipe.method}', which removes single weights",
            field="structure",
            value=settings,
            fix="leave it out, or take a method that removes whole units: slimgpt, llm-pruner, "
            "heads, unit-magnitude",
        )
    if out is not None:
        writable(out)
    elif recipe.stream:
        raise UsageError(
            "a streamed model is written as it is pruned", field="out", fix="--out DIR"
        )
    session = prepare(recipe, loaded, calibration, progress)
    if isinstance(session.method, MaskLLM):
        check_learned(session)
    recoverer = recoverer_of(session, owned=loaded is None)
    with ExitStack() as stack:
        folder = None
        if out is not None:
            rank = session.ranks.rank
            if rank == 0:
                folder = stack.enter_context(RunFolder(out, identity(session), fresh=fresh))
            session.ranks.barrier()
            folder = folder or RunFolder(out, {}, rank=rank)
            folder.save_recipe(recipe)
            folder.event("started", model=session.loaded.name, target=str(recipe.target))
        stack.enter_context(evaluating(session.loaded.model))
        plan = planned(session, folder, evidence)
        # The dense model is measured now; what is returned measures the pruned one later.
        quality = measure_quality(session, folder)
        recovered = folder is not None and folder.read(RECOVERED) is not None
        if recoverer is not None and not recovered:
            for cycle, earlier in enumerate(earlier_cycles(session)):
                cut = prune_blocks(earlier, make_plan(earlier))
                recover(session, recoverer, JoinedMasks(r.masks for r in cut), folder, cycle)
        learning = None
        if isinstance(session.method, MaskLLM):
            results, learning = learn(
                session, plan, folder, evidence, quality, prune_blocks, calibration
            )
        else:
            results = prune_blocks(session, plan, folder, evidence)
        masks: Mapping[str, Tensor] = JoinedMasks(result.masks for result in results)
        recovery = None
        if recoverer is not None:
            recovery = recover_and_compare(session, recoverer, masks, folder, quality)
        peak = peak_memory()
        if not session.ranks.leads:
            session.ranks.barrier()
            return Result(session.loaded.model, session.loaded.tokenizer, masks, {}, out)
        zeros = verify_zeros(session, plan, masks)
        reopened: dict[str, Any] | None = None
        if folder is not None:
            with session.timed("saving"):
                finish_checkpoint(session, folder)
                reopened = _proven(session, folder)
        report = assemble(
            session,
            plan,
            results,
            command=command,
            quality=quality(),
            size=measure_size(session, folder, masks),
            speed=measure_speed(session, owned=loaded is None),
            zeros=zeros,
            memory_peak=peak,
            reopened=reopened,
        )
        report["recovery"] = recovery
        report["learning"] = learning
        if folder is not None:
            publish(report, folder)
            folder.event("finished", delivered=report["totals"]["delivered"])
            folder.drop_state()
        session.ranks.barrier()
    model = None if session.loaded.streamed is not None else session.loaded.model
    return Result(model, session.loaded.tokenizer, masks, report, out)


def recover_and_compare(
    session: Session,
    recoverer: Recoverer,
    masks: Mapping[str, Tensor],
    folder: RunFolder | None,
    quality: Callable[[], dict[str, Any] | None],
) -> dict[str, Any]:
    """Recover the cut model; the record says what its quality was before."""
    name = "recovery-before.json"
    before = None if folder is None else folder.read(name)
    done = folder is not None and folder.read(RECOVERED) is not None
    if before is None and not done and session.ranks.leads:
        before = quality()
        if folder is not None and before is not None:
            folder.save(name, before)
    with session.timed("recovery"):
        record = recover(session, recoverer, masks, folder)
    return {**record, "before": before}


def planned(session: Session, folder: RunFolder | None, evidence: Path | None) -> Plan:
    """The plan this folder has already, or one made now and kept in it."""
    record = folder.read("plan.json") if folder is not None and session.ranks.leads else None
    if session.ranks.spread(0, record is not None):
        return session.ranks.spread(0, None if record is None else Plan.of_record(record))
    with session.timed("allocation"):
        plan = make_plan(session, evidence or (folder.inner / "evidence" if folder else None))
    if folder is not None:
        folder.save("plan.json", plan.record())
    return plan


def _proven(session: Session, folder: RunFolder) -> dict[str, Any]:
    """The folder re-opened and compared; one that does not hold must not look like a model."""
    try:
        reopened = reopen(session, folder)
    except BaseException:
        (folder.path / INDEX).unlink(missing_ok=True)
        raise
    folder.event("reopened", **reopened)
    return reopened


def prune_blocks(
    session: Session,
    plan: Plan,
    folder: RunFolder | None = None,
    evidence: Path | None = None,
) -> list[BlockResult]:
    """Every block in turn, from the last boundary on; results of finished blocks are read."""
    root = evidence or (folder.inner / "evidence" if folder else None)
    with session.timed("gradients"):
        gradients = gather_gradients(session, root)
    # Windows may have been drawn for the allocator alone.
    windows = session.calibration if session.needs else None
    replay = None if windows is None else session.replay(windows)
    engine = Engine(
        view=session.view,
        method=session.ranker,
        plan=plan,
        scope=session.scope,
        update=session.update,
        replay=replay,
        gradients=gradients,
        propagate=session.recipe.propagate,
        true_sequential=session.recipe.granularity == "true_sequential",
        store=dense_store(session, evidence),
        ranks=session.ranks,
        stored=session.loaded.stored if folder is not None else None,
        sequences=0 if windows is None else len(windows),
        reference=list(replay.hidden)
        if replay is not None and session.recipe.reconstruct == "dense"
        else None,
    )
    checkpoint = Checkpoint(engine, folder, resident=session.resident is None)
    results = checkpoint.restore()
    blocks = session.view.blocks
    with session.progress.stage("pruning", total=len(blocks), unit="blocks") as advance:
        advance(len(results))
        for block in blocks[len(results) :]:
            with session.present(block):
                result = engine.block(block)
                checkpoint.save(block, result)
            results.append(result)
            advance(1)
    if engine.store is not None and not engine.store.complete:
        engine.store.finish()
    for result in results:
        for account, seconds in result.seconds.items():
            session.timing[account] = session.timing.get(account, 0.0) + seconds
    return results


def dense_store(session: Session, root: Path | None) -> EvidenceStore | None:
    """Where the dense model's input moments are kept; None unless that is what is used.

    Full moments gathered for another method serve one that needs only their diagonal.
    """
    if root is None or session.calibration is None or session.recipe.propagate != "dense":
        return None
    key = {
        "model": session.loaded.fingerprint,
        "calibration": session.calibration.fingerprint,
        "dtype": str(next(session.loaded.model.parameters()).dtype),
        "matrices": sorted(session.shapes),
    }
    full = EvidenceStore(root, "gram", key)
    if Need.GRAM in session.needs or full.complete:
        return full
    return EvidenceStore(root, "inputs", key)


def peak_memory() -> int:
    """The most memory this process has held so far, bytes: on the GPU if it used one."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return int(torch.cuda.max_memory_allocated())
    unit = 1 if sys.platform == "darwin" else 1024  # Linux counts in KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
