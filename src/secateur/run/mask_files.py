"""Mask files at work: made from a run, put on a dense model and saved as a folder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.errors import UsageError
from secateur.export.pruned import save_pruned
from secateur.masks.store import FILE_NAME, load_masks, save_masks
from secateur.masks.target import Target
from secateur.models.anatomy import ModelView
from secateur.models.loading import load
from secateur.models.mask_file import MaskFile, apply_mask, save_mask
from secateur.progress import SILENT, Progress


def make_mask(
    run: Path, out: Path, *, dense: str | None = None, trust_remote_code: bool = False
) -> dict[str, Any]:
    """The mask file of an N:M run, whatever its method, for the dense model it was cut from.

    What an update made of the surviving weights is not in it: the mask goes onto dense weights.

    Args:
        dense: the model; by default the one the run's recipe names.

    Raises:
        UsageError: no run; no N:M run; another model.
    """
    from secateur.run.results import read_result

    result = read_result(run)
    recipe = result["recipe"]
    target = Target.parse(recipe["sparsity"])
    masks = load_masks(run)
    loaded = load(dense or recipe["model"], tokenizer=False, trust_remote_code=trust_remote_code)
    view = ModelView.of(loaded.model, recipe.get("blocks"))
    shapes = {m.name: m.shape for m in view.matrices()}
    for name, mask in masks.items():
        if shapes.get(name) != tuple(mask.shape):
            raise UsageError(
                f"the run's matrix '{name}' is {tuple(mask.shape)}, here it is {shapes.get(name)}",
                field="dense",
                value=loaded.name,
                fix="give the model the run was cut from",
            )
    if result["model"]["fingerprint"] != loaded.fingerprint and not _cut_from(
        view, run, masks, result
    ):
        raise UsageError(
            "is not the model the run was cut from, though its shapes are the same",
            field="dense",
            value=loaded.name,
            fix="give that very model, in its revision and type",
        )
    words = {"model": loaded.fingerprint, "method": recipe["method"]}
    save_mask(out, view, masks, _patterns(target, masks), words)
    return describe(out)


def _cut_from(
    view: ModelView, run: Path, masks: Mapping[str, Tensor], result: dict[str, Any]
) -> bool:
    """Whether a model whose files are not those the run names could be the run's all the same.

    What was cut in memory has no files. Where survivors were left as they were they tell.
    """
    recipe = result["recipe"]
    if result["resolved"]["update"] != "none" or recipe.get("recovery"):
        return bool(recipe["model"] == "given")
    cut = ModelView.of(load(str(run), tokenizer=False).model, recipe.get("blocks"))
    return all(
        torch.equal(cut[name].tensor().float(), view[name].tensor().float().masked_fill(mask, 0))
        for name, mask in masks.items()
    )


def _patterns(target: Target, masks: Mapping[str, Tensor]) -> dict[str, Target]:
    """Each matrix's pattern: the run's M, and as many of M as its first group keeps."""
    if target.group is None:
        raise UsageError(
            "only an N:M mask has a mask file", field="sparsity", value=str(target), fix="e.g. 2:4"
        )
    group = target.group
    kept = {name: int((~masks[name][0, :group]).sum()) for name in masks}
    return {name: Target(1 - n / group, n, group) for name, n in kept.items()}


def apply_to_folder(
    model: str,
    mask: Path,
    out: Path,
    *,
    check: bool = True,
    trust_remote_code: bool = False,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Put a mask on a dense model and save it, with its masks, as a Hugging Face folder.

    Raises:
        UsageError: the folder holds something; see ``apply_mask``.
    """
    file = MaskFile(mask)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(
            "is there already and is not empty", field="out", value=str(out), fix="choose another"
        )
    with progress.stage(f"loading {model}", total=1) as advance:
        loaded = load(model, trust_remote_code=trust_remote_code)
        advance(1)
    apply_mask(loaded.model, file, check=check)
    if loaded.stored is not None:
        loaded.model.to(loaded.stored)
    transposed = [m.name for m in ModelView.of(loaded.model).matrices() if m.transposed]
    words = {"transposed": transposed} if transposed else {}
    saved = save_pruned(
        loaded.model,
        out,
        loaded.tokenizer,
        facts={"mask": file.metadata},
        also=lambda folder, _: save_masks(folder / FILE_NAME, file, words),
    )
    gone = sum(int(masked.sum()) for masked in file.values())
    return {"folder": str(out), "zeros": gone, "of": file.elements, "tensors": saved["tensors"]}


def describe(path: Path) -> dict[str, Any]:
    """What a mask file holds."""
    file = MaskFile(path)
    size = path.stat().st_size
    return {
        "file": str(path),
        "patterns": dict(Counter(str(p) for p in file.patterns.values())),
        "matrices": len(file),
        "weights": file.elements,
        "bytes": size,
        "bits_per_weight": 8 * size / max(1, file.elements),
        "metadata": file.metadata,
    }
