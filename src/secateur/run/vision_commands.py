"""What the verbs do with a vision run's folder: eval, verify, export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from secateur.data.image_sources import read_images
from secateur.errors import UsageError, VerificationError
from secateur.evaluation.accuracy import accuracy
from secateur.evaluation.image_speed import compare_image_speed
from secateur.masks.structured import StructuredMask
from secateur.models.loading import device_of
from secateur.models.vision.loading import VisionModel, load_vision, read_vision_manifest
from secateur.models.vision.saving import reopen_vision
from secateur.progress import SILENT, Progress
from secateur.run.vision import PROBE
from secateur.tensorfile import opened
from secateur.training.images import check_zeros


def evaluate_vision(
    model: str,
    images: str,
    *,
    dense: str | None = None,
    limit: int | None = None,
    batch: int = 64,
    speed: bool = False,
    device: str = "auto",
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Accuracy of a network on images, alone or beside another.

    Returns:
        ``accuracy``, ``top5``, ``loss``, ``stderr``, ``protocol``; with ``dense`` also
        ``dense_accuracy``, ``agreement`` and, with ``speed``, the ratio of times.

    Raises:
        UsageError: no such network or images; one of other classes; speed without ``dense``.
    """
    if speed and dense is None:
        raise UsageError("speed is a ratio: it needs a dense model", field="dense", value=None)
    place = device_of(device)
    with progress.stage(f"loading {model}"):
        loaded = load_vision(model)
    _refuse_untrained(loaded)
    part = None if ":" in images else "test"
    wide = None if loaded.input is None else loaded.input[0]
    test = read_images(images, part, preprocess=loaded.preprocess, channels=wide).first(limit)
    with progress.stage("evaluating"):
        measured = accuracy(loaded.model.to(place), test, batch)
    record = measured.record() | {"protocol": measured.protocol.record()}
    if dense is None:
        return record
    with progress.stage(f"loading {dense}"):
        other = load_vision(dense)
    _refuse_untrained(other)
    beside = accuracy(other.model.to(place), test, batch)
    record["dense_accuracy"] = beside.top1
    record["agreement"] = float((beside.guesses == measured.guesses).double().mean())
    if speed:
        pixels = test.first(1).batch([0]).pixels
        record["speed"] = compare_image_speed(other.model, loaded.model, pixels)
    return record


def _refuse_untrained(loaded: VisionModel) -> None:
    if not loaded.trained:
        raise UsageError(
            "has random weights", field="model", value=loaded.name, fix="the folder of a vision run"
        )


def verify_vision(
    folder: Path, report: dict[str, Any], *, load_model: bool = True, progress: Progress = SILENT
) -> dict[str, Any]:
    """Check a finished vision run against its record; see ``verifying.verify_run``."""
    manifest = read_vision_manifest(folder)
    mask = StructuredMask.parse(manifest["structure"], str(folder))
    checks = []
    with progress.stage("verifying", total=3) as advance:
        for row in report["groups"]:
            gone = mask.gone.get(row["name"])
            kept = row["before"] if gone is None else int((~gone).sum())
            if kept != row["after"]:
                raise VerificationError(
                    f"'{row['name']}': the report says {row['after']} units stay, the manifest {kept}"
                )
        checks.append(f"{len(report['groups'])} groups keep exactly the units the report says")
        advance(1)
        if not load_model or manifest["source"] is None:
            return {"folder": str(folder), "verified": True, "checks": checks}
        loaded = load_vision(folder)
        count = sum(p.numel() for p in loaded.model.parameters())
        if count != report["parameters"]["after"]:
            raise VerificationError(
                f"{count:,} parameters on disk, the report says {report['parameters']['after']:,}"
            )
        checks.append(f"{count:,} parameters on disk, as the report says")
        zeros = check_zeros(loaded.model, loaded.masks)
        if zeros != report["masks"]["gone"]:
            raise VerificationError(
                f"{zeros:,} masked weights on disk, the report says {report['masks']['gone']:,}"
            )
        if zeros:
            checks.append(f"all {zeros:,} masked weights are exactly zero on disk")
        advance(1)
        with opened(folder / "secateur" / PROBE) as file:
            pixels, logits = file.get_tensor("pixels"), file.get_tensor("logits")
        found = reopen_vision(folder, pixels, logits)
        checks.append(
            "opens with secateur.load_vision and gives the recorded logits "
            f"(largest difference {found['max_difference']:.2g})"
        )
        advance(1)
    return {"folder": str(folder), "verified": True, "checks": checks, "parameters": count, **found}


def explain_vision(folder: Path, report: dict[str, Any], name: str) -> dict[str, Any]:
    """What a vision run remembers of one group of channels, or all whose name contains ``name``.

    Raises:
        UsageError: there is none.
    """
    groups = report["groups"]
    found = [g for g in groups if g["name"] == name] or [g for g in groups if name in g["name"]]
    if not found:
        raise UsageError(
            "the run has no such group", field="module", value=name, fix=f"e.g. {groups[0]['name']}"
        )
    if len(found) > 1:
        share = {g["name"]: 1 - g["after"] / g["before"] for g in found}
        rows = [{"name": key, "sparsity": gone, "error": None} for key, gone in share.items()]
        return {"matches": rows, "groups": found}
    group = found[0]
    mask = StructuredMask.parse(read_vision_manifest(folder)["structure"]).gone.get(group["name"])
    noted: dict[str, Any] = next(
        (row for row in report["layers"] if row["name"] == group["name"]), {}
    )
    return {
        "group": {
            **group,
            "block": None,
            "unit": f"{group['kind']}s",
            "removed": group["before"] - group["after"],
            "scores": noted.get("scores"),
        },
        "method": report["recipe"]["method"],
        "gone": [] if mask is None else mask.nonzero().reshape(-1).tolist(),
    }


def export_vision(
    folder: Path, kind: str, out: Path | None, progress: Progress = SILENT
) -> dict[str, Any]:
    """Export a vision run as ``onnx`` or ``state-dict``.

    Raises:
        UsageError: another format; no ``out``. VerificationError: what was written differs.
    """
    formats = ("onnx", "state-dict")
    if kind not in formats:
        raise UsageError(
            "is no format of vision networks", field="format", value=kind, fix=", ".join(formats)
        )
    if out is None:
        raise UsageError("is required for this format", field="out", fix="--out PATH")
    from secateur.export.vision import export_image_onnx, export_state

    with progress.stage("exporting"):
        loaded = load_vision(folder)
        record = (export_image_onnx if kind == "onnx" else export_state)(loaded, out)
    return record | {"lines": [f"{out}: {record['bytes'] / 1e6:.1f} MB; {record['proof']}"]}
