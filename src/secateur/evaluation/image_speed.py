"""How fast a pruned vision network is beside the dense one, on this machine, in turns."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

from secateur.evaluation.speed import FEWEST, change, machine, quartiles, timed
from secateur.models.state import evaluating


@torch.no_grad()
def compare_image_speed(
    dense: nn.Module, pruned: nn.Module, pixels: Tensor, *, seconds: float = 4.0
) -> dict[str, Any]:
    """Images per second of two networks.

    Args:
        pixels: the batch both are timed on, (B, C, H, W).
        seconds: about how long; one turn each to warm up comes on top.

    Returns:
        ``forward`` with images/s of both (median, quartiles), milliseconds a batch, and the ratio
        of times; ``verdict`` in plain words; ``machine``; ``turns``.
    """
    models = {"dense": dense, "pruned": pruned}
    times: dict[str, list[float]] = {name: [] for name in models}
    device = next(iter(dense.parameters())).device
    pixels = pixels.to(device)
    with evaluating(dense), evaluating(pruned):
        for model in models.values():
            model(pixels)
        deadline, turns = time.perf_counter() + seconds, 0
        while turns < FEWEST or time.perf_counter() < deadline:
            order = list(models) if turns % 2 == 0 else list(models)[::-1]
            for name in order:
                times[name].append(timed(lambda m=models[name]: m(pixels), device)[1])  # type: ignore[misc]
            turns += 1
    both = {name: torch.tensor(t, dtype=torch.float64) for name, t in times.items()}
    ratio = quartiles(both["dense"] / both["pruned"])
    return {
        "forward": {
            **{name: quartiles(len(pixels) / t) for name, t in both.items()},
            "milliseconds": {name: quartiles(1e3 * t) for name, t in both.items()},
            "unit": "images/s",
            "ratio": ratio,
        },
        "batch": len(pixels),
        "turns": turns,
        "verdict": f"Measured here in batches of {len(pixels)}: {change(ratio)}.",
        "machine": machine(device),
    }
