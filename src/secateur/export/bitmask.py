"""Sparse weights in few bytes: kept values plus one bit per weight.

A matrix ``p.weight`` (rows, columns) becomes, as in the published ``sparse-bitmask`` layout
of compressed-tensors (2025-10):

- ``p.compressed``: the kept values, row after row, in the weight's type;
- ``p.bitmask``: uint8 (rows, ceil(columns / 8)), least significant bit first, 1 = kept;
- ``p.shape``: int64, the dense shape;
- ``p.row_offsets``: where each row starts in ``compressed`` (int32 while it fits).

At 50 % and bfloat16 that is 1/2 + 1/16 = 56.25 % of the dense bytes plus four per row.
The bits come from the run's masks, not from the values: a kept weight that happens to be
zero stays kept. All other tensors are stored as they are. The file is called
``model.bitmask.safetensors`` so that plain ``from_pretrained`` refuses the folder instead
of filling it with random weights; ``secateur.export.load_pruned`` opens it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.errors import SecateurError, UsageError, VerificationError
from secateur.export.folder import ModelFolder, copy_side_files, new_folder
from secateur.masks.store import MaskStore, check_mask, pack, packed_shape, popcount, unpack
from secateur.progress import SILENT, Progress
from secateur.tensorfile import TensorFiles, TensorSpec, TensorWriter

FILE_NAME = "model.bitmask.safetensors"
PARTS = ("compressed", "bitmask", "shape", "row_offsets")


def compress(weight: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """The four parts of ``weight`` under ``mask`` (same shape, True = pruned).

    Raises:
        VerificationError: a pruned weight is not zero.
    """
    check_mask("weight", mask, weight)
    keep = ~mask.cpu()
    return {
        "compressed": weight.detach().cpu()[keep],
        "bitmask": pack(keep).reshape(-1, packed_shape(tuple(keep.shape))[-1]),
        "shape": torch.tensor(weight.shape, dtype=torch.int64),
        "row_offsets": _row_offsets(keep).to(_offset_type(weight.numel())),
    }


def decompress(parts: Mapping[str, Tensor], name: str = "weight") -> Tensor:
    """The dense weight; pruned places are zero.

    Raises:
        SecateurError: the parts contradict each other; names the matrix.
    """
    keep = kept(parts, name)
    values = parts["compressed"]
    dense = torch.zeros(keep.shape, dtype=values.dtype)
    dense[keep] = values
    return dense


def kept(parts: Mapping[str, Tensor], name: str = "weight") -> Tensor:
    """The bool mask of kept weights, checked against the other parts."""
    shape = tuple(int(size) for size in parts["shape"])
    bits = parts["bitmask"]
    if not shape or min(shape) < 0:
        raise SecateurError(f"'{name}': {shape} is no shape of a matrix")
    # popcount first: it costs an eighth of unpacking and finds most damage.
    if popcount(bits) != parts["compressed"].numel():
        raise SecateurError(
            f"'{name}': the bitmask keeps {popcount(bits)} weights, "
            f"but {parts['compressed'].numel()} values are stored",
            fix="the container is damaged: export it again",
        )
    try:
        keep = unpack(bits.reshape(packed_shape(shape)), shape)
    except (SecateurError, RuntimeError) as error:
        raise SecateurError(
            f"'{name}': the bitmask does not fit the shape {shape} ({error})",
            fix="the container is damaged: export it again",
        ) from error
    offsets = parts.get("row_offsets")
    if offsets is not None and not torch.equal(offsets.long(), _row_offsets(keep)):
        raise SecateurError(
            f"'{name}': the bitmask and the row offsets disagree",
            fix="the container is damaged: export it again",
        )
    return keep


def export_bitmask(
    folder: Path | str,
    out: Path | str,
    dtype: torch.dtype | None = None,
    masks: Mapping[str, Tensor] | None = None,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Turn a pruned Hugging Face folder into one with a bitmask container.

    Reads, checks and writes one tensor at a time, then opens the result and compares it with
    the source, again one tensor at a time.

    Args:
        folder: config, tokenizer, safetensors weights and ``masks.safetensors``.
        out: new folder.
        dtype: store floating point weights in this type; by default as they are.
        masks: instead of the folder's own.

    Returns:
        ``bytes`` and ``dense_bytes`` (the weights in the same type), their ``ratio``, the
        same for the pruned ``matrices`` alone, ``pruned`` weights and the ``file``.

    Raises:
        UsageError: no masks, or ``out`` is in the way.
        VerificationError: a pruned weight is not zero, or the copy differs.
    """
    source = ModelFolder(folder, masks)
    source.require_stock()
    if not source.masks:
        raise UsageError(
            "there are no masks, so nothing says which zeros were pruned",
            field="masks",
            value=str(folder),
            fix="point to a folder written by `secateur prune`",
        )
    specs: dict[str, TensorSpec] = {}
    prefixes: dict[str, str] = {}
    dense, sparse_dense, sparse = 0, 0, 0
    for name in source.tensors.names():
        spec = _cast_spec(source.tensors.spec(name), dtype)
        dense += spec.nbytes
        mask = source.mask(name)
        if mask is None:
            specs[name] = spec
            continue
        prefix = name.removesuffix(".weight")
        prefixes[prefix] = name
        parts = _part_specs(spec, prod(spec.shape) - int(mask.sum()))
        specs |= {f"{prefix}.{part}": s for part, s in parts.items()}
        sparse_dense += spec.nbytes
        sparse += sum(s.nbytes for s in parts.values())
    with new_folder(out) as temporary:
        copy_side_files(source.path, temporary)
        _write(source, temporary / FILE_NAME, specs, prefixes, dtype, progress)
        pruned = _compare(source, temporary / FILE_NAME, dtype, progress)
        size = (temporary / FILE_NAME).stat().st_size
    return {
        "file": str(Path(out) / FILE_NAME),
        "bytes": size,
        "dense_bytes": dense,
        "ratio": size / dense,
        "matrices": {
            "count": len(prefixes),
            "bytes": sparse,
            "dense_bytes": sparse_dense,
            "ratio": sparse / max(1, sparse_dense),
        },
        "pruned": pruned,
        "verified": True,
    }


