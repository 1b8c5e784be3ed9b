"""Blocks that are done, on disk: a training block by block goes on where it was stopped."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.files import finite, write_json
from secateur.models.anatomy import Block
from secateur.tensorfile import opened, save_tensors
from secateur.training.checkpoint import refuse_other


class FinishedBlocks:
    """One file a finished block, with its tensors and its record; the file is the proof.

    Args:
        folder: where they lie; None keeps nothing.
        identity: what the blocks depend on; blocks made under another one are refused.
        leads: this process writes.

    Raises:
        UsageError: the folder holds blocks of other settings, naming one.
    """

    def __init__(
        self, folder: Path | None, identity: Mapping[str, Any], *, leads: bool = True
    ) -> None:
        self.folder, self.leads = folder, leads
        if folder is None:
            return
        marker = folder / "reconstruction.json"
        if marker.exists():
            try:
                found = json.loads(marker.read_text("utf-8"))
            except ValueError:
                found = {}
            refuse_other(found, dict(identity), folder)
        elif leads:
            write_json(marker, dict(identity))

    def _path(self, block: Block) -> Path:
        assert self.folder is not None
        return self.folder / f"block-{block.index:05d}.safetensors"

    def record(self, block: Block) -> dict[str, Any] | None:
        """The record of a finished block; None if it has to be done."""
        if self.folder is None or not self._path(block).exists():
            return None
        with opened(self._path(block)) as file:
            record: dict[str, Any] = json.loads(file.metadata()["record"])
        return record

    @torch.no_grad()
    def restore(self, block: Block) -> None:
        """Put a finished block's tensors into it (it is present)."""
        own = dict(block.module.named_parameters())
        with opened(self._path(block)) as file:
            for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
                own[name].copy_(file.get_tensor(name))

    def save(self, block: Block, record: dict[str, Any]) -> None:
        """Keep a finished block (present, adapters merged)."""
        if self.folder is None or not self.leads:
            return
        tensors: dict[str, Tensor] = {
            name: p.detach().contiguous() for name, p in block.module.named_parameters()
        }
        save_tensors(self._path(block), tensors, {"record": json.dumps(finite(record))})
