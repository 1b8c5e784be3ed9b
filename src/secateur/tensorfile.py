"""Safetensors files written one tensor at a time, with the same bytes every time.

``safetensors.save_file`` wants every tensor in memory at once and writes its metadata in an
order that changes from run to run. Here the layout (names, types, shapes) is laid down first
and tensors follow in any order, so a file of any size costs one tensor of memory and equal
content gives equal bytes. The file appears under its name only when it is complete.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from secateur.errors import SecateurError, UsageError
from secateur.files import replacing

_CODES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
DTYPES = {code: dtype for dtype, code in _CODES.items()}


@dataclass(frozen=True)
class TensorSpec:
    """Type and shape of a tensor that is yet to be written."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> TensorSpec:
        """The spec of ``tensor``."""
        return cls(tensor.dtype, tuple(tensor.shape))

    @property
    def nbytes(self) -> int:
        """Bytes of data."""
        return prod(self.shape) * self.dtype.itemsize


class TensorWriter:
    """A safetensors file under construction; use as a context manager.

    Leaving the block normally completes the file atomically; leaving it by an exception
    removes the temporary file and touches nothing else.

    Args:
        path: where the file will appear.
        specs: every tensor the file will hold.
        metadata: strings to strings, as the format wants.
    """

    def __init__(
        self,
        path: Path | str,
        specs: Mapping[str, TensorSpec],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.path = Path(path)
        self.specs = dict(specs)
        self._offsets: dict[str, int] = {}
        header: dict[str, Any] = {}
        if metadata:
            header["__metadata__"] = dict(sorted(metadata.items()))
        offset = 0
        # Widest types first keeps every tensor aligned to its own size.
        for name in sorted(specs, key=lambda n: (-specs[n].dtype.itemsize, n)):
            spec = specs[name]
            if spec.dtype not in _CODES:
                raise UsageError(
                    f"'{name}' has a type safetensors does not know",
                    field="dtype",
                    value=spec.dtype,
                )
            header[name] = {
                "dtype": _CODES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [offset, offset + spec.nbytes],
            }
            self._offsets[name] = offset
            offset += spec.nbytes
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self._start = 8 + len(text)
        self._size = self._start + offset
        self._missing = set(specs)
        with ExitStack() as stack:
            temporary = stack.enter_context(replacing(self.path))
            self._file = stack.enter_context(open(temporary, "wb"))
            self._file.write(struct.pack("<Q", len(text)) + text)
            self._stack = stack.pop_all()

    def write(self, name: str, tensor: Tensor) -> None:
        """Put the data of ``name``; its type and shape must be those announced."""
        spec = self.specs[name]
        if TensorSpec.of(tensor) != spec:
            raise ValueError(f"'{name}': announced {spec}, given {TensorSpec.of(tensor)}")
        self._file.seek(self._start + self._offsets[name])
        flat = tensor.detach().to("cpu").contiguous().reshape(-1)
        if flat.numel():
            self._file.write(flat.view(torch.uint8).numpy().data)
        self._missing.discard(name)

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None and self._missing:
            error = ValueError(f"never written: {', '.join(sorted(self._missing))}")
            self._stack.__exit__(ValueError, error, None)
            raise error
        with self._stack:
            if error is not None:
                raise error
            self._file.truncate(self._size)


def save_tensors(
    path: Path | str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write all of ``tensors`` at once (deterministic and atomic)."""
    specs = {name: TensorSpec.of(tensor) for name, tensor in tensors.items()}
    with TensorWriter(path, specs, metadata) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)


@contextmanager
def opened(path: Path | str) -> Any:
    """``safe_open`` whose failures are ours: a missing or damaged file is named."""
    path = Path(path)
    if not path.is_file():
        raise UsageError("there is no such file", field="path", value=str(path))
    try:
        with safe_open(path, framework="pt") as handle:
            yield handle
    except SafetensorError as error:
        raise SecateurError(
            f"'{path}' is damaged or not a safetensors file ({error})",
            fix="write it again from its source",
        ) from error


class TensorFiles:
    """Read-only view of the tensors of one or several safetensors files, opened on demand."""

    def __init__(self, paths: Iterable[Path | str]) -> None:
        self.paths = [Path(path) for path in paths]
        self._where: dict[str, Path] = {}
        self._specs: dict[str, TensorSpec] = {}
        self.metadata: list[dict[str, str]] = []
        for path in self.paths:
            with opened(path) as handle:
                self.metadata.append(handle.metadata() or {})
                for name in handle.keys():  # noqa: SIM118 - safe_open is no mapping
                    if name in self._where:
                        raise SecateurError(
                            f"'{name}' is both in '{self._where[name].name}' and in '{path.name}'"
                        )
                    view = handle.get_slice(name)
                    self._where[name] = path
                    self._specs[name] = TensorSpec(
                        DTYPES[view.get_dtype()], tuple(view.get_shape())
                    )

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted(self._where)

    def __contains__(self, name: object) -> bool:
        return name in self._where

    def spec(self, name: str) -> TensorSpec:
        """Type and shape, without reading the data."""
        return self._specs[name]

    def get(self, name: str) -> Tensor:
        """Read one tensor."""
        with opened(self._where[name]) as handle:
            tensor: Tensor = handle.get_tensor(name)
            return tensor

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors' data."""
        return sum(spec.nbytes for spec in self._specs.values())
