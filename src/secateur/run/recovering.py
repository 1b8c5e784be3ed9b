"""``secateur recover``: training a model that was cut before, from its folder or its name."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur import __version__
from secateur.data.windows import Windows, evaluation_windows
from secateur.errors import SecateurError, UsageError
from secateur.evaluation.perplexity import fidelity, perplexity
from secateur.evaluation.size import memory_bytes, weight_bytes
from secateur.evaluation.speed import machine
from secateur.export.huggingface import reference_logits, verify_folder
from secateur.masks.store import FILE_NAME as MASKS
from secateur.masks.store import load_masks, save_masks
from secateur.masks.structured import structure_of
from secateur.models.anatomy import ModelView
from secateur.models.loading import Loaded, load
from secateur.models.names import CheckpointMap
from secateur.models.saving import block_state, outside_state, write_parts
from secateur.models.shards import INDEX, SafetensorsFolder, write_index
from secateur.models.state import evaluating, quiet
from secateur.models.structured_saving import save_words
from secateur.progress import SILENT, Progress
from secateur.recipe import Evaluation, Recovery
from secateur.run.folder import RunFolder, writable
from secateur.run.merging import Merger
from secateur.run.ranks import Ranks
from secateur.run.recovered import drop_checkpoints
from secateur.run.recovery import Recoverer, dense_again, dense_copy, restructure
from secateur.run.results import publish
from secateur.run.runner import Result, peak_memory
from secateur.run.structured_saving import reopen_structured
from secateur.run.verifying import PROBE, PROBE_TOKENS
from secateur.tensorfile import save_tensors
from secateur.training.masked import check_masks, masks_from_zeros

RECORD = "recovered.json"


def recover_model(
    source: str | Loaded,
    spec: Recovery,
    *,
    out: Path | None = None,
    masks: Mapping[str, Tensor] | Path | None = None,
    mask_from_zeros: bool = False,
    no_mask: bool = False,
    adapter: Path | None = None,
    dense: str | nn.Module | None = None,
    evaluation: Evaluation | None = None,
    text: Any = None,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    fresh: bool = False,
    progress: Progress = SILENT,
    command: str = "",
) -> Result:
    """Train a model that was cut before, keep its zeros, and say what that brought.

    Args:
        source: a run's folder (its masks are used), another model, or one in memory, which is
            then trained in place.
        out: the folder to write; None keeps everything in memory.
        masks: of the model, or their file; instead of the run's own.
        mask_from_zeros: what is zero now is what must stay zero.
        no_mask: nothing has to stay zero (a model cut structurally, or dense).
        adapter: folder of an adapter of PEFT's, which is merged instead of training anything.
        dense: the model it was cut from; of a run its recipe's model. Used for the comparison,
            and by recoveries that learn from it.
        evaluation: what quality is measured on; None measures none.
        text: windows or texts in memory to train on, instead of ``spec.text``.

    Raises:
        UsageError: no mask, or one that does not fit; see ``Recoverer.of``.
    """
    if spec.rounds > 1:
        raise UsageError(
            "rounds of pruning and retraining begin with the dense model",
            field="recovery.method" if spec.cycles is None else "recovery.cycles",
            value=spec.method if spec.cycles is None else spec.cycles,
            fix=f"secateur prune MODEL --recover {spec.method}; or --with full for retraining alone",
        )
    if out is not None:
        writable(out)
    ranks = Ranks.from_environment(device)
    loaded, view, run = _opened(source, device, dtype, trust_remote_code, progress)
    kept = _masks(view, run, masks, mask_from_zeros, no_mask)
    before = check_masks(view, kept)
    recoverer: Recoverer | Merger
    if adapter is not None:
        recoverer = Merger.of(adapter, loaded, view, kept)
    else:
        recoverer = Recoverer.of(
            spec, loaded, view, masked=before > 0, text=text, progress=progress
        )
        recoverer.keep = _kept_adapter(spec, out)
        recoverer.base = source if isinstance(source, str) else loaded.name
    named = dense is not None
    if dense is None and run is not None:
        dense = str(run.get("recipe", {}).get("model", "")) or None
    recoverer.teacher = _teacher(dense, loaded, trust_remote_code)
    if isinstance(recoverer, Recoverer) and recoverer.needs_teacher:
        recoverer.known_teacher()
    windows = _windows(evaluation, loaded)
    reference = None
    if ranks.leads and (windows is not None or recoverer.needs_teacher):
        # Opened before anything is written, and once.
        reference = _reference(recoverer, progress, needed=named or recoverer.needs_teacher)
    start = time.perf_counter()
    with ExitStack() as stack:
        folder = None
        if out is not None:
            mark = {
                "secateur": __version__,
                "recovers": loaded.fingerprint,
                "masked": before,
                "threads": torch.get_num_threads(),
                "ranks": ranks.world,
                **{f"recovery.{k}": v for k, v in spec.model_dump(mode="json").items()},
                **({"adapter": recoverer.identity} if isinstance(recoverer, Merger) else {}),
            }
            if ranks.leads:
                folder = stack.enter_context(RunFolder(out, mark, fresh=fresh))
            ranks.barrier()
            folder = folder or RunFolder(out, {}, rank=ranks.rank)
        stack.enter_context(evaluating(loaded.model))
        quality = _quality(view, windows, reference, progress) if ranks.leads else None
        record = _recovered(recoverer, view, kept, folder, ranks)
        record["before"] = quality
        if not ranks.leads:
            ranks.barrier()
            return Result(loaded.model, loaded.tokenizer, kept, {}, out)
        report = _report(
            run, loaded, view, record,
            quality=_quality(view, windows, reference, progress), command=command,
        )  # fmt: skip
        report["timing"] = {
            "recovery": record["seconds"],
            "total": round(time.perf_counter() - start, 3),
        }
        if folder is not None:
            report["reopened"] = save_recovered(loaded, view, kept, folder, windows)
            report["size"] = _sizes(loaded, folder.path)
            publish(report, folder)
            folder.event("finished", share=record["share"])
            drop_checkpoints(folder.inner / "recovery")
        ranks.barrier()
    return Result(loaded.model, loaded.tokenizer, kept, report, out)


def save_recovered(
    loaded: Loaded,
    view: ModelView,
    masks: Mapping[str, Tensor],
    folder: RunFolder,
    windows: Windows | None = None,
) -> dict[str, Any]:
    """Write the model as an ordinary checkpoint with its masks, open it again and compare."""
    path = folder.path
    parts = {f"model-block-{b.index:05d}.safetensors": block_state(view, b) for b in view.blocks}
    parts["model-outside.safetensors"] = outside_state(view)
    places, size = write_parts(path, parts, loaded.stored)
    transposed = [m.name for m in view.matrices() if m.transposed and m.name in masks]
    save_masks(path / MASKS, masks, {"transposed": transposed} if transposed else {})
    save_words(path, loaded.model, loaded.tokenizer, {"recovered": True}, loaded.stored)
    write_index(path, places, size)
    ids = (
        windows.ids[:1, :PROBE_TOKENS].contiguous()
        if windows is not None
        else (torch.arange(PROBE_TOKENS) * 7 % loaded.vocabulary)[None]
    )
    logits = reference_logits(loaded.model, ids)
    kind = next(loaded.model.parameters()).dtype
    words = {"dtype": str(kind).removeprefix("torch."), "device": loaded.device.type}
    save_tensors(folder.inner / PROBE, {"ids": ids, "logits": logits}, words)
    try:
        if structure_of(loaded.model) is not None:
            return reopen_structured(path, ids, logits, kind, loaded.device)
        with quiet():
            return {
                "loaded": True,
                **verify_folder(path, ids, logits, dtype=kind, device=loaded.device),
            }
    except BaseException:
        (path / INDEX).unlink(missing_ok=True)  # what does not hold must not look like a model
        raise


# -- what it starts from ----------------------------------------------------------------------


def _opened(
    source: str | Loaded, device: str, dtype: str, trust_remote_code: bool, progress: Progress
) -> tuple[Loaded, ModelView, dict[str, Any] | None]:
    """The model, as the pruner sees it, and the record of the run it comes from, if any."""
    if isinstance(source, Loaded):
        return source, ModelView.of(source.model), None
    with progress.stage(f"loading {source}", total=1) as advance:
        loaded = load(source, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
        advance(1)
    run = None
    if (Path(source) / "secateur" / "run.json").exists():
        from secateur.run.results import read_result

        run = read_result(Path(source))
    recipe = (run or {}).get("recipe") or {}
    view = ModelView.of(
        loaded.model, recipe.get("blocks"), recipe.get("include") or (), recipe.get("exclude") or ()
    )
    return loaded, view, run


def _masks(
    view: ModelView,
    run: dict[str, Any] | None,
    masks: Mapping[str, Tensor] | Path | None,
    mask_from_zeros: bool,
    no_mask: bool,
) -> dict[str, Tensor]:
    """The masks asked for, in memory; exactly one source of them."""
    told = [masks is not None, mask_from_zeros, no_mask]
    if sum(told) > 1:
        raise UsageError(
            "give masks, or take them from zeros, or say there are none: one of the three",
            field="masks",
            value=str(masks) if masks is not None else None,
        )
    if no_mask:
        return {}
    if mask_from_zeros:
        return masks_from_zeros(view)
    if isinstance(masks, Path):
        return dict(load_masks(masks))
    if masks is not None:
        return {name: masks[name] for name in masks}
    if structure_of(view.model) is not None:
        return {}  # units are gone for good, so nothing has to be kept at zero
    place = None if run is None else Path(str(run["folder"]))
    if place is not None and (place / MASKS).exists():
        return dict(load_masks(place))
    raise UsageError(
        "the model comes without masks, so nothing says which zeros must stay",
        field="masks",
        value=None,
        fix="--masks FILE; or --mask-from-zeros if every zero is meant; "
        "or --no-mask if nothing has to stay zero (after structured cuts)",
    )


def _teacher(dense: str | nn.Module | None, loaded: Loaded, trust_remote_code: bool) -> Any:
    if dense is None or dense == "given":
        return None
    if isinstance(dense, nn.Module):
        return dense_copy(dense)
    return dense_again(dense, loaded, trust_remote_code)


# -- measuring --------------------------------------------------------------------------------


def _windows(evaluation: Evaluation | None, loaded: Loaded) -> Windows | None:
    if evaluation is None:
        return None
    if loaded.tokenizer is None:
        raise UsageError("measuring quality needs a tokenizer", field="tokenizer", value=None)
    return evaluation_windows(
        evaluation.text,
        loaded.tokenizer,
        loaded.window(evaluation.length, "evaluation.length"),
        limit=evaluation.windows,
        vocabulary=loaded.vocabulary,
    )


def _kept_adapter(spec: Recovery, out: Path | None) -> Path | None:
    """Where the unmerged adapter goes."""
    if spec.keep_adapter and out is None:
        raise UsageError(
            "an adapter is kept in a folder",
            field="recovery.keep_adapter",
            value=True,
            fix="give the folder: out",
        )
    return out / "adapter" if out is not None and spec.keep_adapter else None


def _reference(recoverer: Recoverer | Merger, progress: Progress, *, needed: bool) -> Any:
    """The dense model to compare with; None when it is not known or, unless ``needed``, not there."""
    if recoverer.teacher is None:
        return None
    try:
        model = recoverer.teacher()
    except SecateurError as error:
        if needed:
            raise
        progress.note(f"no comparison with the dense model: {error.message}")
        return None
    recoverer.teacher = lambda: model  # it need not be loaded twice
    return model


def _quality(
    view: ModelView, windows: Windows | None, reference: Any, progress: Progress
) -> dict[str, Any] | None:
    if windows is None:
        return None
    if reference is not None:
        return fidelity(_logits(reference), _logits(view.model), windows, progress)
    measured = perplexity(_logits(view.model), windows, progress)
    return {
        "dense": None,
        "pruned": measured.record(),
        "kl": None,
        "top1_agreement": None,
        "protocol": measured.protocol.record(),
    }


def _logits(model: Any) -> Any:
    @torch.no_grad()
    def logits(ids: Tensor) -> Tensor:
        device = next(model.parameters()).device
        out: Tensor = model(input_ids=ids.to(device), use_cache=False).logits
        return out

    return logits


# -- the training, once -----------------------------------------------------------------------


def _recovered(
    recoverer: Recoverer | Merger,
    view: ModelView,
    masks: Mapping[str, Tensor],
    folder: RunFolder | None,
    ranks: Ranks,
) -> dict[str, Any]:
    """Train, or take what an earlier attempt has written already."""
    found: dict[str, Any] | None = None if folder is None else folder.read(RECORD)
    if folder is not None and found is not None and (folder.path / INDEX).exists():
        restructure(view, found["structure"])
        _take(view.model, folder.path)
        return found
    structure = recoverer.structure()
    where = None if folder is None else folder.inner / "recovery"
    record = {**recoverer.recover(masks, where), "structure": structure}
    if folder is not None and ranks.leads:
        folder.save(RECORD, record)
    ranks.barrier()
    return record


@torch.no_grad()
def _take(model: nn.Module, path: Path) -> None:
    stored = CheckpointMap(model, SafetensorsFolder(path))
    for name, parameter in model.named_parameters():
        parameter.copy_(stored.read([name])[name].to(parameter))


def _report(
    run: dict[str, Any] | None,
    loaded: Loaded,
    view: ModelView,
    record: dict[str, Any],
    *,
    quality: dict[str, Any] | None,
    command: str,
) -> dict[str, Any]:
    """The run's record brought up to date, or one of what is known of another model."""
    elements = sum(m.shape[0] * m.shape[1] for m in view.matrices())
    share = record["zeros"] / max(1, elements)
    base: dict[str, Any] = run or {
        "recipe": {},
        "model": {"name": loaded.name, "fingerprint": loaded.fingerprint, "notes": loaded.notes},
        "modules": [],
        "blocks": [],
        "totals": {
            "asked": share,
            "delivered": share,
            "zeros": record["zeros"],
            "elements": elements,
            "pattern": None,
        },
        "notes": list(loaded.notes),
    }
    parameters = sum(p.numel() for p in view.model.parameters())
    return {
        **base,
        "secateur": __version__,
        "command": command,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": {**base["model"], "parameters": parameters},
        "quality": quality,
        "recovery": record,
        "speed": None,
        "memory_peak": peak_memory(),
        "machine": machine(loaded.device),
        "verified": True,
    }


def _sizes(loaded: Loaded, path: Path) -> dict[str, Any]:
    written = weight_bytes(path)
    before = written if loaded.folder is None else weight_bytes(loaded.folder)
    held = memory_bytes(loaded.model)
    return {
        "disk": {"dense": before, "pruned": written},
        "memory": {"dense": held, "pruned": held},
    }
