"""The end of a run on disk: join the masks, write what lies outside the blocks, prove the zeros."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from secateur.allocation.plan import Plan
from secateur.errors import VerificationError
from secateur.masks.store import merge_masks
from secateur.models.saving import cast, outside_state
from secateur.models.shards import write_index, write_shard
from secateur.models.structured_saving import Form, save_words
from secateur.run.folder import RunFolder
from secateur.run.session import Session

OUTSIDE = "model-outside.safetensors"
MASKS = "masks.safetensors"


def finish_checkpoint(session: Session, folder: RunFolder) -> None:
    """Make the folder an ordinary checkpoint; the index, which makes it one, comes last."""
    outside = cast(outside_state(session.view), session.loaded.stored)
    write_shard(folder.path / OUTSIDE, outside)
    weight_map = dict.fromkeys(outside, OUTSIDE)
    size = sum(t.numel() * t.element_size() for t in outside.values())
    shards = []
    for block in session.view.blocks:
        record = folder.read(f"blocks/{block.index:05d}.json")
        for name, (nbytes, _) in record["tensors"].items():
            weight_map[name] = folder.shard(block.index).name
            size += nbytes
        shards.append(folder.mask_shard(block.index))
    metadata = {
        "method": session.recipe.method,
        "target": str(session.recipe.target),
        "scope": str(session.scope),
    }
    merge_masks(shards, folder.path / MASKS, metadata)
    save_form(session, folder)
    write_index(folder.path, weight_map, size)


def save_form(session: Session, folder: RunFolder, form: Form | None = None) -> None:
    """Config and tokenizer; of a model that lost units, now or before, the manifest too."""
    facts = {"method": session.recipe.method, "target": str(session.recipe.target)}
    loaded = session.loaded
    save_words(folder.path, loaded.model, loaded.tokenizer, facts, loaded.stored, form)


@torch.no_grad()
def verify_zeros(session: Session, plan: Plan, masks: Mapping[str, Tensor]) -> int:
    """Check every mask against the plan, and every masked weight in memory against zero.

    (What lies on disk is checked when the folder is re-opened.)

    Returns:
        How many weights are gone.

    Raises:
        VerificationError: naming the matrix.
    """
    gone = 0
    for matrix in session.view.matrices():
        mask = masks.get(matrix.name)
        if mask is None:
            raise VerificationError(f"'{matrix.name}' has no mask")
        count = int(mask.count_nonzero())
        asked = plan.cut(matrix.name, session.scope).count
        if count != asked and not session.method.inexact:
            raise VerificationError(f"'{matrix.name}' lost {count} weights, not {asked}")
        cut = plan.cut(matrix.name, session.scope)
        if cut.keep is not None and cut.group is not None and not session.method.inexact:
            pattern = f"{cut.keep}:{cut.group}"
            gone_in_group = mask.view(mask.shape[0], -1, cut.group).sum(-1)
            if bool((gone_in_group != cut.group - cut.keep).any()):
                raise VerificationError(f"'{matrix.name}' does not keep {pattern} everywhere")
        if session.resident is None:
            weight = matrix.tensor()
            left = int(((weight != 0) & mask.to(weight.device)).count_nonzero())
            if left:
                raise VerificationError(f"'{matrix.name}': {left} masked weights are not zero")
        gone += count
    return gone
