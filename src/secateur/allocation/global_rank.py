"""One ranking over all matrices: how many weights each gives when the least important go.

Right for magnitude. For scores that involve activations it is a known trap: their scale
differs between layers (spec: global Wanda on a 3B model, perplexity 10,140 at 30 %).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from secateur.allocation.plan import Plan
from secateur.errors import UsageError
from secateur.masks.target import Target

LIMIT = 2**31


def global_plan(scores: Iterable[tuple[str, Tensor]], target: Target) -> Plan:
    """Counts per matrix so that exactly the asked share of all weights goes.

    Args:
        scores: (name, (d_out, d_in) importance) of every matrix, in the model's order.
        target: a sparsity; the total removed is ``target.count(total)`` to the element.

    Ties at the threshold go to the matrices that come first.
    """
    shapes: dict[str, tuple[int, int]] = {}
    flat: list[Tensor] = []
    for name, score in scores:
        shapes[name] = (int(score.shape[0]), int(score.shape[1]))
        flat.append(score.reshape(-1).float().cpu())
    total = sum(s.numel() for s in flat)
    if total > LIMIT:
        raise UsageError(
            f"a global ranking holds the scores of all {total} weights in memory",
            field="allocation",
            value="global",
            fix="use allocation: uniform for a model of this size",
        )
    count = target.count(total)
    if count == 0:
        return Plan(target, shapes, dict.fromkeys(shapes, 0), {"allocator": "global"})
    threshold = torch.cat(flat).kthvalue(count).values
    counts = [int((s < threshold).sum()) for s in flat]
    left = count - sum(counts)
    for i, s in enumerate(flat):
        ties = min(left, int((s == threshold).sum()))
        counts[i] += ties
        left -= ties
    return Plan(target, shapes, dict(zip(shapes, counts, strict=True)), {"allocator": "global"})
