"""Finished blocks on disk: written as they finish, taken up again by a resumed run."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from secateur.masks.store import load_masks, save_masks
from secateur.models.anatomy import Block
from secateur.models.names import CheckpointMap
from secateur.models.saving import block_state, cast
from secateur.models.shards import Shard, write_shard
from secateur.run.engine import BlockResult, Engine
from secateur.run.folder import RunFolder

BOUNDARY_SECONDS = 20.0
"""Least time between two saved boundaries: a resumed run repeats at most this much work."""


class Checkpoint:
    """Saves each finished block of ``engine`` to ``folder`` and restores them.

    A block's shard, masks and record come first and the boundary (the next block's inputs)
    from time to time; blocks finished after the last boundary are done again, which gives the
    same bytes. Without a folder nothing is kept.
    """

    def __init__(self, engine: Engine, folder: RunFolder | None, *, resident: bool) -> None:
        self.engine = engine
        self.folder = folder
        self.resident = resident
        self._last = time.monotonic()

    def restore(self) -> list[BlockResult]:
        """Results of the blocks that need not be done again, their weights put in the model."""
        folder, replay = self.folder, self.engine.replay
        if folder is None:
            return []
        records: list[dict[str, Any]] = []
        for block in self.engine.view.blocks:
            record = folder.block_record(block.index)
            if record is None:
                break
            records.append(record)
        if replay is not None and len(records) < len(self.engine.view.blocks):
            boundary = folder.load_boundary(replay.device)
            reached = self.engine.ranks.agreed(0 if boundary is None else boundary[0])
            if boundary is not None and 0 < reached <= len(records):
                self._take(boundary[1])
                records = records[:reached]
            else:
                records = []
        results = []
        for block, record in zip(self.engine.view.blocks, records, strict=False):
            if self.resident:
                self._put_back(block, folder)
            results.append(
                BlockResult(
                    block.index,
                    self._masks(block, folder),
                    record["modules"],
                    record["error"],
                    record["seconds"],
                )
            )
        if results:
            folder.event("resumed", blocks=len(results))
        return results

    def save(self, block: Block, result: BlockResult) -> None:
        """Keep a finished block (still resident)."""
        folder, replay = self.folder, self.engine.replay
        if folder is None:
            return
        if self.engine.ranks.leads:
            self._write(block, result, folder)
            if not self.resident:
                result.masks = self._masks(block, folder)
        last = block.index + 1 == len(self.engine.view.blocks)
        due = last or time.monotonic() - self._last > BOUNDARY_SECONDS
        if replay is not None and self.engine.ranks.spread(0, due):
            folder.save_boundary(block.index + 1, [*replay.hidden, *(self.engine.reference or [])])
            self._last = time.monotonic()

    def _masks(self, block: Block, folder: RunFolder) -> Mapping[str, Tensor]:
        """A finished block's masks; left on disk when the weights are, or they would pile up."""
        stored = load_masks(folder.mask_shard(block.index))
        return dict(stored) if self.resident else stored

    def _take(self, hidden: list[Tensor]) -> None:
        """Put a boundary's states back: the pruned stream's, then the dense one's if kept."""
        replay = self.engine.replay
        assert replay is not None
        batches = len(replay.ids)
        replay.hidden = hidden[:batches]
        if self.engine.reference is not None:
            self.engine.reference = hidden[batches:]

    def _write(self, block: Block, result: BlockResult, folder: RunFolder) -> None:
        state = cast(block_state(self.engine.view, block), self.engine.stored)
        write_shard(folder.shard(block.index), state)
        transposed = [m.name for m in block.matrices if m.transposed]
        words = {"transposed": transposed} if transposed else {}
        save_masks(folder.mask_shard(block.index), result.masks, words)
        record = {
            "modules": result.modules,
            "error": result.error,
            "seconds": result.seconds,
            "tensors": {k: [v.numel() * v.element_size(), v.numel()] for k, v in state.items()},
        }
        folder.save(f"blocks/{block.index:05d}.json", record)
        folder.event("block", index=block.index, error=result.error, seconds=result.seconds)

    @torch.no_grad()
    def _put_back(self, block: Block, folder: RunFolder) -> None:
        """The block's pruned weights from its shard, whatever names checkpoints give them."""
        shard = Shard(folder.shard(block.index))
        stored = CheckpointMap(self.engine.view.model, shard)
        for matrix in {m.key: m for m in block.matrices}.values():
            tensor = stored.read([matrix.key])[matrix.key]
            matrix.stored.copy_(tensor.to(matrix.stored))
