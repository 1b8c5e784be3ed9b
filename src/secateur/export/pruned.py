"""Saving a structurally pruned model that is in memory: decoder, encoder or both."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur.errors import UsageError, VerificationError
from secateur.export.loading import load_pruned
from secateur.files import told_plainly
from secateur.masks.structured import StructuredMask, structure_of
from secateur.models.saving import save_weights
from secateur.models.state import quiet
from secateur.models.structured_saving import form_of, save_words


def save_pruned(
    model: nn.Module,
    folder: Path | str,
    tokenizer: Any = None,
    *,
    facts: dict[str, Any] | None = None,
    also: Callable[[Path, dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Write a transformers model that ``shrink`` or ``prune_heads`` cut, and prove the folder.

    Where its widths can be said in a config the folder is a stock checkpoint; otherwise it opens
    with ``secateur.load_pruned``. It is written beside ``folder``, opened again and compared
    tensor by tensor, and only then given its name.

    Args:
        folder: must not exist, or be empty.
        facts: more entries for the manifest (how it was pruned).
        also: writes more files into the folder before it gets its name; called with the folder as it
            is then, and with what is returned.

    Returns:
        ``stock`` (bool), ``why`` it is not or by which trick it is, and ``tensors`` compared.

    Raises:
        UsageError: the folder holds something; not a transformers model.
        VerificationError: what was read back differs.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(
            "is there already and is not empty",
            field="folder",
            value=str(folder),
            fix="choose another, or delete it first",
        )
    if not hasattr(model, "config") or not hasattr(model, "save_pretrained"):
        raise UsageError(
            "only transformers models are saved this way",
            field="model",
            value=type(model).__name__,
            fix="save the transformers model inside it",
        )
    form = form_of(model)
    with told_plainly(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        place = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        save_weights(model, place)
        save_words(place, model, tokenizer, facts or {}, form=form)
        record = {"stock": form.stock, "why": form.why, "tensors": _compare(model, place)}
        if also is not None:
            also(place, record)
        with told_plainly(folder):
            place.chmod(0o755)
            if folder.is_dir():
                folder.rmdir()
            place.rename(folder)
    except BaseException:
        shutil.rmtree(place, ignore_errors=True)
        raise
    return record


@torch.no_grad()
def _compare(model: nn.Module, place: Path) -> int:
    """Open ``place`` and hold every tensor, and the record of what is gone, against ``model``."""
    with quiet():
        again = load_pruned(place)
    ours, theirs = model.state_dict(), again.state_dict()
    wrong = sorted(set(ours) ^ set(theirs))
    wrong += [n for n in ours if n in theirs and not torch.equal(ours[n].cpu(), theirs[n].cpu())]
    if wrong:
        raise VerificationError(
            f"read back, {len(wrong)} tensors differ, such as '{wrong[0]}'",
            fix="report it with the model's config",
        )
    if (structure_of(again) or StructuredMask()) != (structure_of(model) or StructuredMask()):
        raise VerificationError("read back, the record of what is gone differs")
    return len(ours)
