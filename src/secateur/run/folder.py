"""A run's folder: the checkpoint, the log and the result in one place.

DIR/config.json, tokenizer..., model-block-00000.safetensors ..., model.safetensors.index.json
    an ordinary Hugging Face checkpoint; the index is written last, so an unfinished run
    cannot be mistaken for a model
DIR/masks.safetensors                what is gone, bit-packed
DIR/report.html, report.md, report.json
DIR/secateur/run.json                what this folder is a run *of* (recipe, model, texts)
DIR/secateur/recipe.yaml             every setting resolved
DIR/secateur/events.jsonl            the log
DIR/secateur/blocks/00003.json       a block is done when this exists (records of its matrices)
DIR/secateur/masks/00003.safetensors its masks
DIR/secateur/recovered.json          what recovery did; from then on the blocks' weights are in
                                     DIR/model-recovered-00000.safetensors ...
DIR/secateur/recovery/               its checkpoint and metrics.jsonl
DIR/secateur/state/                  what the next block is fed with (the last boundary only)
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Set
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from secateur.errors import SecateurError, UsageError
from secateur.files import told_plainly, write_json, write_text
from secateur.recipe import Recipe
from secateur.recipe_vision import VisionRecipe
from secateur.tensorfile import save_tensors

_BEFORE_WORK = {"lock", "run.json", "recipe.yaml", "events.jsonl"}
"""What is in ``secateur/`` before a run has done anything."""

RECOVERED = "recovered.json"
"""Under ``secateur/``: the recovery's record, written when all its weights are on disk."""


