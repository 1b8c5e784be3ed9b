"""The recovery step inside a run's folder: killed at any moment, it goes on or is done.

The cut weights stay until every recovered one is written; only then does the folder's marker
say that the recovered ones count.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.errors import UsageError
from secateur.methods.structured_base import StructuredMethod
from secateur.models.names import CheckpointMap
from secateur.models.saving import block_state, cast, outside_state
from secateur.models.shards import Shard, write_shard
from secateur.recipe import Recipe
from secateur.run.finish import OUTSIDE
from secateur.run.folder import RECOVERED, RunFolder
from secateur.run.recovery import Recoverer, dense_again, dense_copy, restructure
from secateur.run.session import Session
from secateur.training.imp import sparsities


def recoverer_of(session: Session, text: Any = None, *, owned: bool = True) -> Recoverer | None:
    """What the recipe's recovery needs, checked before anything is cut; None without one.

    Args:
        text: windows or texts in memory, instead of the recipe's.
        owned: the model was loaded by its name and can be loaded again.
    """
    recipe = session.recipe
    if recipe.recovery is None:
        return None
    if recipe.recovery.keep_adapter:
        raise UsageError(
            "the cut model without the adapter is not kept in such a run, so nothing could carry it",
            field="recovery.keep_adapter",
            value=True,
            fix="prune without a recovery, then secateur recover RUN -R keep_adapter=true",
        )
    recoverer = Recoverer.of(
        recipe.recovery,
        session.loaded,
        session.view,
        masked=not isinstance(session.method, StructuredMethod) and recipe.target.sparsity > 0,
        text=text,
        progress=session.progress,
    )
    if recoverer.needs_teacher:
        recoverer.teacher = (
            dense_again(recipe.model, session.loaded, recipe.trust_remote_code)
            if owned
            else dense_copy(session.loaded.model)
        )
    return recoverer


def earlier_cycles(session: Session) -> list[Session]:
    """A session for each cut before the last, each asking for less."""
    recipe = session.recipe
    if recipe.recovery is None or recipe.recovery.rounds == 1:
        return []
    steps = sparsities(
        recipe.target.sparsity, recipe.recovery.rounds, recipe.recovery.cycle_schedule
    )
    values = recipe.model_dump()
    return [
        replace(session, recipe=Recipe.build(values | {"sparsity": sparsity}))
        for sparsity in steps[:-1]
    ]


def recover(
    session: Session,
    recoverer: Recoverer,
    masks: Mapping[str, Tensor],
    folder: RunFolder | None,
    cycle: int | None = None,
) -> dict[str, Any]:
    """Recover the cut model in memory, or take up what is recovered already."""
    if cycle is not None:
        recoverer.structure()
        where = None if folder is None else folder.inner / "recovery" / f"cycle-{cycle}"
        return recoverer.recover(masks, where)
    if folder is not None:
        found: dict[str, Any] | None = folder.read(RECOVERED)
        if found is not None:
            restructure(session.view, found["structure"])
            take_up(session, folder)
            return found
    structure = recoverer.structure()
    where = None if folder is None else folder.inner / "recovery" / "last"
    record = {**recoverer.recover(masks, where), "structure": structure}
    if folder is not None:
        session.ranks.barrier()
        if session.ranks.leads:
            keep(session, folder, record)
    return record


def recover_dense(
    session: Session,
    recoverer: Recoverer,
    folder: RunFolder | None,
    quality: Callable[[], dict[str, Any] | None],
) -> dict[str, Any]:
    """Recover a model whose units were cut out: it is smaller and dense, nothing is masked.

    The training's checkpoint stays in the folder, so a run taken up again goes through it.
    """
    name = "recovery-before.json"
    before = None if folder is None else folder.read(name)
    if before is None:
        before = quality()
        if folder is not None and before is not None:
            folder.save(name, before)
    recoverer.view = session.view
    structure = recoverer.structure()
    where = None if folder is None else folder.inner / "recovery" / "last"
    with session.timed("recovery"):
        record = recoverer.recover({}, where)
    return {**record, "structure": structure, "before": before}


def keep(session: Session, folder: RunFolder, record: dict[str, Any]) -> None:
    """Write every weight, then the marker, then drop what it replaces."""
    cut = [folder.shard(block.index) for block in session.view.blocks]
    for block in session.view.blocks:
        state = cast(block_state(session.view, block), session.loaded.stored)
        write_shard(folder.recovered_shard(block.index), state)
        known = folder.read(f"blocks/{block.index:05d}.json") or {}
        sizes = {k: [v.numel() * v.element_size(), v.numel()] for k, v in state.items()}
        folder.save(f"blocks/{block.index:05d}.json", {**known, "tensors": sizes})
    outside = cast(outside_state(session.view), session.loaded.stored)
    write_shard(folder.path / OUTSIDE, outside)
    folder.save(RECOVERED, record)
    folder.event("recovered", steps=record["steps"], share=record["share"])
    for path in cut:
        path.unlink(missing_ok=True)
    drop_checkpoints(folder.inner / "recovery")


def drop_checkpoints(folder: Path) -> None:
    """The training's own state is of no more use; its metrics stay."""
    for file in folder.rglob("*.safetensors"):
        file.unlink(missing_ok=True)
    for inner in folder.glob("cycle-*"):
        if inner.is_dir() and not any(inner.iterdir()):
            shutil.rmtree(inner, ignore_errors=True)


@torch.no_grad()
def take_up(session: Session, folder: RunFolder) -> None:
    """Put the recovered weights into the model in memory."""
    model = session.view.model
    now = dict(model.named_parameters(remove_duplicate=False))
    files = [folder.recovered_shard(b.index) for b in session.view.blocks]
    for path in [*files, folder.path / OUTSIDE]:
        stored = CheckpointMap(model, Shard(path))
        for name in {n for n in now if n in stored}:
            tensor = stored.read([name])[name]
            now[name].copy_(tensor.to(now[name]))
