"""Proof after the fact: re-open what a run wrote and compare it with what it claims."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from secateur.errors import VerificationError
from secateur.export.huggingface import reference_logits, verify_folder
from secateur.masks.store import load_masks
from secateur.models.loading import DTYPES
from secateur.models.state import quiet
from secateur.progress import SILENT, Progress
from secateur.run.folder import RunFolder
from secateur.run.results import read_result
from secateur.run.session import Session
from secateur.tensorfile import save_tensors

PROBE = "probe.safetensors"
PROBE_TOKENS = 32


def reopen(session: Session, folder: RunFolder) -> dict[str, Any]:
    """Load the folder with plain transformers and compare its logits with the model in memory.

    The few tokens and their logits stay in the folder, for ``secateur verify``.
    A streamed model is not loaded as a whole: its zeros are checked on disk, tensor by tensor.
    """
    if session.resident is not None:
        return {"loaded": False, "why": "the weights were streamed", **verify_folder(folder.path)}
    ids = probe_ids(session)
    logits = reference_logits(session.loaded.model, ids)
    dtype = next(session.loaded.model.parameters()).dtype
    words = {"dtype": str(dtype).removeprefix("torch."), "device": session.device.type}
    save_tensors(folder.inner / PROBE, {"ids": ids, "logits": logits}, words)
    with quiet():
        found = verify_folder(
            folder.path,
            ids,
            logits,
            dtype=dtype,
            device=session.device,
            trust_remote_code=session.recipe.trust_remote_code,
        )
    return {"loaded": True, **found}


def probe_ids(session: Session) -> Tensor:
    """(1, L) tokens whose logits are recorded for later checks: of the run's text, if it has one."""
    windows = session.evaluation or session.calibration
    if windows is not None:
        return windows.ids[:1, :PROBE_TOKENS].contiguous()
    vocabulary = session.loaded.model.get_input_embeddings().weight.shape[0]
    return (torch.arange(PROBE_TOKENS) * 7 % vocabulary)[None]


def read_probe(path: Path) -> tuple[dict[str, Tensor], torch.dtype]:
    """The recorded tokens and logits, and the type they were computed in."""
    try:
        with safe_open(str(path), "pt") as file:
            kind = file.metadata()["dtype"]
        return load_file(path), DTYPES[kind]
    except (SafetensorError, OSError, KeyError, TypeError) as error:
        raise VerificationError(f"the recorded logits in '{path}' are damaged: {error}") from None


def verify_run(
    folder: Path, *, load_model: bool = True, progress: Progress = SILENT
) -> dict[str, Any]:
    """Check a finished run's masks, weights and logits against its record.

    Returns:
        ``checks``: a line for each thing proved.

    Raises:
        VerificationError: what does not hold.
        UsageError: not a finished run.
    """
    report = read_result(folder)
    if report.get("kind") == "vision":
        from secateur.run.vision_commands import verify_vision

        return verify_vision(folder, report, load_model=load_model, progress=progress)
    if report.get("kind") == "heads":
        from secateur.run.heads_proof import verify_heads

        return verify_heads(folder, report, load_model=load_model, progress=progress)
    if report.get("structure"):
        from secateur.run.structured_verify import verify_structured

        return verify_structured(folder, report, load_model=load_model, progress=progress)
    masks = load_masks(folder)
    with progress.stage("verifying", total=3) as advance:
        counts = masks.counts()
        for module in report["modules"]:
            count = counts.get(module["name"])
            if count != module["delivered_count"]:
                raise VerificationError(
                    f"'{module['name']}': the report says {module['delivered_count']} weights "
                    f"went, the mask holds {count}"
                )
        exact = all(m["asked_count"] == m["delivered_count"] for m in report["modules"])
        checks = [
            f"{len(counts)} masks hold exactly what was asked, to the element"
            if exact
            else f"{len(counts)} masks hold what the report says (a compat method: counts are its own)"
        ]
        advance(1)
        record = verify_folder(folder)
        if record["masked"] != report["totals"]["zeros"]:
            raise VerificationError(
                f"{record['masked']} masked weights on disk, the report says {report['totals']['zeros']}"
            )
        checks.append(f"all {record['masked']:,} masked weights are exactly zero on disk")
        advance(1)
        probe = folder / "secateur" / PROBE
        if load_model and probe.exists():
            saved, kind = read_probe(probe)
            with quiet():
                found = verify_folder(folder, saved["ids"], saved["logits"], dtype=kind)
            checks.append(
                "opens with AutoModelForCausalLM.from_pretrained and gives the recorded logits "
                f"(largest difference {found['max_difference']:.2g})"
            )
            record |= found
        advance(1)
    return {"folder": str(folder), "verified": True, "checks": checks, **record}
