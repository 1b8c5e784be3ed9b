"""A checkpoint's tensors on disk, read one at a time with ordinary file reads.

The usual reader maps whole files into memory: pages once read count against the process
and a limit on its memory can refuse the map outright. Here a tensor costs its own bytes and
nothing else, so a model larger than memory can be walked through.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.errors import SecateurError, UsageError
from secateur.files import write_text
from secateur.tensorfile import DTYPES, TensorSpec, save_tensors

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

_LARGEST_HEADER = 100_000_000  # the format's own limit


def _damaged(path: Path, what: str) -> SecateurError:
    return SecateurError(
        f"'{path}' is damaged or not a safetensors file: {what}",
        fix="copy or download the file again",
    )


class Shard:
    """One safetensors file: its header in memory, its data on disk."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.specs: dict[str, TensorSpec] = {}
        self._offsets: dict[str, int] = {}
        try:
            size = self.path.stat().st_size
            with open(self.path, "rb") as file:
                self.header = self._read_header(file.read(8), file, size)
        except OSError as error:
            raise UsageError(
                f"cannot be read ({error.strerror})", field="file", value=str(self.path)
            ) from error
        end = 0
        for name, entry in self.header.items():
            if name == "__metadata__":
                continue
            spec, begin, stop = self._entry(name, entry)
            if stop > size - self._start:
                raise _damaged(
                    self.path,
                    f"truncated, '{name}' ends at byte {self._start + stop} of {size}",
                )
            self.specs[name], self._offsets[name] = spec, self._start + begin
            end = max(end, stop)
        if self._start + end != size:
            raise _damaged(self.path, f"{size - self._start - end} bytes belong to no tensor")

    def _read_header(self, prefix: bytes, file: Any, size: int) -> dict[str, Any]:
        if len(prefix) < 8:
            raise _damaged(self.path, f"only {size} bytes long")
        (length,) = struct.unpack("<Q", prefix)
        if length > min(_LARGEST_HEADER, size - 8):
            raise _damaged(self.path, f"a header of {length} bytes in a file of {size}")
        raw = file.read(length)
        self._start = 8 + length
        self.digest = hashlib.sha256(raw).hexdigest()
        try:
            header = json.loads(raw)
        except ValueError as error:
            raise _damaged(self.path, "the header is not JSON") from error
        if not isinstance(header, dict):
            raise _damaged(self.path, "the header is not a table")
        return header

    def _entry(self, name: str, entry: Any) -> tuple[TensorSpec, int, int]:
        try:
            spec = TensorSpec(DTYPES[entry["dtype"]], tuple(int(n) for n in entry["shape"]))
            begin, stop = (int(n) for n in entry["data_offsets"])
        except (KeyError, TypeError, ValueError) as error:
            raise _damaged(self.path, f"'{name}' is described as {entry!r}") from error
        if begin < 0 or stop - begin != prod(spec.shape) * spec.dtype.itemsize:
            raise _damaged(self.path, f"'{name}' has {stop - begin} bytes for {spec}")
        return spec, begin, stop

    def names(self) -> list[str]:
        """Its tensors."""
        return list(self.specs)

    def __contains__(self, name: object) -> bool:
        return name in self.specs

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one tensor."""
        return self.specs[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Of one tensor."""
        return self.specs[name].dtype

    def read(self, name: str) -> Tensor:
        """Read one tensor into fresh memory."""
        spec = self.specs[name]
        tensor = torch.empty(spec.shape, dtype=spec.dtype)
        if tensor.numel() == 0:
            return tensor
        buffer = memoryview(tensor.view(-1).view(torch.uint8).numpy().data)
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self._offsets[name])
            done = 0
            while done < len(buffer):
                count = file.readinto(buffer[done:])  # one call reads at most 2 GiB
                if not count:
                    raise _damaged(self.path, f"truncated inside '{name}'")
                done += count
        return tensor


class SafetensorsFolder:
    """All tensors of a checkpoint folder: ``model.safetensors``, or an index and its shards.

    Raises:
        UsageError: no safetensors weights in the folder, or a shard the index names is missing.
        SecateurError: a damaged file, or one that lacks a tensor the index places in it.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.files = [self.path / name for name in _shard_names(self.path)]
        self.shards = [Shard(file) for file in self.files]
        self._where = {name: shard for shard in self.shards for name in shard.specs}
        index = self.path / INDEX
        if len(self.files) > 1 or (index.is_file() and not (self.path / WEIGHTS).is_file()):
            for name, file in _read_index(index).items():
                shard = self._where.get(name)
                if shard is None or shard.path.name != file:
                    raise SecateurError(
                        f"'{index}' places '{name}' in '{file}', which does not hold it",
                        fix="copy or download the folder again",
                    )

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted(self._where)

    def __contains__(self, name: object) -> bool:
        return name in self._where

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return self._where[name].specs[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Type of a tensor, without reading it."""
        return self._where[name].specs[name].dtype

    def read(self, name: str) -> Tensor:
        """Read one tensor into fresh memory (the file is closed again at once)."""
        return self._where[name].read(name)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors' data."""
        return sum(s.specs[n].nbytes for s in self.shards for n in s.specs)

    @property
    def elements(self) -> int:
        """Numbers in all tensors."""
        return sum(prod(s.specs[n].shape) for s in self.shards for n in s.specs)


def _read_index(index: Path) -> dict[str, str]:
    try:
        table = json.loads(index.read_text("utf-8"))["weight_map"]
        return {str(k): str(v) for k, v in table.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SecateurError(
            f"'{index}' is not an index of shards", fix="copy or download the file again"
        ) from error


def _shard_names(folder: Path) -> list[str]:
    if (folder / WEIGHTS).is_file():
        return [WEIGHTS]
    if (folder / INDEX).is_file():
        names = sorted(set(_read_index(folder / INDEX).values()))
        for name in names:
            if Path(name).name != name or not (folder / name).is_file():
                raise UsageError(
                    f"the shard '{name}' named by {INDEX} is missing",
                    field="model",
                    value=str(folder),
                    fix="copy or download the folder again",
                )
        return names
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
        raise UsageError(
            "holds its weights only as pickles, which can run any code when opened",
            field="model",
            value=str(folder),
            fix="convert where you trust them: AutoModelForCausalLM.from_pretrained(folder)"
            ".save_pretrained(new_folder)",
        )
    raise UsageError(
        "holds no safetensors weights",
        field="model",
        value=str(folder),
        fix=f"a folder written by save_pretrained, with config.json and {WEIGHTS}",
    )


def write_shard(
    path: Path | str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file: atomic, durable, and the same bytes for the same tensors.

    Args:
        metadata: default ``{"format": "pt"}``, without which transformers will not load it.
    """
    save_tensors(path, tensors, {"format": "pt"} if metadata is None else metadata)


def write_index(folder: Path | str, weight_map: Mapping[str, str], total_size: int) -> None:
    """Write ``model.safetensors.index.json``: tensor name -> shard file name."""
    body = {
        "metadata": {"total_size": total_size},
        "weight_map": dict(sorted(weight_map.items())),
    }
    write_text(Path(folder) / INDEX, json.dumps(body, indent=2) + "\n")
