"""One frozen model, several N:M masks: a file of pattern numbers for each, put on at load.

``NAME.mask`` is a safetensors file with, per matrix, its groups' pattern numbers packed to 0.65
bits a weight for 2:4 (``masks.nm``); any N:M will do, another for each matrix if need be, and
patterns too many to number are stored as bits. Its header names the patterns, the shapes, and two
hashes of each: of the dense weights the mask was made for (one for another revision of a model would
fit its shapes and silently ruin it), and of the packed numbers (nearly any bytes are a mask).

>>> from secateur.models.tiny import tiny_model
>>> apply_mask(tiny_model("llama"), "code.mask")  # doctest: +SKIP
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from secateur.errors import SecateurError, UsageError
from secateur.masks.nm import (
    decode,
    encode,
    numbered,
    pack_indices,
    unpack_indices,
)
from secateur.masks.target import Target
from secateur.models.anatomy import Matrix, ModelView
from secateur.tensorfile import opened, save_tensors

_FORMAT = "secateur.nm-mask.1"

M = TypeVar("M", bound=nn.Module)


def weight_hash(matrix: Matrix) -> str:
    """A hash of a matrix's values, the same in bfloat16 and in float32 that came from it."""
    return _hash(matrix.tensor().detach().float())


def _hash(tensor: Tensor) -> str:
    data = tensor.cpu().contiguous().numpy()
    return hashlib.blake2b(data.data, digest_size=8).hexdigest()


def save_mask(
    path: Path | str,
    view: ModelView,
    masks: Mapping[str, Tensor],
    target: Target | Mapping[str, Target],
    metadata: Mapping[str, Any] | None = None,
) -> int:
    """Write the masks of a model whose weights are still dense; returns the file's bytes.

    Args:
        masks: matrix name -> (d_out, d_in) bool, True = pruned, N of every M kept.
        target: the pattern, or one for each matrix.
        metadata: JSON-able words about the masks.

    Raises:
        UsageError: a target that is no pattern.
        SecateurError: a mask that does not keep exactly N of every M.
    """
    patterns = {n: target if isinstance(target, Target) else target[n] for n in masks}
    packed = {n: _packed(mask, *_pattern(patterns[n])) for n, mask in masks.items()}
    shapes = {name: list(mask.shape) for name, mask in masks.items()}
    hashes = {name: weight_hash(view[name]) for name in masks}
    header = {
        "format": _FORMAT,
        "patterns": json.dumps({n: str(t) for n, t in patterns.items()}, sort_keys=True),
        "shapes": json.dumps(shapes, sort_keys=True),
        "weights": json.dumps(hashes, sort_keys=True),
        "packed": json.dumps({n: _hash(data) for n, data in packed.items()}, sort_keys=True),
        "metadata": json.dumps(dict(metadata or {}), sort_keys=True),
    }
    save_tensors(path, packed, header)
    return Path(path).stat().st_size


def _pattern(target: Target) -> tuple[int, int]:
    if target.keep is None or target.group is None:
        raise UsageError(
            "only an N:M mask has a mask file", field="sparsity", value=str(target), fix="e.g. 2:4"
        )
    return target.keep, target.group


def _packed(mask: Tensor, keep: int, group: int) -> Tensor:
    if numbered(keep, group):
        return pack_indices(encode(mask, keep, group), keep, group)
    if mask.shape[-1] % group or bool(((~mask).view(-1, group).sum(-1) != keep).any()):
        raise SecateurError(f"a mask does not keep {keep} of every {group}")
    return torch.from_numpy(np.packbits(~mask.cpu().numpy(), bitorder="little"))


