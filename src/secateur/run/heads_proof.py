"""What a head-pruned folder keeps to be proved by later: its record, and a few answers of the model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import VerificationError
from secateur.evidence.objectives import (
    Batch,
    Objective,
    classification,
    language_model,
    pooled_features,
    sequence_to_sequence,
)
from secateur.export.huggingface import TOLERANCES, compare_logits
from secateur.export.loading import load_pruned
from secateur.masks.structured import StructuredMask
from secateur.models.shards import SafetensorsFolder
from secateur.models.state import evaluating, quiet
from secateur.models.structured_saving import MANIFEST, read_manifest
from secateur.progress import SILENT, Progress
from secateur.run.verifying import PROBE, read_probe
from secateur.tensorfile import save_tensors

MEASURES = {f.__name__: f for f in (classification, language_model, sequence_to_sequence)}
"""What measures, by the name a record has for it; none: features."""
PROBED = 4
"""Samples whose answers are kept."""


@torch.no_grad()
def measured(model: nn.Module, batches: Sequence[Batch], measure: Objective | None) -> Tensor:
    """Losses (N,) of the samples, or their features (N, d)."""
    if not batches:
        return torch.zeros(0)
    with evaluating(model):
        found = [
            pooled_features(model, b) if measure is None else measure(model, b) for b in batches
        ]
    return torch.cat(found).cpu()


def keep_probe(model: nn.Module, batch: Batch, measure: Objective | None, folder: Path) -> None:
    """Save a few samples and what the model makes of them into ``folder``."""
    probe = {name: tensor[:PROBED] for name, tensor in batch.items()}
    answers = measured(model, [probe], measure)
    parameter = next(model.parameters())
    words = {"dtype": str(parameter.dtype).removeprefix("torch."), "device": parameter.device.type}
    inputs = {f"input.{name}": tensor.cpu() for name, tensor in probe.items()}
    save_tensors(folder / PROBE, {**inputs, "answers": answers.float()}, words)


def verify_heads(
    folder: Path, record: dict[str, Any], *, load_model: bool = True, progress: Progress = SILENT
) -> dict[str, Any]:
    """Check a folder of ``secateur heads`` against its record; see ``verifying.verify_run``."""
    with progress.stage("verifying", total=2) as advance:
        manifest = read_manifest(folder)
        if manifest is None:
            raise VerificationError(f"'{folder}' has no {MANIFEST}")
        gone = StructuredMask.parse(manifest, str(folder / MANIFEST)).gone
        for name, of in record["query_heads"].items():
            mask = gone.get(name)
            if mask is None or int((~mask).sum()) != of:
                raise VerificationError(
                    f"'{name}': the record says {of} query heads stay, the manifest "
                    f"{'all' if mask is None else int((~mask).sum())}"
                )
        stored = SafetensorsFolder(folder).elements
        if stored != record["stored"]:
            raise VerificationError(
                f"{stored:,} numbers on disk, the record says {record['stored']:,}"
            )
        checks = [
            f"{len(record['layers'])} layers keep exactly the heads the record says",
            f"{stored:,} numbers on disk, as the record says",
        ]
        advance(1)
        found: dict[str, Any] = {}
        if load_model:
            saved, kind = read_probe(folder / "secateur" / PROBE)
            answers = saved.pop("answers")
            batch = {name.removeprefix("input."): tensor for name, tensor in saved.items()}
            with quiet():
                model = load_pruned(folder, dtype=kind)
            measure = MEASURES.get(str(record["measure"]))
            found = compare_logits(measured(model, [batch], measure), answers)
            if not found["relative"] <= TOLERANCES.get(kind, TOLERANCES[torch.float32]):
                raise VerificationError(
                    f"the model read back from '{folder}' answers differently: by up to "
                    f"{found['max_difference']:.3g} ({found['relative']:.2g} of the largest)",
                    fix="prune it again into another folder",
                )
            how = "transformers" if record["stock"] else "secateur.load_pruned"
            checks.append(
                f"opens with {how} and gives the recorded answers "
                f"(largest difference {found['max_difference']:.2g})"
            )
        advance(1)
    return {"folder": str(folder), "verified": True, "checks": checks, **found}
