"""The record of a pretraining run: shape before and after, what went when, and what that cost."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from torch import nn

from secateur import __version__
from secateur.evaluation.flops import count_flops
from secateur.evaluation.size import memory_bytes, weight_bytes
from secateur.evaluation.speed import machine
from secateur.masks.structured import StructuredMask, structure_of
from secateur.models.loading import Loaded
from secateur.models.structured_saving import Form
from secateur.models.units import Group
from secateur.recipe import Evaluation, Structure
from secateur.recipe_parts import Pretraining
from secateur.run.folder import RunFolder
from secateur.run.structured_results import group_row
from secateur.training.efficientllm import PruningAware
from secateur.training.loop import Fitted

_POINTS = 400


@dataclass(frozen=True)
class Before:
    """The model before anything went.

    Attributes:
        groups: its units.
        profile: parameters, and FLOPs of reading a window and of writing a token after it.
        quality: perplexity and its protocol, if it was measured.
    """

    groups: list[Group]
    profile: dict[str, Any]
    memory: int
    quality: dict[str, Any] | None

    @classmethod
    def of(
        cls, model: nn.Module, groups: list[Group], length: int, quality: dict[str, Any] | None
    ) -> Before:
        """Look at ``model``."""
        return cls(groups, profile(model, length), memory_bytes(model), quality)


def profile(model: nn.Module, length: int) -> dict[str, Any]:
    """Parameters and FLOPs of a model as it is."""
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "prefill": count_flops(model, length),
        "decode": count_flops(model, length, decode=True),
    }


def _left_to_the_end(hook: PruningAware) -> float:
    """Share of the choices that a fixed pace left to the last step of pruning."""
    schedule, events = hook.options.schedule, hook.events
    if schedule.pace != "every_n_batches" or not events:
        return 0.0
    return sum(event["step"] >= schedule.stop for event in events) / len(events)


def assemble_pretraining(
    loaded: Loaded,
    spec: Pretraining,
    evaluation: Evaluation | None,
    hook: PruningAware,
    fitted: Fitted,
    *,
    data_record: dict[str, Any],
    length: int,
    before: Before,
    quality: dict[str, Any] | None,
    form: Form,
    folder: RunFolder | None,
    reopened: dict[str, Any] | None,
    command: str,
    seconds: float,
    memory_peak: int,
) -> dict[str, Any]:
    """Everything known about the run as one JSON-able record (the report's only input)."""
    model = loaded.model
    after = profile(model, length)
    mask = structure_of(model) or StructuredMask()
    was, now = before.profile["parameters"], after["parameters"]
    notes = list(loaded.notes)
    if form.why:
        notes.append(
            form.why if form.stock else f"opens with secateur.load_pruned only: {form.why}"
        )
    if now > hook.options.budget:
        notes.append("the training stopped before its budget was met")
    at_once = _left_to_the_end(hook)
    if at_once > 0.5:
        notes.append(
            f"the pace was too slow for the budget: {at_once:.0%} of the choices went at once at "
            "the end of pruning. A lower prune_every, a later prune_until or more tokens spread them"
        )
    written = memory_bytes(model) if folder is None else weight_bytes(folder.path)
    return {
        "secateur": __version__,
        "command": command,
        "recipe": {
            "model": loaded.name,
            "method": "efficientllm",
            "pretraining": spec.model_dump(mode="json"),
            "evaluation": None if evaluation is None else evaluation.model_dump(mode="json"),
            "structure": Structure().model_dump(mode="json"),
        },
        "resolved": {"scope": "units", "update": "obs" if spec.second_order else "none"},
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": {
            "name": loaded.name,
            "parameters": now,
            "fingerprint": loaded.fingerprint,
            "notes": loaded.notes,
        },
        "calibration": None,
        "modules": [],
        "blocks": [],
        "totals": {
            "asked": 1 - hook.options.budget / was,
            "delivered": 1 - now / was,
            "zeros": was - now,
            "elements": was,
            "pattern": None,
        },
        "structure": {
            "groups": [group_row(g, mask) for g in before.groups],
            "skipped": {},
            "parameters": {"before": was, "after": now},
            "flops": {
                phase: {
                    "before": before.profile[phase],
                    "after": after[phase],
                    "ratio": before.profile[phase]["total"] / after[phase]["total"],
                }
                for phase in ("prefill", "decode")
            },
            "context": length,
            "target": {
                "kind": "parameters",
                "asked": 1 - hook.options.budget / was,
                "delivered": 1 - now / was,
            },
            "form": {"stock": form.stock, "architecture": form.architecture, "why": form.why},
        },
        "pretraining": history(hook, fitted, data_record, spec.batch * length, seconds),
        "excluded": {},
        "quality": _quality(before.quality, quality),
        "size": {
            "disk": {
                "dense": before.memory if loaded.folder is None else weight_bytes(loaded.folder),
                "pruned": written,
            },
            "memory": {"dense": before.memory, "pruned": memory_bytes(model)},
            "note": "whole units are gone: the model is smaller in memory and on disk",
        },
        "speed": None,
        "timing": {
            "steps": round(hook.seconds["steps"], 3),
            "saliency, within steps": round(hook.seconds["saliency"], 3),
            "events": round(hook.seconds["events"], 3),
            "total": round(seconds, 3),
        },
        "memory_peak": memory_peak,
        "machine": machine(loaded.device),
        "notes": notes,
        "reopened": reopened,
        "verified": True,
    }


