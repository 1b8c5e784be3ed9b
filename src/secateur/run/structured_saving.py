"""A structured run's folder: weights in their new shapes, config or manifest, and the proof."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from secateur.errors import VerificationError
from secateur.export.huggingface import TOLERANCES, compare_logits, reference_logits
from secateur.export.loading import load_pruned
from secateur.models.saving import block_state, outside_state, write_parts
from secateur.models.shards import write_index
from secateur.models.state import quiet
from secateur.models.structured_saving import Form
from secateur.run.finish import OUTSIDE, save_form
from secateur.run.folder import RunFolder
from secateur.run.session import Session
from secateur.run.verifying import PROBE, probe_ids
from secateur.tensorfile import save_tensors


def save_structured(session: Session, folder: RunFolder, form: Form) -> dict[str, Any]:
    """Write the pruned model, open it again and compare; the index, which makes it a model, is last.

    Returns:
        What was found on re-opening.

    Raises:
        VerificationError: the model read back computes something else.
    """
    model, stored = session.loaded.model, session.loaded.stored
    if stored is not None:  # what is measured in memory is what lies on disk
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.to(stored))
    parts = {OUTSIDE: outside_state(session.view)}
    parts |= {folder.shard(b.index).name: block_state(session.view, b) for b in session.view.blocks}
    weight_map, size = write_parts(folder.path, parts, stored)
    save_form(session, folder, form)
    write_index(folder.path, weight_map, size)
    ids = probe_ids(session)
    logits = reference_logits(model, ids)
    kind = next(model.parameters()).dtype
    words = {"dtype": str(kind).removeprefix("torch."), "device": session.device.type}
    save_tensors(folder.inner / PROBE, {"ids": ids, "logits": logits}, words)
    return reopen_structured(folder.path, ids, logits, kind, session.device)


def reopen_structured(
    path: Path,
    ids: torch.Tensor,
    logits: torch.Tensor,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Open a folder with ``load_pruned`` and compare its logits.

    Raises:
        VerificationError: they differ by more than the type explains.
    """
    with quiet():
        model = load_pruned(path, dtype=dtype).to(device)
        found = compare_logits(reference_logits(model, ids), logits)
    if not found["relative"] <= TOLERANCES.get(dtype, TOLERANCES[torch.float32]):
        raise VerificationError(
            f"the model read back from '{path}' differs: its logits by up to "
            f"{found['max_difference']:.3g} ({found['relative']:.2g} of the largest)",
            fix="run it again with --fresh",
        )
    return {"loaded": True, **found}
