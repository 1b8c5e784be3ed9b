"""What a run remembers of each matrix: counts, errors, a histogram and a small picture."""

from __future__ import annotations

import base64
from typing import Any

import torch
from torch import Tensor, nn

from secateur.masks.target import Cut, Scope
from secateur.methods.prune_matrix import Pruned
from secateur.models.anatomy import Matrix

BINS = 40
SAMPLE = 16384
PICTURE = 64


def module_record(
    matrix: Matrix, block: int, cut: Cut, scope: Scope, update: str, pruned: Pruned
) -> dict[str, Any]:
    """One entry of ``result.json``'s ``modules``."""
    mask = pruned.mask
    density = mask.float()
    rows, columns = density.mean(1), density.mean(0)
    histogram, threshold = score_histogram(pruned.score, mask)
    return {
        "name": matrix.name,
        "block": block,
        "role": matrix.role,
        "shape": list(matrix.shape),
        "asked": cut.sparsity,
        "asked_count": cut.count,
        "delivered_count": int(mask.count_nonzero()),
        "scope": f"{cut.keep}:{cut.group}" if cut.is_pattern else str(scope),
        "update": update,
        "output_error": pruned.output_error,
        "histogram": histogram,
        "threshold": threshold,
        "picture": picture(density),
        "row_sparsity": _spread(rows),
        "column_sparsity": _spread(columns),
    }


def _spread(shares: Tensor) -> list[float]:
    return [round(float(x), 4) for x in (shares.min(), shares.median(), shares.max())]


def score_histogram(
    score: Tensor | None, mask: Tensor
) -> tuple[dict[str, Any] | None, float | None]:
    """Histogram of log10(score), kept against pruned, from an even sample of the weights.

    The threshold is the largest pruned score of the sample (scopes narrower than the matrix
    have many thresholds; this is the highest of them).
    """
    if score is None:
        return None, None
    step = max(1, score.numel() // SAMPLE)
    # A prime-ish stride, so that the sample does not walk along one column.
    step += step % 2 == 0
    values = score.reshape(-1)[::step].float()
    gone = mask.reshape(-1)[::step]
    positive = values > 0
    if not bool(positive.any()):
        return None, None
    logs = values.clamp(min=float(values[positive].min())).log10()
    low, high = float(logs.min()), float(logs.max())
    high = high if high > low else low + 1.0
    kept = torch.histc(logs[~gone], BINS, low, high)
    pruned = torch.histc(logs[gone], BINS, low, high)
    edges = torch.linspace(low, high, BINS + 1)
    threshold = float(values[gone].max()) if bool(gone.any()) else None
    return {
        "edges": [round(float(e), 4) for e in edges],
        "kept": [int(c) for c in kept],
        "pruned": [int(c) for c in pruned],
        "sampled": int(values.numel()),
    }, threshold


def picture(mask: Tensor) -> dict[str, Any]:
    """A mask (floating, 1 = pruned) as a map of at most 64 x 64 cells, 255 = all pruned."""
    rows, columns = (min(PICTURE, n) for n in mask.shape)
    density = nn.functional.adaptive_avg_pool2d(mask[None, None], (rows, columns))[0, 0]
    cells = (density * 255).round().to(torch.uint8).cpu().contiguous()
    return {
        "rows": rows,
        "cols": columns,
        "density": base64.b64encode(cells.numpy().tobytes()).decode("ascii"),
    }
