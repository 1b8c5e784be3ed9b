"""The record of a structured run: widths before and after, costs, speed and where it went."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from torch import Tensor

from secateur import __version__
from secateur.allocation.plan import Plan
from secateur.evaluation.size import memory_bytes, weight_bytes
from secateur.evaluation.speed import compare_speed, machine
from secateur.masks.structured import StructuredMask
from secateur.models.structured_saving import Form
from secateur.models.units import Group, Units
from secateur.run.breakdown import breakdown
from secateur.run.folder import RunFolder
from secateur.run.measure import beside_dense
from secateur.run.session import Session
from secateur.run.structured_plan import protected_blocks, share_of_weights

_WORDS = {"head": "heads", "kv_group": "key-value groups", "ffn": "channels"}


def unit_words(group: Group) -> str:
    """What a unit of the group is called in a report."""
    return _WORDS.get(group.kind, group.kind)


def assemble_structured(
    session: Session,
    *,
    units: Units,
    plan: Plan,
    mask: StructuredMask,
    records: list[dict[str, Any]],
    form: Form,
    before: dict[str, Any],
    after: dict[str, Any],
    command: str,
    quality: dict[str, Any] | None,
    speed: dict[str, Any] | None,
    folder: RunFolder | None,
    memory_peak: int,
    reopened: dict[str, Any] | None,
) -> dict[str, Any]:
    """Everything known about the run as one JSON-able record (the report's only input)."""
    groups = list(units)
    noted = {r["key"]: r for r in records}
    rows = [group_row(g, mask, plan.units[g.key].removed, noted.get(g.key, {})) for g in groups]
    model = session.loaded.model
    source = session.loaded.folder
    pruned_bytes = memory_bytes(model) if folder is None else weight_bytes(folder.path)
    dense_memory = before["parameters"] * next(model.parameters()).element_size()
    notes = [*session.loaded.notes, *session.notes]
    if form.why:
        notes.append(
            form.why if form.stock else f"opens with secateur.load_pruned only: {form.why}"
        )
    return {
        "secateur": __version__,
        "command": command,
        "recipe": session.recipe.model_dump(mode="json"),
        "resolved": {"scope": "units", "update": "none"},
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": {
            "name": session.loaded.name,
            "parameters": after["parameters"],
            "fingerprint": session.loaded.fingerprint,
            "notes": session.loaded.notes,
        },
        "calibration": None if session.calibration is None else session.calibration.record,
        "modules": [],
        "blocks": [],
        "totals": {
            "asked": share_of_weights(groups, lambda g: plan.units[g.key].removed),
            "delivered": share_of_weights(groups, lambda g: int(mask.of(g).sum())),
            "zeros": before["parameters"] - after["parameters"],
            "elements": before["parameters"],
            "pattern": None,
        },
        "structure": {
            "groups": rows,
            "skipped": units.skipped,
            "parameters": {"before": before["parameters"], "after": after["parameters"]},
            "flops": {
                phase: {
                    "before": before[phase],
                    "after": after[phase],
                    "ratio": before[phase]["total"] / after[phase]["total"],
                }
                for phase in ("prefill", "decode")
            },
            "context": session.recipe.structure.context,
            "target": _target(session, plan, groups, mask, before, after),
            "form": {
                "stock": form.stock,
                "architecture": form.architecture,
                "why": form.why,
            },
        },
        "excluded": {},
        "quality": quality,
        "size": {
            "disk": {
                "dense": dense_memory if source is None else weight_bytes(source),
                "pruned": pruned_bytes,
            },
            "memory": {"dense": dense_memory, "pruned": memory_bytes(model)},
            "note": "whole units are gone: the model is smaller in memory and on disk",
        },
        "speed": speed,
        "timing": {k: round(v, 3) for k, v in session.timing.items()},
        "memory_peak": memory_peak,
        "machine": machine(session.device),
        "notes": notes,
        "reopened": reopened,
        "verified": True,
    }


def _target(
    session: Session,
    plan: Plan,
    groups: list[Group],
    mask: StructuredMask,
    before: dict[str, Any],
    after: dict[str, Any],
) -> dict[str, Any]:
    """What was asked, counted as it was asked; a time is known only when speed is measured.

    A ratio is one of the blocks that are not protected.
    """
    kind = session.recipe.structure.target_kind
    kept = protected_blocks(session, session.recipe.structure)
    free = [g for g in groups if g.block is None or g.block not in kept]
    delivered = {
        "ratio": share_of_weights(free, lambda g: int(mask.of(g).sum())),
        "parameters": 1 - after["parameters"] / before["parameters"],
        "flops": 1 - after["prefill"]["total"] / before["prefill"]["total"],
        "latency": None,
    }[kind]
    return {"kind": kind, "asked": plan.target.sparsity, "delivered": delivered}


def group_row(
    group: Group,
    mask: StructuredMask,
    asked: int | None = None,
    noted: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What became of a group; ``asked`` is what a plan wanted gone, if there was one."""
    removed, noted = int(mask.of(group).sum()), noted or {}
    return {
        "name": group.key,
        "kind": group.kind,
        "unit": unit_words(group),
        "block": group.block,
        "stack": group.stack,
        "attention": group.attention,
        "finest": group.original.shape[1],
        "before": group.n_units,
        "after": group.n_units - removed,
        "asked": removed if asked is None else asked,
        "removed": removed,
        "notes": noted.get("notes") or {},
        "tokens": noted.get("tokens"),
        "seconds": noted.get("seconds"),
        "scores": noted.get("scores"),
    }


def measure_structured_speed(session: Session, *, owned: bool) -> dict[str, Any] | None:
    """Dense against pruned in turns, and the time of each part; None when not asked."""

    def compare(dense: Any, pruned: Any, ids: Tensor, seconds: float) -> dict[str, Any]:
        speed = compare_speed(dense, pruned, ids, seconds=seconds)
        return speed | {"parts": breakdown(dense, pruned, ids)}

    return beside_dense(session, compare, owned=owned)
