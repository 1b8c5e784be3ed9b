"""The record of a vision run: accuracy, widths before and after, costs of each layer, speed."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from torch import Tensor, nn

from secateur import __version__
from secateur.errors import VerificationError
from secateur.evaluation.accuracy import Accuracy
from secateur.evaluation.image_speed import compare_image_speed
from secateur.evaluation.size import memory_bytes
from secateur.evaluation.speed import machine
from secateur.kernels.depthwise import is_depthwise
from secateur.masks.structured import StructuredMask
from secateur.methods.vision_base import VisionOutcome
from secateur.models.channel_graph import ChannelGroups, channel_groups
from secateur.models.inference import inference_copy
from secateur.models.vision.loading import WEIGHTS
from secateur.run.folder import RunFolder
from secateur.run.vision_session import VisionSession


def assemble_vision(
    session: VisionSession,
    outcome: VisionOutcome,
    dense: nn.Module,
    measured: Mapping[str, Accuracy | None],
    *,
    command: str,
    folder: RunFolder | None,
    memory_peak: int,
    reopened: dict[str, Any] | None,
    training: dict[str, Any] | None,
    pretraining: dict[str, Any] | None,
) -> dict[str, Any]:
    """Everything known about the run as one JSON-able record (the report's only input)."""
    before = session.groups
    unknown = session.recipe.structure.unknown
    after = channel_groups(session.model, session.example, unknown=unknown)
    flops = {"before": float(before.flops()), "after": float(after.flops())}
    parameters = {
        name: sum(p.numel() for p in model.parameters())
        for name, model in (("before", dense), ("after", session.model))
    }
    masked = {
        "elements": sum(m.numel() for m in outcome.masks.values()),
        "gone": sum(int(m.sum()) for m in outcome.masks.values()),
    }
    groups = [_row(group.key, before, outcome.structure) for group in before]
    return {
        "kind": "vision",
        "secateur": __version__,
        "command": command,
        "recipe": session.recipe.model_dump(mode="json"),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": {
            "name": session.loaded.name,
            "parameters": parameters["after"],
            "fingerprint": session.fingerprint,
            "trained": session.loaded.trained or pretraining is not None,
            "notes": session.loaded.notes,
        },
        "images": {
            "train": session.train.record(),
            "test": None if session.test is None else session.test.record(),
        },
        "totals": {
            "kind": session.target.kind,
            "asked": session.target.share,
            "delivered": outcome.delivered
            if session.target.kind == "weights" and outcome.delivered is not None
            else _delivered(session, flops, parameters, groups, masked),
        },
        "groups": groups,
        "layers": outcome.layers,
        "method": outcome.record,
        "masks": masked,
        "flops": flops | {"ratio": flops["before"] / max(1.0, flops["after"])},
        "parameters": parameters,
        "costs": _costs(before, after),
        "quality": _quality(measured),
        "speed": _speed(session, dense, outcome.masks),
        "size": {
            "dense": memory_bytes(dense),
            "pruned": memory_bytes(session.model)
            if folder is None
            else (folder.path / WEIGHTS).stat().st_size,
        },
        "training": training,
        "pretraining": pretraining,
        "timing": {k: round(v, 3) for k, v in session.timing.items()},
        "memory_peak": memory_peak,
        "machine": machine(session.device),
        "notes": session.notes,
        "reopened": reopened,
        "verified": True,
    }


def publish_vision(report: dict[str, Any], folder: RunFolder) -> None:
    """Save ``result.json`` and the report's pages."""
    from secateur.report.vision import write_vision_report

    report["folder"] = str(folder.path)
    folder.save("result.json", report)
    write_vision_report(report, folder.path)


def _row(key: str, groups: ChannelGroups, structure: StructuredMask) -> dict[str, Any]:
    group = groups[key]
    removed = int(structure.of(group).sum()) if key in structure.gone else 0
    return {
        "name": key,
        "kind": group.kind,
        "before": group.n_units,
        "after": group.n_units - removed,
        "producers": list(group.producers),
        "depthwise": list(group.depthwise),
        "prunable": group.prunable,
        "reason": group.reason,
    }


def _delivered(
    session: VisionSession,
    flops: Mapping[str, float],
    parameters: Mapping[str, int],
    groups: list[dict[str, Any]],
    masked: Mapping[str, int],
) -> float:
    """What went, counted as it was asked for."""
    kind = session.target.kind
    if kind == "weights":
        return masked["gone"] / max(1, masked["elements"])
    if kind == "channels":
        free = [row for row in groups if row["prunable"]]
        before = sum(row["before"] for row in free)
        return 1 - sum(row["after"] for row in free) / max(1, before)
    pair: Mapping[str, float] = flops if kind == "flops" else parameters
    return 1 - pair["after"] / pair["before"]


def _costs(before: ChannelGroups, after: ChannelGroups) -> list[dict[str, Any]]:
    """FLOPs of every layer, dense and as it is now; products of one module are one row."""
    sums: dict[str, dict[str, Any]] = {}
    for state, groups in (("before", before), ("after", after)):
        for layer in groups.layers:
            row = sums.setdefault(
                layer.name, {"name": layer.name, "kind": layer.kind, "before": 0.0, "after": 0.0}
            )
            row[state] += float(layer.flops())
    return list(sums.values())


def _quality(measured: Mapping[str, Accuracy | None]) -> dict[str, Any] | None:
    """Accuracy after every stage, and how often both networks say the same."""
    dense, pruned = measured.get("dense"), measured.get("pruned")
    if dense is None or pruned is None:
        return None
    if dense.protocol != pruned.protocol:
        raise VerificationError("the two networks were measured on different images")
    found: dict[str, Any] = {
        stage: value.record() for stage, value in measured.items() if value is not None
    }
    agreement = float((dense.guesses == pruned.guesses).double().mean())
    return found | {"agreement": agreement, "protocol": pruned.protocol.record()}


def _speed(
    session: VisionSession, dense: nn.Module, masks: Mapping[str, Tensor]
) -> dict[str, Any] | None:
    spec = session.recipe.evaluation
    if spec is None or not spec.speed:
        return None
    images = session.test or session.train
    pixels = images.batch([i % len(images) for i in range(spec.speed_batch)]).pixels
    with session.timed("speed"), session.progress.stage("measuring speed"):
        pruned, form = session.model, "as they are"
        if any(is_depthwise(pruned.get_submodule(n.rpartition(".")[0])) for n in masks):
            # Tap lists are what the masks are for; the dense network gets its norms folded too.
            pixels = pixels.to(session.device)
            pruned = inference_copy(pruned, masks, pixels)
            dense = inference_copy(dense, {}, pixels)
            form = "for inference: batch norms folded in both, depth-wise taps as lists"
        return {
            "form": form,
            **compare_image_speed(dense, pruned, pixels, seconds=spec.speed_seconds),
        }
