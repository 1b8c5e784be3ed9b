"""The dry run: exact counts, and what a run would cost here. Prunes and writes nothing."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import torch

from secateur.allocation.plan import uniform
from secateur.errors import UsageError
from secateur.methods import Need
from secateur.methods.structured_base import StructuredMethod
from secateur.models.anatomy import ModelView
from secateur.models.loading import load
from secateur.progress import SILENT, Progress
from secateur.recipe import Recipe
from secateur.run.session import needs, resolve


def forecast(recipe: Recipe, *, progress: Progress = SILENT) -> dict[str, Any]:
    """What ``recipe`` would do: the plan, counts by shape, time, memory, bytes, speed.

    Time rests on a one-second measurement of this machine's matrix products; it is an
    estimate (often off by a factor of two), the counts are exact.
    """
    method, scope, update = resolve(recipe)
    if isinstance(method, StructuredMethod):
        raise UsageError(
            "removes whole units, which are planned in its run",
            field="method",
            value=recipe.method,
            fix="secateur prune ...; its plan is DIR/secateur/plan.json",
        )
    loaded = load(
        recipe.model,
        dtype=recipe.dtype,
        device=recipe.device,
        stream=True,
        tokenizer=False,
        trust_remote_code=recipe.trust_remote_code,
        blocks=recipe.blocks,
    )
    view = ModelView.of(loaded.model, recipe.blocks, recipe.include, recipe.exclude)
    plan = uniform({m.name: m.shape for m in view.matrices()}, recipe.target)
    for name in plan.shapes:
        plan.cut(name, scope)  # refuses what does not divide
    evidence = needs(method, update)
    with progress.stage("measuring this machine"):
        speed = matrix_speed(loaded.device)
    parameters = sum(p.numel() for p in loaded.model.parameters())
    itemsize = next(loaded.model.parameters()).element_size()
    tokens = (
        recipe.calibration.samples * loaded.window(recipe.calibration.length) if evidence else 0
    )
    forwards = _forwards(recipe, evidence)
    flops = 2.0 * plan.elements * tokens * forwards
    hidden = view.hidden_size or 0
    gram = 0
    if Need.GRAM in evidence:
        # One moment matrix per distinct input: q/k/v share theirs, gate/up too.
        for block in view.blocks:
            widths = {_SHARED.get(m.role, m.role or m.name): m.shape[1] for m in block.matrices}
            flops += sum(2.0 * tokens * d * d + 2.0 * d**3 for d in widths.values())
            flops += sum(2.0 * m.shape[0] * m.shape[1] ** 2 for m in block.matrices)
            gram = max(gram, sum(4 * d * d for d in widths.values()))
    block_bytes = (
        max(sum(m.shape[0] * m.shape[1] for m in b.matrices) for b in view.blocks) * itemsize
    )
    state = 2 * tokens * hidden * itemsize
    gradients = 4 * plan.elements * sum(n.startswith("grad-") for n in evidence)
    outside = (parameters - plan.elements) * itemsize
    stored = sum(plan.counts.values())
    rows = _rows(plan, view)
    return {
        "model": loaded.name,
        "target": str(recipe.target),
        "method": recipe.method,
        "scope": str(scope),
        "update": update,
        "plan": plan.record(),
        "rows": rows,
        "left_alone": parameters - plan.elements,
        "excluded": view.excluded,
        "cost": {
            "seconds": flops / (speed * 1e9),
            "gflops": speed,
            "forwards": forwards,
            "tokens": tokens,
            "memory": parameters * itemsize + state + gram + gradients,
            "memory_stream": outside + 2 * block_bytes + state + gram,
        },
        "bytes": {
            "dense": parameters * itemsize,
            "bitmask": (parameters - stored) * itemsize + plan.elements // 8,
        },
        "speed": _speed_sentence(recipe),
        "notes": loaded.notes,
    }


_SHARED = {"q": "qkv", "k": "qkv", "v": "qkv", "gate": "gate_up", "up": "gate_up"}


def _forwards(recipe: Recipe, evidence: frozenset[Need]) -> int:
    if not evidence:
        return 0
    count = 1 if recipe.propagate == "dense" else 2
    if recipe.granularity == "true_sequential":
        count += 2
    if recipe.reconstruct == "dense":
        count *= 2
    # A backward costs two forwards.
    return count + (3 if any(n.startswith("grad-") for n in evidence) else 0)


def _rows(plan: Any, view: ModelView) -> list[dict[str, Any]]:
    kinds: Counter[tuple[str, tuple[int, int]]] = Counter()
    zeros: dict[tuple[str, tuple[int, int]], set[int]] = {}
    for m in view.matrices():
        kind = (m.role or m.name.rpartition(".")[2], m.shape)
        kinds[kind] += 1
        zeros.setdefault(kind, set()).add(plan.counts[m.name])
    rows = []
    for (role, shape), count in kinds.items():
        low, high = min(zeros[role, shape]), max(zeros[role, shape])
        rows.append(
            {
                "role": role,
                "shape": list(shape),
                "count": count,
                "zeros": f"{low:,}" if low == high else f"{low:,}..{high:,}",
                "elements": shape[0] * shape[1],
            }
        )
    return rows


def matrix_speed(device: torch.device, seconds: float = 0.7) -> float:
    """The device's float32 matrix products, GFLOP/s."""
    a, b = (torch.randn(1024, 1024, device=device) for _ in range(2))
    float((a @ b)[0, 0])
    start, done = time.perf_counter(), 0
    while (spent := time.perf_counter() - start) < seconds:
        float((a @ b)[0, 0])
        done += 1
    return 2 * 1024**3 * done / spent / 1e9


def _speed_sentence(recipe: Recipe) -> str:
    target = recipe.target
    if (target.keep, target.group) == (2, 4):
        if torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0):
            return (
                "2:4 can run on this GPU's sparse tensor cores; the gain is measured by "
                "'secateur export --format 2:4' (large batches; often none when decoding)"
            )
        return "none here: 2:4 needs a CUDA GPU of compute capability 8.0 or newer"
    return (
        "none: dense kernels do not skip zeros. To gain speed remove structures or use 2:4 on a "
        "GPU that has it; to gain space use 'secateur export --format bitmask'"
    )