def history(
    hook: PruningAware,
    fitted: Fitted,
    data_record: dict[str, Any],
    tokens_per_step: int,
    seconds: float,
) -> dict[str, Any]:
    """What went when and at which saliency, sizes and speeds, and how the loss fell.

    ``events`` has an entry a choice: step, tokens seen, type, units (place in ``groups``,
    original unit numbers), saliency, price, prices of the rivals, parameters afterwards.
    ``spans`` are stretches in one shape: tokens seen at their start, parameters, FLOPs a token of
    a forward, tokens, seconds of their steps (events apart) and of the fastest of them.
    """
    return {
        **fitted.record(),
        "tokens_per_step": tokens_per_step,
        "losses": _thinned(fitted.losses),
        "budget": hook.options.budget,
        "initial": hook.initial,
        "schedule": {
            "pace": hook.options.schedule.pace,
            "start": hook.options.schedule.start * tokens_per_step,
            "stop": hook.options.schedule.stop * tokens_per_step,
        },
        "groups": hook.keys,
        "events": [{**e, "tokens": e["step"] * tokens_per_step} for e in hook.events],
        "spans": [
            {
                "tokens": int(start) * tokens_per_step,
                "parameters": int(parameters),
                "flops": flops,
                "seen": int(steps) * tokens_per_step,
                "seconds": round(spent, 4),
                "fastest": round(fastest, 5),
            }
            for start, parameters, flops, steps, spent, fastest in hook.spans
            if steps
        ],
        "spent": {k: round(v, 3) for k, v in hook.seconds.items()},
        "text": data_record,
        "wall_seconds": round(seconds, 3),
    }


def _quality(dense: dict[str, Any] | None, after: dict[str, Any] | None) -> dict[str, Any] | None:
    if after is None:
        return None
    pruned = {k: v for k, v in after.items() if k != "protocol"}
    before = None if dense is None else {k: v for k, v in dense.items() if k != "protocol"}
    return {
        "dense": before,
        "pruned": pruned,
        "kl": None,
        "top1_agreement": None,
        "protocol": after["protocol"],
    }


def _thinned(values: list[float]) -> list[tuple[int, float]]:
    """(step, value), about 400 of them."""
    step = -(-len(values) // _POINTS) if values else 1
    return [(i + 1, values[i]) for i in range(0, len(values), step)]
