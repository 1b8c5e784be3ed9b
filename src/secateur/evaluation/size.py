"""Bytes: of a folder's weights, of a model in memory, and of what an export would take."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from secateur.errors import UsageError
from secateur.masks.target import Target

WEIGHT_SUFFIXES = (".safetensors", ".gguf", ".bin", ".pt", ".pth")


def weight_bytes(path: Path | str) -> int:
    """Bytes on disk of the weights in a file or folder; masks kept beside them do not count.

    Raises:
        UsageError: no weights there.
    """
    path = Path(path)
    files = [path] if path.is_file() else _weight_files(path)
    if not files:
        raise UsageError("there are no weights in it", field="folder", value=str(path))
    return sum(file.stat().st_size for file in files)


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return [folder / name for name in sorted(names)]
    found = [f for f in sorted(folder.glob("*")) if f.suffix in WEIGHT_SUFFIXES]
    return [f for f in found if not f.name.startswith("masks.")]


def memory_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers; tied ones once, those on ``meta`` as if present."""
    seen: dict[Any, int] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        key = id(tensor) if tensor.is_meta else tensor.untyped_storage().data_ptr()
        seen[key] = max(seen.get(key, 0), tensor.numel() * tensor.element_size())
    return sum(seen.values())


def predicted_bytes(
    model: nn.Module, masks: Mapping[str, Tensor], target: Target | None = None
) -> dict[str, int | None]:
    """What the model would take when its masked matrices are stored sparsely.

    Args:
        masks: (d_out, d_in) bool each, True where pruned.
        target: the request; 2:4 storage is only foretold for ``2:4``, and only where every
            matrix keeps half (an uneven plan mixes patterns).

    Returns:
        ``bitmask``: kept values, one bit per weight and four bytes per row
        (``secateur.export.bitmask``); ``semi_structured``: half of the values and two bits for
        each kept one (PyTorch's 2:4 tensors), None for any other target.
    """
    itemsize = next(p.element_size() for p in model.parameters() if p.is_floating_point())
    dense = memory_bytes(model)
    pruned = sum(mask.numel() for mask in masks.values()) * itemsize
    bitmask = 0
    for mask in masks.values():
        rows = mask.numel() // mask.shape[-1]
        kept = mask.numel() - int(mask.count_nonzero())
        bitmask += kept * itemsize + rows * ((mask.shape[-1] + 7) // 8 + 4)
    halves = None
    even = all(2 * int(mask.count_nonzero()) == mask.numel() for mask in masks.values())
    if target is not None and (target.keep, target.group) == (2, 4) and even:
        halves = dense - pruned + pruned // 2 + sum(mask.numel() for mask in masks.values()) // 8
    return {"bitmask": dense - pruned + bitmask, "semi_structured": halves}
