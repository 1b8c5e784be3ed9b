"""Batch-norm statistics measured again on a pruned network: recovery without a gradient.

A cut shifts the mean and the variance of what batch norms see, while their running statistics
are still the dense network's. PERP retrains vision models from here (Zimmer et al., 2023,
arXiv:2312.15230, "BN-Recalibrate").

>>> net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
>>> recalibrate(net, [torch.randn(2, 3, 5, 5) for _ in range(3)])
['1']
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from secateur.errors import NumericsError, UsageError
from secateur.training.hooks import Hook, Training


@torch.no_grad()
def recalibrate(model: nn.Module, batches: Iterable[Tensor]) -> list[str]:
    """Reset the running statistics of every batch norm and average them anew, in place.

    The model runs in evaluation mode but for its batch norms, which normalise by each batch;
    their statistics are the plain average over batches, so those should be of one size. No weight
    changes, and so no zero.

    Args:
        batches: what the model is called with, one after another.

    Returns:
        Names of the batch norms.

    Raises:
        UsageError: no batch norm that keeps statistics; no batch. Nothing has changed then.
        NumericsError: a statistic that is not finite, naming its norm.
    """
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.track_running_stats
    }
    if not found:
        raise UsageError(
            "the model has no batch norms with running statistics",
            field="model",
            value=type(model).__name__,
            fix="recover it by training: secateur.recover",
        )
    modes = {module: module.training for module in model.modules()}
    momenta = {name: norm.momentum for name, norm in found.items()}
    seen = 0
    try:
        model.eval()
        for batch in batches:
            if not seen:
                for norm in found.values():
                    norm.reset_running_stats()
                    norm.momentum = None  # a plain average instead of a moving one
                    norm.train()
            model(batch)
            seen += 1
    finally:
        for name, norm in found.items():
            norm.momentum = momenta[name]
        for module, mode in modes.items():
            module.training = mode
    if not seen:
        raise UsageError("there is no batch to measure on", field="batches", value=0)
    for name, norm in found.items():
        for statistic in (norm.running_mean, norm.running_var):
            if statistic is not None and not torch.isfinite(statistic).all():
                raise NumericsError("the statistics are not finite", field="module", value=name)
    return list(found)


class KeptBuffers(Hook):
    """Keeps a model's buffers (batch norms' running statistics) with a training's checkpoint.

    The loop itself keeps parameters only. With several processes each has seen other images: the
    statistics are averaged after every step, so that all go on as one model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.buffers = {n: b for n, b in model.named_buffers() if b is not None}

    @torch.no_grad()
    def after_step(self, at: Training) -> None:
        """See ``Hook``."""
        if at.accelerator.num_processes == 1:
            return
        for buffer in self.buffers.values():
            if buffer.is_floating_point():
                torch.distributed.all_reduce(buffer)
                buffer /= at.accelerator.num_processes

    def state(self) -> dict[str, Tensor]:
        """See ``Hook``."""
        return {name: buffer.detach().clone() for name, buffer in self.buffers.items()}

    @torch.no_grad()
    def restore(self, state: dict[str, Tensor], at: Training) -> None:
        """See ``Hook``."""
        for name, value in state.items():
            self.buffers[name].copy_(value)