def load_bitmask(path: Path | str) -> dict[str, Tensor]:
    """The dense state dict of a container (the file, or the folder that holds it).

    Files of the published layout without our header are read too; their matrices are taken
    to be called ``<prefix>.weight``.

    Raises:
        SecateurError: the container is damaged; names the matrix.
    """
    return dict(iter_bitmask(path))


def iter_bitmask(path: Path | str) -> Iterator[tuple[str, Tensor]]:
    """``load_bitmask`` one tensor at a time."""
    files = TensorFiles([container(path)])
    matrices = _matrices(files)
    for prefix, name in matrices.items():
        yield name, decompress(_parts(files, prefix), name)
    inside = {f"{prefix}.{part}" for prefix in matrices for part in PARTS}
    for name in files.names():
        if name not in inside:
            yield name, files.get(name)


def load_kept(path: Path | str) -> dict[str, Tensor]:
    """The masks inside a container: tensor name -> bool, True = pruned."""
    files = TensorFiles([container(path)])
    return {name: ~kept(_parts(files, prefix), name) for prefix, name in _matrices(files).items()}


def container(path: Path | str) -> Path:
    """The container file of ``path``."""
    path = Path(path)
    return path / FILE_NAME if path.is_dir() else path


def _parts(files: TensorFiles, prefix: str) -> dict[str, Tensor]:
    names = {part: f"{prefix}.{part}" for part in PARTS}
    return {part: files.get(name) for part, name in names.items() if name in files}


def _matrices(files: TensorFiles) -> dict[str, str]:
    """prefix -> full tensor name, of every matrix of the container."""
    header = files.metadata[0].get("secateur.bitmask")
    if header is not None:
        names: dict[str, str] = json.loads(header)["matrices"]
    else:
        ends = [n.removesuffix(".bitmask") for n in files.names() if n.endswith(".bitmask")]
        names = {prefix: f"{prefix}.weight" for prefix in ends}
    for prefix, name in names.items():
        for part in ("compressed", "bitmask", "shape"):
            if f"{prefix}.{part}" not in files:
                raise SecateurError(f"'{files.paths[0]}' lacks the {part} of '{name}'")
    return names


def _write(
    source: ModelFolder,
    path: Path,
    specs: dict[str, TensorSpec],
    prefixes: dict[str, str],
    dtype: torch.dtype | None,
    progress: Progress,
) -> None:
    words = source.masks.metadata if isinstance(source.masks, MaskStore) else {}
    header = {"layout": "sparse-bitmask", "matrices": prefixes, "masks": words}
    metadata = {"format": "pt", "secateur.bitmask": json.dumps(header, sort_keys=True)}
    names = source.tensors.names()
    with (
        progress.stage("packing", len(names), "tensors") as advance,
        TensorWriter(path, specs, metadata) as writer,
    ):
        for name in names:
            tensor = _cast(source.tensors.get(name), dtype)
            mask = source.mask(name)
            if mask is None:
                writer.write(name, tensor)
            else:
                check_mask(name, mask, tensor)
                prefix = name.removesuffix(".weight")
                for part, data in compress(tensor, mask).items():
                    writer.write(f"{prefix}.{part}", data)
            advance(1)


def _compare(source: ModelFolder, path: Path, dtype: torch.dtype | None, progress: Progress) -> int:
    """Re-open the container and compare it with its source; returns the pruned weights."""
    left, pruned = set(source.tensors.names()), 0
    with progress.stage("verifying", len(left), "tensors") as advance:
        for name, tensor in iter_bitmask(path):
            if not torch.equal(tensor, _cast(source.tensors.get(name), dtype)):
                raise VerificationError(f"'{name}' came back different from the container")
            mask = source.mask(name)
            pruned += 0 if mask is None else int(mask.sum())
            left.discard(name)
            advance(1)
    if left:
        raise VerificationError(f"the container lost {len(left)} tensors, such as '{min(left)}'")
    return pruned


def _part_specs(spec: TensorSpec, values: int) -> dict[str, TensorSpec]:
    rows = prod(spec.shape[:-1])
    return {
        "compressed": TensorSpec(spec.dtype, (values,)),
        "bitmask": TensorSpec(torch.uint8, (rows, packed_shape(spec.shape)[-1])),
        "shape": TensorSpec(torch.int64, (len(spec.shape),)),
        "row_offsets": TensorSpec(_offset_type(prod(spec.shape)), (rows,)),
    }


def _row_offsets(keep: Tensor) -> Tensor:
    per_row = keep.reshape(-1, keep.shape[-1]).sum(1)
    return torch.cumsum(per_row, 0) - per_row


def _offset_type(elements: int) -> torch.dtype:
    return torch.int32 if elements < 2**31 else torch.int64


def _cast_spec(spec: TensorSpec, dtype: torch.dtype | None) -> TensorSpec:
    return TensorSpec(dtype, spec.shape) if dtype and spec.dtype.is_floating_point else spec


def _cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor
