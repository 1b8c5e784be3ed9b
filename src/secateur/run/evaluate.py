"""Measure a model that lies on disk: perplexity, agreement with a dense one, choices, speed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.data.windows import evaluation_windows
from secateur.errors import UsageError
from secateur.export.bitmask import FILE_NAME as CONTAINER
from secateur.export.loading import load_pruned
from secateur.methods.base import one_of
from secateur.models.loading import DTYPES, Loaded, load
from secateur.models.state import evaluating, quiet
from secateur.progress import SILENT, Progress


def evaluate_model(
    model: str,
    *,
    text: str = "pydoc:test",
    length: int | None = None,
    windows: int | None = None,
    dense: str | None = None,
    task: str | None = None,
    limit: int | None = None,
    speed: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Evaluate ``model`` (anything ``load`` opens, or a bitmask container).

    Returns:
        ``perplexity``, ``stderr``, ``protocol``; with ``dense`` also ``dense_perplexity``,
        ``kl`` (nats per token) and ``top1_agreement``; with ``task`` ``accuracy`` instead.
    """
    loaded = _open(model, dtype, device, progress)
    if task is not None:
        from secateur.evaluation.choice import choice_accuracy

        with evaluating(loaded.model):
            return choice_accuracy(
                _logits(loaded), loaded.tokenizer, task, limit=limit, progress=progress
            )
    from secateur.evaluation.perplexity import fidelity, perplexity

    wanted = evaluation_windows(
        text, loaded.tokenizer, loaded.window(length), limit=windows, vocabulary=loaded.vocabulary
    )
    if dense is None:
        if speed:
            raise UsageError("speed is a ratio: it needs a dense model", field="dense", value=None)
        with evaluating(loaded.model):
            measured = perplexity(_logits(loaded), wanted, progress)
        return {
            "perplexity": measured.value,
            "stderr": measured.stderr,
            "protocol": measured.protocol.record(),
        }
    reference = _open(dense, dtype, device, progress, tokenizer=False)
    with evaluating(loaded.model), evaluating(reference.model):
        both = fidelity(_logits(reference), _logits(loaded), wanted, progress)
        record: dict[str, Any] = {
            "perplexity": both["pruned"]["perplexity"],
            "stderr": both["pruned"]["stderr"],
            "dense_perplexity": both["dense"]["perplexity"],
            "kl": both["kl"],
            "top1_agreement": both["top1_agreement"],
            "protocol": both["protocol"],
        }
        if speed:
            from secateur.evaluation.speed import compare_speed

            record["speed"] = compare_speed(reference.model, loaded.model, wanted.ids[:1])
    return record


def _open(
    spec: str, dtype: str, device: str, progress: Progress, *, tokenizer: bool = True
) -> Loaded:
    """``load``, and the container of ``secateur export --format bitmask`` besides."""
    folder = Path(spec).expanduser()
    if not (folder / CONTAINER).is_file():
        return load(spec, dtype=dtype, device=device, tokenizer=tokenizer, progress=progress)
    from transformers import AutoTokenizer

    one_of("dtype", dtype, ("auto", *DTYPES))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    # As everywhere: float32 on a CPU, what is stored on a GPU.
    kind = DTYPES.get(dtype, torch.float32 if device == "cpu" else "auto")
    with quiet(), progress.stage(f"unpacking {folder.name}"):
        model = load_pruned(folder, dtype=kind).to(device).eval()
        words = AutoTokenizer.from_pretrained(folder, local_files_only=True) if tokenizer else None
    return Loaded(model, words, folder, folder.resolve().name, fingerprint="")


def _logits(loaded: Loaded) -> Any:
    device = next(loaded.model.parameters()).device

    @torch.no_grad()
    def logits(ids: Tensor) -> Tensor:
        output: Tensor = loaded.model(input_ids=ids.to(device), use_cache=False).logits
        return output

    return logits
