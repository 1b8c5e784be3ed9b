"""A finished run's model in other forms, each re-opened and compared by its exporter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from secateur.errors import UsageError
from secateur.models.loading import DTYPES
from secateur.models.vision.loading import MANIFEST
from secateur.progress import SILENT, Progress

FORMATS = ("bitmask", "gguf", "2:4", "onnx")


def export(
    folder: Path,
    kind: str,
    out: Path | None,
    *,
    dtype: str | None = None,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Export ``folder`` as ``bitmask``, ``gguf``, ``2:4`` or ``onnx``; vision runs as
    ``onnx`` or ``state-dict``.

    Returns:
        The exporter's record, with ``lines`` for a person.
    """
    if (folder / MANIFEST).is_file():
        from secateur.run.vision_commands import export_vision

        return export_vision(folder, kind, out, progress)
    if kind not in FORMATS:
        raise UsageError("unknown format", field="format", value=kind, fix=", ".join(FORMATS))
    if kind == "2:4":
        return _semi_structured(folder, dtype)
    if out is None:
        raise UsageError("is required for this format", field="out", fix="--out PATH")
    if kind == "bitmask":
        from secateur.export.bitmask import export_bitmask

        record = export_bitmask(folder, out, _dtype(dtype), progress=progress)
        lines = [
            f"{out}: {record['bytes'] / 1e6:.1f} MB, {record['ratio']:.1%} of the dense "
            f"{record['dense_bytes'] / 1e6:.1f} MB; opens with secateur.load_pruned"
        ]
        return record | {"lines": lines}
    if kind == "onnx":
        from secateur.export.onnx import export_onnx

        if dtype not in (None, "float32"):
            raise UsageError("ONNX is written in float32", field="dtype", value=dtype)
        record = export_onnx(folder, out, progress=progress)
        lines = [
            f"{out}: {record['bytes'] / 1e6:.1f} MB; onnxruntime gives the same logits "
            f"(largest difference {record['max_difference']:.2g})"
        ]
        return record | {"lines": lines}
    from secateur.export.gguf import export_gguf

    short = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
    record = export_gguf(folder, out, short.get(dtype or "", dtype or "f16"), progress=progress)
    lines = [
        f"{out}: {record['bytes'] / 1e6:.1f} MB, {record['tensors']} tensors, read back and equal"
    ]
    return record | {"lines": [*lines, *record["notes"]]}


def _dtype(name: str | None) -> torch.dtype | None:
    if name is None:
        return None
    if name not in DTYPES:
        raise UsageError("unknown type", field="dtype", value=name, fix=", ".join(DTYPES))
    return DTYPES[name]


def _semi_structured(folder: Path, dtype: str | None) -> dict[str, Any]:
    from secateur.export.loading import load_pruned
    from secateur.export.semi_structured import device_reason, measure_semi_structured

    kind = _dtype(dtype) or torch.bfloat16
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reason = device_reason(device, kind)
    if reason is not None:
        return {
            "available": False,
            "reason": reason,
            "lines": [f"2:4 is not available here: {reason}"],
        }
    model = load_pruned(folder, dtype=kind).to(device)
    linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    largest = max((m for m in linears[:-1]), key=lambda m: m.weight.numel())
    measured = measure_semi_structured(largest.weight.detach())
    return measured.record() | {"lines": [measured.verdict]}
