"""Evidence on disk: gathered once, keyed by what it was gathered from, used by many methods.

    ROOT/<kind>-<key>/block-00003.safetensors     one file a block, written atomically
    ROOT/<kind>-<key>/complete.json               there once every block is

``key`` digests the model, the calibration windows and the settings, so evidence of another
model or text can never be mistaken for this one's.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from secateur.errors import SecateurError
from secateur.evidence.statistics import GradientMoments, InputMoments
from secateur.files import write_json
from secateur.tensorfile import save_tensors


def digest(record: Any) -> str:
    """A short, stable name for a JSON-able record."""
    text = json.dumps(record, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class EvidenceStore:
    """One kind of evidence of one model on one calibration set."""

    def __init__(self, root: Path, kind: str, key: dict[str, Any]) -> None:
        self.key = key
        self.folder = root / f"{kind}-{digest(key)}"

    @property
    def complete(self) -> bool:
        """True once ``finish`` has been called."""
        return (self.folder / "complete.json").exists()

    def finish(self) -> None:
        """Declare every block saved."""
        write_json(self.folder / "complete.json", self.key)

    def path(self, block: int) -> Path:
        """The file of one block."""
        return self.folder / f"block-{block:05d}.safetensors"

    def save_inputs(self, block: int, moments: dict[str, InputMoments]) -> None:
        """Save a block's input moments; those shared between matrices are stored once."""
        leaders: dict[int, str] = {}
        tensors: dict[str, Tensor] = {}
        same: dict[str, str] = {}
        for name, item in moments.items():
            leader = leaders.setdefault(id(item), name)
            same[name] = leader
            if leader == name:
                tensors |= {f"{name}|{k}": v.cpu().contiguous() for k, v in item.state().items()}
        self._write(block, tensors, same)

    def load_inputs(self, block: int, device: str = "cpu") -> dict[str, InputMoments]:
        """The inverse of ``save_inputs``; sharing is restored."""
        tensors, same = self._read(block)
        items = {
            leader: InputMoments.from_state(_part(tensors, leader), device)
            for leader in sorted(set(same.values()))
        }
        return {name: items[leader] for name, leader in same.items()}

    def save_tensors(self, block: int, tensors: dict[str, Tensor]) -> None:
        """Save what was read off a block."""
        self._write(block, {k: v.contiguous() for k, v in tensors.items()}, {})

    def load_tensors(self, block: int) -> dict[str, Tensor]:
        """The inverse of ``save_tensors``."""
        return self._read(block)[0]

    def clear(self) -> None:
        """Forget what an interrupted gathering left: half-added sums cannot be told apart."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def add_gradients(self, block: int, sums: dict[str, GradientMoments]) -> None:
        """Merge a block's gradient sums into those saved for other sequences."""
        if self.path(block).exists():
            before = self.load_gradients(block)
            for key, item in sums.items():
                held = next(iter(item.sums.values()), None)
                item.merge(before[key] if held is None else before[key].to(held.device))
        self.save_gradients(block, sums)

    def save_gradients(self, block: int, sums: dict[str, GradientMoments]) -> None:
        """Save a block's gradient sums by parameter key."""
        tensors = {f"{k}|{n}": t.cpu() for k, m in sums.items() for n, t in m.sums.items()}
        same = {k: json.dumps([m.samples, list(m.norms)]) for k, m in sums.items()}
        self._write(block, tensors, same)

    def load_gradients(
        self, block: int, device: torch.device | str = "cpu"
    ) -> dict[str, GradientMoments]:
        """A block's gradient sums by parameter key."""
        tensors, header = self._read(block)
        out: dict[str, GradientMoments] = {}
        for key, text in header.items():
            samples, norms = json.loads(text)
            out[key] = GradientMoments(tuple(norms))
            out[key].samples = samples
            out[key].sums = dict(_part(tensors, key))
            out[key].to(device)
        return out

    def _write(self, block: int, tensors: dict[str, Tensor], header: dict[str, str]) -> None:
        save_tensors(self.path(block), tensors, {"names": json.dumps(header)})

    def _read(self, block: int) -> tuple[dict[str, Tensor], dict[str, str]]:
        try:
            with safe_open(str(self.path(block)), "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                header: dict[str, str] = json.loads(file.metadata()["names"])
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise SecateurError(
                f"the saved evidence cannot be read: {error}",
                field="evidence",
                value=str(self.path(block)),
                fix=f"delete the folder {self.folder.name} and run again",
            ) from None
        return tensors, header


def _part(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    prefix = f"{name}|"
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
