"""Proof that a written folder is the model that was pruned: open it again and compare."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.errors import VerificationError
from secateur.export.bitmask import FILE_NAME as BITMASK_FILE
from secateur.export.bitmask import load_kept
from secateur.export.folder import ModelFolder
from secateur.export.loading import load_pruned

TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Relative differences of logits that rounding explains."""


@torch.no_grad()
def reference_logits(model: Any, input_ids: Tensor) -> Tensor:
    """The logits (batch, length, vocabulary) of ``model`` on ``input_ids``, float32 on the CPU."""
    was_training = model.training
    model.eval()
    try:
        device = next(model.parameters()).device
        logits: Tensor = model(input_ids=input_ids.to(device), use_cache=False).logits
    finally:
        model.train(was_training)
    return logits.float().cpu()


def verify_folder(
    folder: Path | str,
    input_ids: Tensor | None = None,
    logits: Tensor | None = None,
    *,
    masks: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "cpu",
    tolerance: float | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Re-open ``folder`` without Secateur's help and compare it with the model in memory.

    A plain folder is opened with ``AutoModelForCausalLM.from_pretrained`` and its zeros are
    counted against the masks, tensor by tensor; a bitmask container through ``load_pruned``.

    Args:
        folder: what was exported.
        input_ids: (batch, length) token ids to compare on; with ``logits``.
        logits: (batch, length, vocabulary), from ``reference_logits``.
        masks: instead of the folder's own.
        dtype: type to run in; must be the one ``logits`` were made in.
        device: where to run; kernels of another device round differently.
        tolerance: largest allowed difference, relative to the largest absolute logit; by
            default what the type's precision allows (``TOLERANCES``).
        trust_remote_code: run Python code shipped with the model.

    Returns:
        ``masked`` weights, and with logits ``max_difference`` (absolute), ``relative`` and
        ``top1_agreement``.

    Raises:
        VerificationError: a pruned weight is not zero, or the logits differ.
    """
    folder = Path(folder)
    if (folder / BITMASK_FILE).is_file():
        # Here the pruned places are zero by construction.
        masked = sum(int(mask.sum()) for mask in load_kept(folder).values())
    else:
        masked = ModelFolder(folder, masks).check_masks()
    record: dict[str, Any] = {"masked": masked}
    if input_ids is None or logits is None:
        return record
    model = load_pruned(folder, dtype=dtype, trust_remote_code=trust_remote_code).to(device)
    if tolerance is None:
        tolerance = TOLERANCES.get(next(model.parameters()).dtype, TOLERANCES[torch.float32])
    found = reference_logits(model, input_ids)
    record |= compare_logits(found, logits)
    if not record["relative"] <= tolerance:  # also when it is NaN
        raise VerificationError(
            f"the model read back from '{folder}' differs: its logits by up to "
            f"{record['max_difference']:.3g} ({record['relative']:.2g} of the largest)",
            fix="compare in the type the folder was written in, or export again",
        )
    return record


def compare_logits(found: Tensor, expected: Tensor) -> dict[str, float]:
    """How far two logits (..., vocabulary) are apart."""
    if found.shape != expected.shape:
        raise VerificationError(
            f"logits of shape {tuple(found.shape)}, expected {tuple(expected.shape)}"
        )
    found, expected = found.float().cpu(), expected.float().cpu()
    difference = float((found - expected).abs().max())
    scale = float(expected.abs().max())
    agreement = (found.argmax(-1) == expected.argmax(-1)).float().mean()
    return {
        "max_difference": difference,
        "relative": difference / scale if scale else difference,
        "top1_agreement": float(agreement),
    }
