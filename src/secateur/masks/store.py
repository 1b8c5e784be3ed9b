"""The bit-packed record of what was pruned: one safetensors file, one bit per weight.

``masks.safetensors`` holds, per matrix, a uint8 tensor of shape ``(..., ceil(columns / 8))``
whose bit ``j % 8`` (least significant first) of byte ``j // 8`` is column ``j``; 1 = pruned.
Shapes and the run's own words (method, target, scope) lie in the header. Masks are recorded
when they are made and never inferred from zeros afterwards: a kept weight may be zero.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from secateur.errors import SecateurError, UsageError, VerificationError
from secateur.tensorfile import TensorSpec, TensorWriter, opened

FILE_NAME = "masks.safetensors"
_FORMAT = "secateur.masks.1"


def pack(mask: Tensor) -> Tensor:
    """Pack a bool mask (..., columns) into bits, uint8 (..., ceil(columns / 8)).

    >>> pack(torch.tensor([[True, False, True]])).tolist()
    [[5]]
    """
    if mask.dtype is not torch.bool or mask.ndim == 0:
        raise UsageError(
            "a mask is a bool tensor of one dimension or more", field="mask", value=mask.dtype
        )
    bits = np.packbits(mask.detach().cpu().numpy(), axis=-1, bitorder="little")
    return torch.from_numpy(bits)


def unpack(packed: Tensor, shape: Iterable[int]) -> Tensor:
    """The bool mask of ``shape`` that ``pack`` packed.

    >>> unpack(torch.tensor([[5]], dtype=torch.uint8), (1, 3)).tolist()
    [[True, False, True]]

    Raises:
        SecateurError: the sizes disagree, or a bit is set beyond the last column.
    """
    shape = tuple(int(size) for size in shape)
    expected = packed_shape(shape)
    if packed.dtype is not torch.uint8 or tuple(packed.shape) != expected:
        raise SecateurError(
            f"a packed mask of shape {shape} is uint8 {expected}, "
            f"not {packed.dtype} {tuple(packed.shape)}"
        )
    array = packed.cpu().numpy()
    if shape[-1] % 8 and array.size and int(array[..., -1].max()) >> (shape[-1] % 8):
        raise SecateurError(f"a packed mask of shape {shape} has bits beyond its last column")
    bits = np.unpackbits(array, axis=-1, count=shape[-1], bitorder="little")
    return torch.from_numpy(bits.view(np.bool_))


def packed_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the packed form of a mask of ``shape``."""
    return (*shape[:-1], -(-shape[-1] // 8))


def save_masks(
    path: Path | str, masks: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None
) -> None:
    """Write ``masks`` (name -> bool, True = pruned) to ``path``, atomically.

    Args:
        path: usually ``<run folder>/masks.safetensors``.
        masks: named like the matrix's parameter, with or without its ``.weight``.
        metadata: JSON-able words about the masks. The key ``transposed`` is read back: a
            list of the names whose checkpoint tensor is the transpose of the mask (GPT-2's
            Conv1D keeps its weights as (d_in, d_out)).
    """
    specs = {
        name: TensorSpec(torch.uint8, packed_shape(tuple(mask.shape)))
        for name, mask in masks.items()
    }
    shapes = {name: list(mask.shape) for name, mask in masks.items()}
    with TensorWriter(path, specs, _header(shapes, metadata or {})) as writer:
        for name, mask in masks.items():
            writer.write(name, pack(mask))


def load_masks(path: Path | str) -> MaskStore:
    """Open a mask file, or the one inside a run folder; masks unpack when they are asked for."""
    path = Path(path)
    return MaskStore(path / FILE_NAME if path.is_dir() else path)


class MaskStore(Mapping[str, Tensor]):
    """The masks of a file as a read-only mapping: name -> bool tensor, True = pruned."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        with opened(self.path) as handle:
            header = handle.metadata() or {}
            if header.get("format") != _FORMAT:
                raise UsageError(
                    "not a mask file",
                    field="masks",
                    value=str(self.path),
                    fix=f"point to the {FILE_NAME} of a run folder",
                )
            shapes = json.loads(header["shapes"])
            if set(shapes) != set(handle.keys()):
                raise SecateurError(f"'{self.path}' lists other matrices than it holds")
            self.metadata: dict[str, Any] = json.loads(header["metadata"])
            self.shapes: dict[str, tuple[int, ...]] = {
                name: tuple(shape) for name, shape in sorted(shapes.items())
            }

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def __contains__(self, name: object) -> bool:
        return name in self.shapes

    def __getitem__(self, name: str) -> Tensor:
        packed = self.packed(name)
        try:
            return unpack(packed, self.shapes[name])
        except SecateurError as error:
            raise SecateurError(f"'{self.path}', matrix '{name}': {error.message}") from error

    def packed(self, name: str) -> Tensor:
        """The bits as they are stored, uint8 (..., ceil(columns / 8))."""
        if name not in self.shapes:
            raise KeyError(name)
        with opened(self.path) as handle:
            tensor: Tensor = handle.get_tensor(name)
            return tensor

    def counts(self) -> dict[str, int]:
        """Pruned weights per matrix."""
        return {name: popcount(self.packed(name)) for name in self}

    def stored(self, name: str) -> Tensor:
        """The mask in the orientation of the checkpoint's tensor (see ``save_masks``)."""
        mask = self[name]
        return mask.T.contiguous() if name in self.metadata.get("transposed", ()) else mask


def popcount(packed: Tensor) -> int:
    """Bits set in a packed mask."""
    return int(_ONES[packed.cpu().numpy()].sum(dtype=np.int64))


def merge_masks(
    shards: Iterable[Path | str], path: Path | str, metadata: Mapping[str, Any] | None = None
) -> None:
    """Join shard files into one, a matrix at a time.

    Words that all shards agree on are kept, their ``transposed`` lists are joined, and
    ``metadata`` is added on top.

    Raises:
        SecateurError: a matrix is in two shards.
    """
    stores = [load_masks(shard) for shard in shards]
    owner: dict[str, MaskStore] = {}
    for store in stores:
        for name in store:
            if name in owner:
                raise SecateurError(
                    f"the mask of '{name}' is both in '{owner[name].path}' and in '{store.path}'"
                )
            owner[name] = store
    first = stores[0].metadata if stores else {}
    agreed = {k: v for k, v in first.items() if all(s.metadata.get(k) == v for s in stores)}
    transposed = {name for store in stores for name in store.metadata.get("transposed", ())}
    if transposed:
        agreed["transposed"] = sorted(transposed)
    words = agreed | dict(metadata or {})
    shapes = {name: list(store.shapes[name]) for name, store in owner.items()}
    specs = {
        name: TensorSpec(torch.uint8, packed_shape(store.shapes[name]))
        for name, store in owner.items()
    }
    with TensorWriter(path, specs, _header(shapes, words)) as writer:
        for name, store in owner.items():
            writer.write(name, store.packed(name))


def tensor_name(name: str, known: Any) -> str | None:
    """The tensor that the mask ``name`` is about: of that name, or with ``.weight`` after it."""
    return next((n for n in (name, f"{name}.weight") if n in known), None)


def check_masks(masks: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Prove that every pruned weight is exactly zero.

    Args:
        masks: name -> bool, True = pruned; a ``MaskStore`` or a dict.
        tensors: name -> weight of the mask's shape (a store's transposed masks are turned).

    Returns:
        Pruned weights per matrix, as counted on the masks.

    Raises:
        VerificationError: a weight under the mask is not zero (NaN is not), shapes differ,
            or the weight is missing; names the matrix and the count.
    """
    counts: dict[str, int] = {}
    for name in masks:
        mask = masks.stored(name) if isinstance(masks, MaskStore) else masks[name]
        where = tensor_name(name, tensors)
        if where is None:
            raise VerificationError(f"there is a mask for '{name}' but no such weight")
        check_mask(name, mask, tensors[where])
        counts[name] = int(mask.sum())
    return counts


def check_mask(name: str, mask: Tensor, weight: Tensor) -> None:
    """``check_masks`` for one matrix."""
    if mask.shape != weight.shape:
        raise VerificationError(
            f"the mask of '{name}' is {tuple(mask.shape)}, its weight {tuple(weight.shape)}"
        )
    alive = int(torch.count_nonzero(weight[mask.to(weight.device)]))
    if alive:
        raise VerificationError(
            f"'{name}': {alive} of {int(mask.sum())} pruned weights are not zero",
            fix="apply the masks again (weight[mask] = 0), or prune again",
        )


def _header(shapes: Mapping[str, list[int]], metadata: Mapping[str, Any]) -> dict[str, str]:
    return {
        "format": _FORMAT,
        "shapes": json.dumps(shapes, sort_keys=True),
        "metadata": json.dumps(dict(metadata), sort_keys=True),
    }


_ONES = np.array([bin(byte).count("1") for byte in range(256)], dtype=np.uint8)
