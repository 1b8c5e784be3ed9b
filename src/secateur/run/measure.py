"""What a run measures: quality before and after, bytes, and speed on this machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from secateur.errors import SecateurError
from secateur.evaluation.perplexity import fidelity
from secateur.evaluation.size import memory_bytes, predicted_bytes, weight_bytes
from secateur.models.anatomy import ModelView
from secateur.models.loading import load
from secateur.models.streaming import StreamedModel
from secateur.run.folder import RunFolder
from secateur.run.session import Session


def measure_quality(
    session: Session, folder: RunFolder | None
) -> Callable[[], dict[str, Any] | None]:
    """Measure the dense model now; the returned function measures the pruned one and compares."""
    windows = session.evaluation
    if windows is None or not session.ranks.leads:
        return lambda: None
    with session.timed("evaluation"):
        dense = session.states(windows)
        path = None if folder is None else folder.inner / "state" / "dense.safetensors"
        if path is None or not dense.load(path):
            dense.compute(session.progress, "dense model, evaluating")
            if path is not None:
                dense.save(path)
        if session.recipe.recovery is not None:
            dense.remember_outside()

    def finish() -> dict[str, Any]:
        with session.timed("evaluation"):
            after = session if session.resident is None else _reopened(session, folder)
            pruned = after.states(windows).compute(session.progress, "pruned model, evaluating")
            return fidelity(dense.logits, pruned.logits, windows, session.progress)

    return finish


def _reopened(session: Session, folder: RunFolder | None) -> Session:
    """A streamed model's session over the weights that now lie in the run's folder."""
    assert folder is not None
    dtype = next(session.loaded.model.parameters()).dtype
    streamed = StreamedModel.open(
        folder.path,
        None,
        dtype,
        session.device,
        session.recipe.trust_remote_code,
        session.recipe.blocks,
    )
    view = ModelView.of(streamed.model, session.recipe.blocks)
    return replace(session, view=view, resident=streamed.resident)


def measure_size(
    session: Session, folder: RunFolder | None, masks: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Bytes on disk and in memory, dense against pruned, and what the bitmask export would take."""
    model = session.loaded.model
    memory = memory_bytes(model)
    pruned = memory if folder is None else weight_bytes(folder.path)
    source = session.loaded.folder
    dense = memory if source is None else weight_bytes(source)
    return {
        "disk": {
            "dense": dense,
            "pruned": pruned,
            **_as_stored(predicted_bytes(model, masks, session.recipe.target), session),
        },
        "memory": {"dense": memory, "pruned": memory},
        "note": "an unstructured mask saves no memory in a dense tensor; the bitmask container does",
    }


def _as_stored(predicted: dict[str, int | None], session: Session) -> dict[str, int | None]:
    """Sparse sizes foretold in the type computed in, brought to the type written."""
    stored = session.loaded.stored
    if stored is None:
        return predicted
    shrink = stored.itemsize / next(session.loaded.model.parameters()).element_size()
    bits = sum(rows * columns for rows, columns in session.shapes.values()) // 8
    return {
        kind: None if size is None else round((size - bits) * shrink + bits)
        for kind, size in predicted.items()
    }


def measure_speed(session: Session, *, owned: bool) -> dict[str, Any] | None:
    """Tokens per second of the dense and the pruned model, alternating; None when not asked."""

    def compare(dense: Any, pruned: Any, ids: Tensor, seconds: float) -> dict[str, Any]:
        from secateur.evaluation.speed import compare_speed

        return compare_speed(dense, pruned, ids, seconds=seconds, target=session.recipe.target)

    return beside_dense(session, compare, owned=owned)


def beside_dense(
    session: Session,
    compare: Callable[[Any, Any, Tensor, float], dict[str, Any]],
    *,
    owned: bool,
) -> dict[str, Any] | None:
    """``compare(dense, pruned, ids, seconds)``, if the recipe asks for speed and it can be had.

    The dense model is loaded again, so this is left out (and said) when the weights were
    streamed or when the model came from the caller.
    """
    evaluation = session.recipe.evaluation
    if evaluation is None or not evaluation.speed or session.evaluation is None:
        return None
    if session.loaded.streamed is not None or not owned:
        session.notes.append(
            "speed was not measured: it needs the dense model beside the pruned one in memory"
        )
        return None
    recipe = session.recipe
    with session.timed("speed"):
        try:
            dense = load(
                recipe.model,
                dtype=recipe.dtype,
                device=recipe.device,
                tokenizer=False,
                trust_remote_code=recipe.trust_remote_code,
            )
            with session.progress.stage("measuring speed"):
                return compare(
                    dense.model,
                    session.loaded.model,
                    session.evaluation.ids[:1],
                    evaluation.speed_seconds,
                )
        except (SecateurError, MemoryError, torch.OutOfMemoryError) as error:
            session.notes.append(f"speed was not measured: {error}")
            return None