class RunFolder:
    """Opens (and locks) ``path`` for one run; a finished block never has to be done again.

    Args:
        path: the folder; created when missing.
        identity: everything the pruned weights depend on. A folder that holds another
            identity is refused, naming what differs.
        fresh: throw away what an earlier run left.
        rank: this process among those that share the run; only rank 0 locks and writes
            (each rank keeps its own boundary).

    Raises:
        UsageError: the folder is in use, holds another run, or holds foreign files.
    """

    def __init__(
        self,
        path: Path,
        identity: dict[str, Any],
        *,
        fresh: bool = False,
        rank: int = 0,
    ) -> None:
        self.path = path
        self.rank = rank
        self.inner = path / "secateur"
        self._started = time.monotonic()
        self._lock: IO[str] | None = None
        self._made = False
        if rank == 0:
            self._take(identity, fresh)

    def _take(self, identity: dict[str, Any], fresh: bool) -> None:
        path = self.path
        self._made = not path.exists()
        if path.exists() and not path.is_dir():
            raise UsageError("is a file, not a folder", field="out", value=str(path))
        if path.is_dir() and any(path.iterdir()) and not (self.inner / "run.json").exists():
            # An earlier attempt may have left nothing but its lock.
            ours = self.inner.is_dir() and {p.name for p in self.inner.iterdir()} <= {"lock"}
            known = {"secateur"} if ours else set()
            foreign = sorted(p.name for p in path.iterdir() if p.name not in known)
            if foreign:
                raise UsageError(
                    f"the folder holds other files ({', '.join(foreign[:3])}...)",
                    field="out",
                    value=str(path),
                    fix="choose an empty or new folder",
                )
        with told_plainly(path):
            self.inner.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.inner / "lock", "a")  # noqa: SIM115
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise UsageError(
                "another run is writing to this folder",
                field="out",
                value=str(path),
                fix="wait for it, or choose another --out",
            ) from None
        try:
            if fresh:
                self._clear()
            self._sweep()
            self._claim(identity)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Release the folder."""
        if self._lock is not None:
            self._lock.close()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.rank == 0 and kind is not None and issubclass(kind, UsageError):
            self._vanish()
        self.close()

    def _vanish(self) -> None:
        """A request that was refused before any work leaves no trace."""
        if self._begun():
            return
        shutil.rmtree(self.inner)
        if self._made:
            self.path.rmdir()

    # -- what this folder is -------------------------------------------------------------------

    def _claim(self, identity: dict[str, Any]) -> None:
        marker = self.inner / "run.json"
        # Through JSON, so that tuples and lists compare equal.
        identity = json.loads(json.dumps(identity, default=str))
        if marker.exists():
            try:
                found = json.loads(marker.read_text())
            except ValueError:
                found = {}
            if found != identity and not self._begun({"evidence"}):  # that has keys of its own
                write_json(marker, identity)
                return
            for key in identity:
                if found.get(key) != identity[key]:
                    raise UsageError(
                        f"the folder holds a run with {key}={found.get(key)!r}",
                        field=key,
                        value=identity[key],
                        fix="choose another --out, or --fresh to throw that run away",
                    )
        else:
            write_json(marker, identity)

    def _begun(self, besides: Set[str] = frozenset()) -> bool:
        """Whether there is anything to lose: a run refused at its start leaves only its name."""
        if any(item != self.inner for item in self.path.iterdir()):
            return True
        return not {item.name for item in self.inner.iterdir()} <= _BEFORE_WORK | besides

    def _sweep(self) -> None:
        """Remove what a killed writer left half-written."""
        for part in self.path.rglob(".*.part"):
            part.unlink(missing_ok=True)
        for folder in self.path.glob(".config.*"):
            shutil.rmtree(folder, ignore_errors=True)

    def _clear(self) -> None:
        for item in self.path.iterdir():
            if item == self.inner:
                continue
            shutil.rmtree(item) if item.is_dir() else item.unlink()
        for item in self.inner.iterdir():
            if item.name != "lock":
                shutil.rmtree(item) if item.is_dir() else item.unlink()

    # -- log and small records -----------------------------------------------------------------

    def event(self, kind: str, **facts: Any) -> None:
        """Append one line to the log."""
        if self.rank != 0:
            return
        line = {"t": round(time.monotonic() - self._started, 3), "event": kind, **facts}
        with told_plainly(self.inner / "events.jsonl"), open(self.inner / "events.jsonl", "a") as f:
            f.write(json.dumps(line, default=str) + "\n")

    def save(self, name: str, record: Any) -> None:
        """Write a JSON record under ``secateur/``."""
        if self.rank == 0:
            write_json(self.inner / name, record)

    def read(self, name: str) -> Any:
        """A JSON record from under ``secateur/``, or None."""
        path = self.inner / name
        if not path.exists():
            return None
        try:
            return json.loads(path.read_text())
        except ValueError:
            return None

    def save_recipe(self, recipe: Recipe | VisionRecipe) -> None:
        """The resolved recipe, for people."""
        if self.rank == 0:
            write_text(self.inner / "recipe.yaml", recipe.yaml())

    # -- blocks --------------------------------------------------------------------------------

    def shard(self, block: int) -> Path:
        """Where a block's weights go, or have gone once they were recovered."""
        if (self.inner / RECOVERED).exists():
            return self.recovered_shard(block)
        return self.path / f"model-block-{block:05d}.safetensors"

    def recovered_shard(self, block: int) -> Path:
        """Where a block's weights go after recovery; the cut ones stay until all are there."""
        return self.path / f"model-recovered-{block:05d}.safetensors"

    def mask_shard(self, block: int) -> Path:
        """Where a block's masks go until they are joined."""
        return self.inner / "masks" / f"{block:05d}.safetensors"

    def block_record(self, block: int) -> dict[str, Any] | None:
        """What is known of a finished block, None when it has to be done (again)."""
        record = self.read(f"blocks/{block:05d}.json")
        present = self.shard(block).exists() and self.mask_shard(block).exists()
        return record if record and present else None

    # -- the boundary: what the next block is fed with -----------------------------------------

    @property
    def _boundary(self) -> Path:
        return self.inner / "state" / f"boundary-{self.rank}.safetensors"

    def save_boundary(self, block: int, hidden: list[Tensor]) -> None:
        """Remember the inputs of ``block``; only the last boundary is kept."""
        path = self._boundary
        tensors = {f"{b:06d}": h.contiguous().cpu() for b, h in enumerate(hidden)}
        save_tensors(path, tensors, {"block": str(block)})

    def load_boundary(self, device: torch.device) -> tuple[int, list[Tensor]] | None:
        """The last boundary (block, inputs), or None."""
        path = self._boundary
        if not path.exists():
            return None
        from safetensors import safe_open

        try:
            with safe_open(str(path), "pt") as file:
                block = int(file.metadata()["block"])
            tensors = load_file(path, device=str(device))
        except (SafetensorError, OSError, ValueError, KeyError):
            return None
        return block, [tensors[k] for k in sorted(tensors)]

    def drop_state(self) -> None:
        """Forget the boundary once the run is over."""
        shutil.rmtree(self.inner / "state", ignore_errors=True)


def writable(path: Path) -> None:
    """Fail before any work is done if ``path`` cannot become a run's folder."""
    parent = path
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise UsageError("is inside a file", field="out", value=str(path))
    if not os.access(parent, os.W_OK):
        raise SecateurError(
            "cannot be written to", field="out", value=str(path), fix="choose another --out"
        )