def _unpacked(packed: Tensor, shape: tuple[int, ...], keep: int, group: int) -> Tensor:
    rows, columns = shape
    if numbered(keep, group):
        index = unpack_indices(packed, rows * columns // group, keep, group)
        return decode(index.view(rows, -1), keep, group)
    bits = np.unpackbits(packed.numpy(), count=rows * columns, bitorder="little")
    mask = torch.from_numpy(bits == 0).view(shape)
    if bool(((~mask).view(-1, group).sum(-1) != keep).any()):
        raise SecateurError(f"does not keep {keep} of every {group}")
    return mask


class MaskFile(Mapping[str, Tensor]):
    """The masks of a file, unpacked when they are asked for: name -> bool, True = pruned.

    Attributes:
        patterns, shapes, weights: of each matrix its pattern, its shape, and its dense weights' hash.
        metadata: the words that were saved with the masks.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        with opened(self.path) as handle:
            header = handle.metadata() or {}
            if header.get("format") != _FORMAT:
                raise UsageError(
                    "not a file of N:M masks",
                    field="mask",
                    value=str(self.path),
                    fix="the learned.mask that 'secateur prune --method maskllm' writes, or one of "
                    "'secateur mask make'",
                )
            try:
                self.patterns = {
                    n: Target.parse(p) for n, p in json.loads(header["patterns"]).items()
                }
                self.shapes: dict[str, tuple[int, ...]] = {
                    name: tuple(shape) for name, shape in json.loads(header["shapes"]).items()
                }
                self.weights: dict[str, str] = json.loads(header["weights"])
                self.metadata: dict[str, Any] = json.loads(header["metadata"])
                self._hashes: dict[str, str] = json.loads(header.get("packed", "{}"))
            except (KeyError, ValueError, TypeError, AttributeError, UsageError) as error:
                raise SecateurError(f"'{self.path}' has a damaged header ({error})") from None
            names = set(handle.keys())
            whole = all(len(shape) == 2 for shape in self.shapes.values())
            if not whole or not names == set(self.shapes) == set(self.patterns):
                raise SecateurError(f"'{self.path}' lists other matrices than it holds")

    @property
    def elements(self) -> int:
        """Weights that the masks are about."""
        return sum(rows * columns for rows, columns in self.shapes.values())

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.shapes:
            raise KeyError(name)
        with opened(self.path) as handle:
            packed = handle.get_tensor(name)
        if self._hashes and self._hashes.get(name) != _hash(packed):
            raise SecateurError(
                f"'{self.path}', matrix '{name}': the bytes are not those that were written",
                fix="copy or make the mask file again",
            )
        try:
            return _unpacked(packed, self.shapes[name], *_pattern(self.patterns[name]))
        except (SecateurError, RuntimeError, ValueError) as error:
            raise SecateurError(f"'{self.path}', matrix '{name}': {error}") from None


@torch.no_grad()
def apply_mask(model: M, mask: Path | str | MaskFile, *, check: bool = True) -> M:
    """Zero in place what a mask file says is gone; nothing changes if anything does not fit.

    To switch to another mask, load the dense model again: what was zeroed is gone.

    Args:
        model: the dense model the mask was made for (a transformers model, or any with the
            same matrices).
        mask: a file of ``save_mask``.
        check: compare the hash of each dense weight; False for weights that were rounded
            to another type since.

    Returns:
        ``model``.

    Raises:
        UsageError: a matrix is missing, of another shape, or holds other weights.
        SecateurError: the file is damaged.
    """
    file = mask if isinstance(mask, MaskFile) else MaskFile(mask)
    matrices = {m.name: m for m in ModelView.of(model).matrices()}
    for name, shape in file.shapes.items():
        matrix = matrices.get(name)
        if matrix is None or matrix.shape != shape:
            found = "is not in this model" if matrix is None else f"is {matrix.shape} here"
            raise UsageError(
                f"the mask's matrix '{name}' {found}",
                field="mask",
                value=str(file.path),
                fix="use the model the mask was made for",
            )
        if check and weight_hash(matrix) != file.weights.get(name):
            raise UsageError(
                f"'{name}' holds other weights than the mask was made for",
                field="mask",
                value=str(file.path),
                fix="load the dense model anew (a masked one cannot take a second mask), in the "
                "revision and type it was learned on; or do not check (check=False, --no-check)",
            )
        _ = file[name]  # whole, before anything is zeroed
    for name in file:
        matrix = matrices[name]
        matrix.tensor().masked_fill_(file[name].to(matrix.stored.device), 0)
    return model
