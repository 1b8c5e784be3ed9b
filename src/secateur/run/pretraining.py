"""``secateur pretrain``: train a model on while it shrinks to a budget, save it, and say what came of it.

The training keeps its own checkpoint in the run's folder (weights in their present shapes,
optimizer, what is gone, accumulators): killed at any moment, the same command goes on with the
losses it would have had.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur.data.batches import Batch
from secateur.data.windows import Windows, evaluation_windows
from secateur.errors import UsageError
from secateur.evaluation.perplexity import perplexity
from secateur.export.huggingface import reference_logits
from secateur.export.loading import load_pruned
from secateur.masks.structured import StructuredMask, remember, structure_of
from secateur.models.anatomy import ModelView
from secateur.models.loading import Loaded, load
from secateur.models.saving import block_state, outside_state, write_parts
from secateur.models.shards import INDEX, write_index
from secateur.models.state import evaluating, quiet
from secateur.models.structured_saving import Form, form_of, save_words
from secateur.models.surgery import keep_original_config
from secateur.models.units import Group
from secateur.progress import SILENT, Progress
from secateur.recipe import Evaluation, Recipe
from secateur.recipe_parts import Pretraining
from secateur.run.folder import RunFolder, writable
from secateur.run.pretraining_results import Before, assemble_pretraining
from secateur.run.pretraining_setup import (
    data_of,
    identity_of,
    in_memory,
    options_of,
    relevant,
    settings_of,
)
from secateur.run.ranks import Ranks
from secateur.run.recovered import drop_checkpoints
from secateur.run.recovery import round_to_stored
from secateur.run.results import publish, read_result
from secateur.run.runner import Result, peak_memory
from secateur.run.structured_saving import reopen_structured
from secateur.run.verifying import PROBE, PROBE_TOKENS
from secateur.tensorfile import save_tensors
from secateur.training.distil import distillation_loss
from secateur.training.efficientllm import PruningAware
from secateur.training.loop import Loss, fit, next_token_loss
from secateur.training.perp import recomputing
from secateur.training.settings import TrainSettings


def pretrain_model(
    source: str | Loaded,
    spec: Pretraining,
    *,
    out: Path | None = None,
    evaluation: Evaluation | None = None,
    text: Any = None,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    fresh: bool = False,
    progress: Progress = SILENT,
    command: str = "",
) -> Result:
    """Train a model on while the least salient units go, until it meets its budget and beyond.

    Args:
        source: hub id, folder, or a model in memory, which is then trained and cut in place.
        out: the run's folder; None keeps everything in memory.
        evaluation: held-out text to measure on before and after, and to look at on the way;
            None measures nothing.
        text: windows, documents or a stream in memory, instead of ``spec.text``.
        dtype: of the weights while they train; ``auto`` is float32 (a model in memory keeps its
            own), and they are written in the checkpoint's own type.

    Raises:
        UsageError: a budget that cannot be reached, another run in the folder, data that runs
            out (what was trained is kept). NumericsError: the loss or a gradient is not finite.
    """
    if out is not None:
        writable(out)
    text = in_memory(text)
    ranks = Ranks.from_environment(device)
    loaded = _opened(source, device, dtype, trust_remote_code, progress)
    model = loaded.model
    keep_original_config(model)
    length = loaded.window(spec.length, "pretraining.length")
    settings = settings_of(spec, length)
    hook = PruningAware(options_of(spec, settings, length, model))
    hook.prepare(model)
    windows = _windows(evaluation, loaded)
    start = time.perf_counter()
    with ExitStack() as stack:
        folder = None
        if out is not None:
            mark = identity_of(
                loaded, spec, ranks, evaluation=evaluation, windows=windows, text=text
            )
            if ranks.leads:
                folder = stack.enter_context(RunFolder(out, mark, fresh=fresh))
            ranks.barrier()
            folder = folder or RunFolder(out, {}, rank=ranks.rank)
            found = _finished(folder, loaded, dtype)
            if found is not None:
                return found
            folder.event("started", model=loaded.name, budget=hook.options.budget)
        data = data_of(spec, loaded, length, settings, text, folder, progress)
        before = _before(model, windows, folder, ranks, hook.groups, length, progress)
        teacher = deepcopy(model) if spec.distil else None
        loss: Loss = next_token_loss
        if teacher is not None:
            loss = distillation_loss(teacher, spec.distil, spec.temperature)
        with _training(model, spec.checkpointing):
            fitted = fit(
                model,
                data,
                settings,
                loss=loss,
                hooks=[hook],
                validate=None if windows is None else lambda: _loss(model, windows, settings),
                folder=None if folder is None else folder.inner / "training",
                fresh=fresh,
                identity=relevant(spec),
                progress=progress,
                label="pretraining",
            )
        model.eval()
        if not ranks.leads:
            ranks.barrier()
            return Result(model, loaded.tokenizer, {}, {}, out)
        if structure_of(model) is None:  # a budget of everything: the manifest says so
            remember(model, StructuredMask())
        round_to_stored(model, loaded.stored)
        form, reopened = form_of(model), None
        if folder is not None:
            reopened = _saved(loaded, folder, form, windows, hook)
        after = None if windows is None else _perplexity(model, windows, progress)
        report = assemble_pretraining(
            loaded,
            spec,
            evaluation,
            hook,
            fitted,
            data_record=getattr(data, "record", {}),
            length=length,
            before=before,
            quality=after,
            form=form,
            folder=folder,
            reopened=reopened,
            command=command,
            seconds=time.perf_counter() - start,
            memory_peak=peak_memory(),
        )
        if folder is not None:
            publish(report, folder)
            folder.event("finished", parameters=report["structure"]["parameters"]["after"])
            drop_checkpoints(folder.inner / "training")
        ranks.barrier()
    return Result(model, loaded.tokenizer, {}, report, out)


def pretrain_recipe(
    recipe: Recipe,
    *,
    out: Path | None,
    loaded: Loaded | None,
    text: Any,
    fresh: bool,
    progress: Progress,
    command: str,
) -> Result:
    """Run a recipe that has a ``pretraining``; whatever else it says of pruning is refused."""
    assert recipe.pretraining is not None
    used = {"model", "pretraining", "evaluation", "device", "dtype", "trust_remote_code"}
    for name in sorted(recipe.model_fields_set - used):
        if getattr(recipe, name) != type(recipe).model_fields[name].get_default():
            raise UsageError(
                "has no meaning beside 'pretraining', which finds its own shape",
                field=name,
                value=getattr(recipe, name),
                fix=f"leave {name} out; what may be set is under 'pretraining'",
            )
    return pretrain_model(
        loaded or recipe.model,
        recipe.pretraining,
        out=out,
        evaluation=recipe.evaluation,
        text=text,
        device=recipe.device,
        dtype=recipe.dtype,
        trust_remote_code=recipe.trust_remote_code,
        fresh=fresh,
        progress=progress,
        command=command,
    )


# -- what it starts from -----------------------------------------------------------------------


def _opened(
    source: str | Loaded, device: str, dtype: str, trust_remote_code: bool, progress: Progress
) -> Loaded:
    if isinstance(source, Loaded):
        return source
    with progress.stage(f"loading {source}", total=1) as advance:
        loaded = load(source, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
        advance(1)
    held = next(loaded.model.parameters()).dtype
    if dtype == "auto" and held != torch.float32:  # a GPU's default; updates need more digits
        loaded.model.float()
        loaded.stored = held
    return loaded


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


@contextmanager
def _training(model: nn.Module, checkpointing: bool) -> Iterator[None]:
    """Every parameter trains, without dropout; flags are put back afterwards."""
    if checkpointing and not hasattr(model, "gradient_checkpointing_enable"):
        raise UsageError(
            "this model cannot compute activations again",
            field="pretraining.checkpointing",
            value=True,
        )
    wanted = {id(p): p.requires_grad for p in model.parameters()}
    modes = {m: m.training for m in model.modules()}
    model.requires_grad_(True)
    model.eval()
    try:
        with recomputing(model) if checkpointing else nullcontext():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for parameter in model.parameters():
            parameter.requires_grad_(wanted.get(id(parameter), True))


# -- measuring ---------------------------------------------------------------------------------


@torch.no_grad()
def _loss(model: nn.Module, windows: Windows, settings: TrainSettings) -> float:
    """Mean loss over the held-out windows; training goes on afterwards as if not interrupted."""
    device = next(model.parameters()).device
    mode, total = model.training, 0.0
    model.eval()
    try:
        for ids, _ in windows.batches(settings.batch * windows.length):
            total += float(next_token_loss(model, Batch(ids.to(device)))) * len(ids)
    finally:
        model.train(mode)
    return total / len(windows)


def _perplexity(model: Any, windows: Windows, progress: Progress) -> dict[str, Any]:
    def logits(ids: torch.Tensor) -> torch.Tensor:
        device = next(model.parameters()).device
        out: torch.Tensor = model(input_ids=ids.to(device), use_cache=False).logits
        return out

    with evaluating(model), torch.no_grad():
        measured = perplexity(logits, windows, progress)
    return {**measured.record(), "protocol": measured.protocol.record()}


def _before(
    model: Any,
    windows: Windows | None,
    folder: RunFolder | None,
    ranks: Ranks,
    groups: list[Group],
    length: int,
    progress: Progress,
) -> Before:
    """What the dense model is; measured once, also if the run is taken up again."""
    quality = None
    if windows is not None and ranks.leads:
        quality = None if folder is None else folder.read("dense.json")
        if quality is None:
            quality = _perplexity(model, windows, progress)
            if folder is not None:
                folder.save("dense.json", quality)
    ranks.barrier()
    return Before.of(model, groups, length, quality)


# -- what it ends with -------------------------------------------------------------------------


def _finished(folder: RunFolder, loaded: Loaded, dtype: str) -> Result | None:
    """The result that lies in the folder already."""
    if folder.read("result.json") is None or not (folder.path / INDEX).exists():
        return None
    kind = next(loaded.model.parameters()).dtype
    with quiet():
        model = load_pruned(folder.path, dtype=kind).to(loaded.device)
    report = read_result(folder.path)
    return Result(model, loaded.tokenizer, {}, report, folder.path)


def _saved(
    loaded: Loaded,
    folder: RunFolder,
    form: Form,
    windows: Windows | None,
    hook: PruningAware,
) -> dict[str, Any]:
    """Written, opened again and compared; the index, which makes it a model, is last."""
    path, model = folder.path, loaded.model
    view = ModelView.of(model)
    parts = {f"model-block-{b.index:05d}.safetensors": block_state(view, b) for b in view.blocks}
    parts["model-outside.safetensors"] = outside_state(view)
    places, size = write_parts(path, parts, loaded.stored)
    facts = {"method": "efficientllm", "parameters": hook.parameters}
    save_words(path, model, loaded.tokenizer, facts, loaded.stored, form)
    write_index(path, places, size)
    ids = (
        windows.ids[:1, :PROBE_TOKENS].contiguous()
        if windows is not None
        else (torch.arange(PROBE_TOKENS) * 7 % loaded.vocabulary)[None]
    )
    with evaluating(model):
        logits = reference_logits(model, ids)
    kind = next(model.parameters()).dtype
    words = {"dtype": str(kind).removeprefix("torch."), "device": loaded.device.type}
    save_tensors(folder.inner / PROBE, {"ids": ids, "logits": logits}, words)
    try:
        return reopen_structured(path, ids, logits, kind, loaded.device)
    except BaseException:
        (path / INDEX).unlink(missing_ok=True)  # what does not hold must not look like a model
        raise
