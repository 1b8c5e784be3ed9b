"""One gradient for the masks out of three: the task's, the gap's and the FLOPs'.

    g_dis = g_task + kd_scale ||g_task|| g_gap / ||g_gap||
    dy    = min(((F/F_all - T) / relax)^2, 1)
    ||g_flops|| : ||g_dis|| = dy : dis_scale

"FLOPs first until inside the tolerance, then fade": outside it (dy = 1) the FLOPs outweigh what the
images say, at the target they say nothing. Every gradient counts by its direction, so neither the
size of the losses nor a FLOPs coefficient matters; the result has root mean square 1 over
the groups when dy = 1 and dis_scale is small.

Source: the published code of S2HPruner (NeurIPS 2024); it has some twenty fusions, the default
among them is not recorded. This is its normalised one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

_TINY = 1e-12

Gradients = Mapping[str, Tensor]


def norm(gradients: Gradients) -> float:
    """2-norm of all groups' gradients together."""
    return math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values()))


def pressure(flops: float, target: float, relax: float) -> float:
    """dy in [0, 1]: how much the FLOPs count; 1 from ``relax`` off the target on."""
    return min(((flops - target) / relax) ** 2, 1.0)


def fuse(
    task: Gradients,
    gap: Gradients,
    flops: Gradients,
    dy: float,
    *,
    kd_scale: float = 1.0,
    dis_scale: float = 0.5,
) -> dict[str, Tensor]:
    """The gradient of every group's logits.

    Args:
        task, gap, flops: group -> gradient (n,); ``gap`` may be empty.
        dy: see ``pressure``.
        kd_scale: norm of the gap's gradient, the task's being 1.
        dis_scale: norm of both together, the FLOPs' being ``dy``.
    """
    size, size_gap = norm(task), norm(gap)
    scale = kd_scale * size / size_gap if size_gap > _TINY else 0.0
    images = {k: g + scale * gap[k] if k in gap else g for k, g in task.items()}
    if size <= _TINY and size_gap > _TINY:  # nothing to measure the gap by
        images = {k: gap[k] for k in task if k in gap}
    root = math.sqrt(max(1, len(task)))
    size, size_flops = norm(images), norm(flops)
    out: dict[str, Tensor] = {}
    for key, like in task.items():
        total = torch.zeros_like(like)
        if size > _TINY and key in images:
            total += images[key] * (dis_scale * root / size)
        if size_flops > _TINY:
            total += flops[key] * (dy * root / size_flops)
        out[key] = total
    return out
