"""A run on a vision network: load, train, cut, tune with the cut kept, save, re-open, report.

In a folder every stage leaves what the next needs, so the same command run again goes on where a
killed one stopped. The folder, its lock and its record are those of every other run.
"""

from __future__ import annotations

from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.data.batches import ImageBatch
from secateur.errors import UsageError, VerificationError
from secateur.evaluation.accuracy import Accuracy, accuracy
from secateur.masks.structured import StructuredMask
from secateur.methods.vision_base import VisionJob, VisionOutcome
from secateur.models.vision.loading import MANIFEST, VisionModel
from secateur.models.vision.outputs import logits_of
from secateur.models.vision.saving import reopen_vision, save_vision
from secateur.progress import SILENT, Progress
from secateur.recipe_vision import VisionRecipe
from secateur.run.folder import RunFolder, writable
from secateur.run.ranks import Ranks
from secateur.run.runner import peak_memory
from secateur.run.vision_results import assemble_vision, publish_vision
from secateur.run.vision_session import VisionSession, prepare_vision, vision_identity
from secateur.run.vision_stages import (
    DENSE,
    load_outcome,
    load_state,
    probe,
    save_outcome,
    save_state,
)
from secateur.tensorfile import save_tensors
from secateur.training.distil import logit_kl
from secateur.training.hooks import Loss, classification_loss
from secateur.training.images import check_zeros, fit_images, recalibrate_images

PROBE = "probe.safetensors"


@dataclass
class VisionResult:
    """What a vision run made.

    Attributes:
        model: the pruned network.
        structure: channels that are gone, in the original network's numbers.
        masks: parameter name -> bool, single weights that are gone.
        report: everything measured, as in ``report.json``.
        folder: where it lies on disk, if anywhere.
        loaded: the network with what is known of it.
    """

    model: nn.Module
    structure: StructuredMask
    masks: dict[str, Tensor]
    report: dict[str, Any]
    folder: Path | None
    loaded: VisionModel


def execute_vision(
    recipe: VisionRecipe,
    *,
    out: Path | None = None,
    model: nn.Module | VisionModel | None = None,
    images: Any = None,
    tests: Any = None,
    fresh: bool = False,
    progress: Progress = SILENT,
    command: str = "",
) -> VisionResult:
    """Run a recipe on a vision network, on one process or those of ``torchrun``.

    Several processes share the images of every training step; the first one alone prunes where the
    method does not train, measures, and writes. The others' report is empty.

    Args:
        out: the run's folder; None keeps everything in memory.
        model: a network in memory (pruned in place), instead of ``recipe.model``.
        images: training images in memory, instead of ``recipe.images``.
        tests: what accuracy is measured on, instead of the recipe's; without it, images in memory
            that are no name are measured on themselves.
        fresh: throw away what an earlier run left in ``out``.
        progress: where to report. command: how to run this again, for the report.

    Raises:
        SecateurError: naming field, value and fix. What was finished in ``out`` stays there.
    """
    if out is not None:
        writable(out)
    ranks = Ranks.from_environment(recipe.device)
    if ranks.world > 1 and out is None:
        raise UsageError(
            "several processes hand their work on in a folder",
            field="out",
            value=None,
            fix="out=DIR",
        )
    session = prepare_vision(recipe, model, images, tests, progress)
    for tensor in session.model.state_dict().values():
        ranks.spread_tensor(0, tensor)  # a network in memory may have been made anew on each
    session.leads = ranks.leads
    job = _job(session, out)
    session.method.check_job(job)
    with ExitStack() as stack:
        folder = None
        if out is not None:
            if ranks.leads:
                folder = stack.enter_context(RunFolder(out, vision_identity(session), fresh=fresh))
            ranks.barrier()
            folder = folder or RunFolder(out, {}, rank=ranks.rank)
            folder.save_recipe(recipe)
            folder.event("started", model=session.loaded.name, target=recipe.target)
        pretraining = _pretrain(session, folder)
        dense = deepcopy(session.model)
        measured: dict[str, Accuracy | None] = {"dense": _measured(session)}
        with session.timed("pruning"):
            outcome = _cut(session, job, folder, ranks)
        check_zeros(session.model, outcome.masks)
        if not outcome.trained:
            measured["cut"] = _measured(session)
        with session.timed("recalibration"):
            if recipe.recalibrate and not outcome.trained:
                norms = recalibrate_images(session.model, session.train, batches=recipe.recalibrate)
                measured["recalibrated"] = _measured(session) if norms else None
        training = _tune(session, folder, outcome, dense)
        if not ranks.leads:
            ranks.barrier()
            return _result(session, outcome, {}, out)
        measured["pruned"] = _measured(session)
        peak = peak_memory()
        reopened = None
        if folder is not None:
            with session.timed("saving"):
                reopened = _saved(session, folder, outcome)
        report = assemble_vision(
            session,
            outcome,
            dense,
            measured,
            command=command,
            folder=folder,
            memory_peak=peak,
            reopened=reopened,
            training=training,
            pretraining=pretraining,
        )
        if folder is not None:
            publish_vision(report, folder)
            folder.event("finished", delivered=report["totals"]["delivered"])
        ranks.barrier()
    return _result(session, outcome, report, out)


