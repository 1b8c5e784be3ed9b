"""The textbook form of structured elimination: SlimGPT's own steps, H inverted anew each round.

Slow and plain: the oracle of ``structured_obs`` and the other side of the benchmark. A round
inverts H, factors the inverse with the chosen groups brought to the front, sweeps their columns
left to right, then cuts them out of H by zeroing rows and columns and setting the diagonal to 1
(which block-diagonalises H, so that the next inverse is that of the survivors).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from secateur.solvers.groups import group_scores
from secateur.solvers.obs import damp, damped_cholesky


@torch.no_grad()
def remove_groups_reference(
    weight: Tensor,
    moment: Tensor,
    groups: Tensor,
    batches: Sequence[int],
    *,
    score: str = "slimgpt",
    damping: float = 0.01,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, list[int], float]:
    """W' (zeros where columns went), group numbers in order, and the error increase.

    Arguments as in ``structured_obs.remove_groups``; every column must be in a group.
    """
    _, dead, taken = damped_cholesky(moment, damping)
    hessian = damp(moment, dead, taken, dtype)
    current = weight.to(dtype).masked_fill(dead, 0.0)
    live = torch.ones(len(groups), dtype=torch.bool)
    size = groups.shape[1]
    order: list[int] = []
    error = 0.0
    for count in batches:
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
        blocks = torch.stack([inverse[g][:, g] for g in groups])
        scores = group_scores(current[:, groups.flatten()].unflatten(1, (-1, size)), blocks, score)
        assert scores is not None
        scores = scores.masked_fill(~live, float("inf"))
        chosen = torch.sort(scores, stable=True).indices[:count]
        picked = groups[chosen].flatten()
        others = torch.ones(weight.shape[1], dtype=torch.bool)
        others[picked] = False
        front = torch.cat([picked, others.nonzero().flatten()])
        upper = torch.linalg.cholesky(inverse[front][:, front], upper=True)
        swept = current[:, front]
        width = len(picked)
        errors = torch.empty_like(swept[:, :width])
        for t in range(width):
            errors[:, t] = swept[:, t] / upper[t, t]
            swept[:, t:width] -= errors[:, t, None] * upper[t, t:width]
        swept[:, width:] -= errors @ upper[:width, width:]
        swept[:, :width] = 0
        current[:, front] = swept
        error += float(errors.square().sum())
        hessian[picked] = 0
        hessian[:, picked] = 0
        hessian[picked, picked] = 1
        live[chosen] = False
        order += chosen.tolist()
    return current, order, error