def _result(
    session: VisionSession, outcome: VisionOutcome, report: dict[str, Any], out: Path | None
) -> VisionResult:
    loaded = session.loaded
    loaded.masks = outcome.masks
    return VisionResult(loaded.model, outcome.structure, outcome.masks, report, out, loaded)


def _measured(session: VisionSession) -> Accuracy | None:
    """Accuracy of the network as it is; None where nothing is measured."""
    if session.test is None or session.recipe.evaluation is None or not session.leads:
        return None
    with session.timed("evaluation"), session.progress.stage("evaluating"):
        return accuracy(session.model, session.test, session.recipe.evaluation.batch)


def _pretrain(session: VisionSession, folder: RunFolder | None) -> dict[str, Any] | None:
    """Train the dense network, or take up one that was trained in this folder."""
    spec = session.recipe.pretraining
    if spec is None:
        return None
    record: dict[str, Any] | None = None if folder is None else folder.read("dense.json")
    if folder is not None and record is not None:
        load_state(folder, DENSE, session.model)
        return record
    with session.timed("pretraining"):
        fitted = fit_images(
            session.model,
            session.changed(spec),
            session.settings(spec),
            folder=None if folder is None else folder.inner / "pretraining",
            progress=session.progress,
            label="training the dense network",
        )
    if folder is not None:
        save_state(folder, DENSE, session.model)
        folder.save("dense.json", fitted.record())
    return fitted.record()


def _job(session: VisionSession, out: Path | None) -> VisionJob:
    """What the method gets."""
    recipe, structure = session.recipe, session.recipe.structure
    spec = recipe.training
    return VisionJob(
        model=session.model,
        groups=session.groups,
        target=session.target,
        images=session.train if spec is None else session.changed(spec),
        settings=None if spec is None else session.settings(spec),
        batch=recipe.evaluation.batch if recipe.evaluation else 64,
        seed=recipe.seed,
        at_least=structure.at_least,
        round_to=structure.round_to,
        ranking=structure.ranking,
        folder=None if out is None else out / "secateur" / "method",
        progress=session.progress,
        notes=session.notes,
        example=session.example,
    )


def _cut(
    session: VisionSession, job: VisionJob, folder: RunFolder | None, ranks: Ranks
) -> VisionOutcome:
    """Let the method do its work, once for a folder; one that does not train, on one process."""
    if folder is not None and not ranks.leads and not session.method.trains:
        ranks.barrier()
        made = load_outcome(folder, session)
        assert made is not None, "the first process has written it"
        return made
    if folder is not None:
        done = load_outcome(folder, session)
        if done is not None:
            folder.event("resumed", stage="cut")
            if not session.method.trains:
                ranks.barrier()
            return done
    outcome = session.method.prune(job)
    session.model.eval()
    if folder is not None:
        save_outcome(folder, session.model, outcome)
    if not session.method.trains:
        ranks.barrier()
    return outcome


def _tune(
    session: VisionSession, folder: RunFolder | None, outcome: VisionOutcome, dense: nn.Module
) -> dict[str, Any] | None:
    """Train what is left, with what is gone kept at zero."""
    spec = session.recipe.training
    if spec is None or outcome.trained:
        return None
    loss: Loss = classification_loss
    if spec.distil:
        loss = distilled(dense, spec.distil, spec.temperature)
    with session.timed("training"):
        fitted = fit_images(
            session.model,
            session.changed(spec),
            session.settings(spec),
            masks=outcome.masks,
            loss=loss,
            folder=None if folder is None else folder.inner / "training",
            progress=session.progress,
            label="tuning",
        )
    return fitted.record()


def distilled(dense: nn.Module, weight: float, temperature: float) -> Loss:
    """``weight`` of the divergence from ``dense`` and ``1 - weight`` of the labels' cross-entropy."""
    dense.eval().requires_grad_(False)

    def loss(model: nn.Module, batch: ImageBatch) -> Tensor:
        logits = logits_of(model(batch.pixels))
        with torch.no_grad():
            wanted = logits_of(dense(batch.pixels))
        divergence = logit_kl(logits, wanted, temperature).mean()
        return weight * divergence + (1 - weight) * F.cross_entropy(logits.float(), batch.labels)

    return loss


def _saved(session: VisionSession, folder: RunFolder, outcome: VisionOutcome) -> dict[str, Any]:
    """Written, opened again and compared; a folder that does not hold must not look like a model."""
    pixels, logits = probe(session)
    session.model.to("cpu")
    facts = {"unknown": session.recipe.structure.unknown, "method": session.recipe.method}
    save_vision(session.loaded, folder.path, masks=outcome.masks, facts=facts)
    save_tensors(folder.inner / PROBE, {"pixels": pixels, "logits": logits})
    session.model.to(session.device)
    if session.loaded.source is None:
        return {"loaded": False, "why": "only its maker can build this network"}
    try:
        found = reopen_vision(folder.path, pixels, logits)
    except (VerificationError, UsageError):
        (folder.path / MANIFEST).unlink(missing_ok=True)
        raise
    folder.event("reopened", **found)
    return found
