"""Edge-popup: a sub-network of a random network found by training the mask, never the weights.

Ramanujan, Wortsman, Kembhavi, Farhadi, Rastegari, "What's Hidden in a Randomly Weighted Neural
Network?" (CVPR 2020, arXiv 1911.13299). Every weight has a score; the forward pass uses the
weights whose |score| is among the layer's largest, and the score's gradient passes straight
through the choice: dL/ds = dL/dw_eff * w * sign(s).

How much survives is given as ``keep`` or as ``sparsity``. The published code calls the *kept*
fraction "prune rate" in one place and the removed fraction in another; these words are avoided.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.errors import UsageError
from secateur.masks.scored import MaskedConv2d, MaskedLinear, ScoredLayer, masked_layers
from secateur.masks.target import Target
from secateur.progress import SILENT, Progress

Init = Literal["signed-constant", "kaiming"]


@dataclass(frozen=True, kw_only=True)
class EdgePopup:
    """How the random network is drawn and its mask trained.

    Attributes:
        keep: fraction of every layer's weights in use, or give
        sparsity: the fraction not in use.
        init: ``signed-constant`` (+-sqrt(2 / fan_in), the best in the paper) or ``kaiming``.
        scale_fan: multiply fan_in by the kept fraction, so that activations keep their size.
        lr, momentum, weight_decay, batch, epochs: SGD with cosine decay; the decay acts on scores.
        seed: of weights, scores and batches.
    """

    keep: float | None = None
    sparsity: float | None = None
    init: Init = "signed-constant"
    scale_fan: bool = True
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    batch: int = 128
    epochs: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.keep is None) == (self.sparsity is None):
            raise UsageError(
                "give either the fraction kept or the fraction removed",
                field="keep",
                value=self.keep,
                fix="keep=0.5, or sparsity=0.5",
            )
        if self.keep is not None and not 0 < self.keep <= 1:
            raise UsageError(
                "the kept fraction lies in (0, 1]", field="keep", value=self.keep, fix="keep=0.5"
            )
        if self.init not in ("signed-constant", "kaiming"):
            raise UsageError(
                "no such initialisation",
                field="init",
                value=self.init,
                fix="signed-constant or kaiming",
            )
        self.kept_of(1)

    def kept_of(self, total: int) -> int:
        """Weights kept out of ``total``; at least one."""
        removed = Target.parse(1 - self.keep if self.keep is not None else self.sparsity)
        return max(1, total - removed.count(total))

    def convert(self, model: nn.Module) -> nn.Module:
        """A copy of a chain's architecture with fresh frozen weights and scores to train.

        Linear and Conv2d lose their biases, BatchNorm its affine part; other modules are kept.
        """
        generator = torch.Generator().manual_seed(self.seed)
        return self._convert(model, generator)

    def fit(self, model: nn.Module, x: Tensor, y: Tensor, progress: Progress = SILENT) -> nn.Module:
        """Convert ``model`` and train the mask on inputs ``x`` with class labels ``y``."""
        masked = self.convert(model).to(x.device).train()
        optimiser = torch.optim.SGD(
            [part.scores for part in masked_layers(masked)],
            lr=self.lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
        )
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, self.epochs)
        generator = torch.Generator().manual_seed(self.seed + 1)
        with progress.stage("edge-popup", total=self.epochs, unit="epochs") as advance:
            for _ in range(self.epochs):
                for rows in torch.randperm(len(x), generator=generator).split(self.batch):
                    optimiser.zero_grad()
                    F.cross_entropy(masked(x[rows]), y[rows]).backward()
                    optimiser.step()
                schedule.step()
                advance(1)
        return masked.eval()

    def _convert(self, module: nn.Module, generator: torch.Generator) -> nn.Module:
        if isinstance(module, nn.Sequential):
            return nn.Sequential(*(self._convert(part, generator) for part in module))
        if isinstance(module, nn.Linear):
            layer: ScoredLayer = MaskedLinear(*self._draw(module.weight, generator))
        elif isinstance(module, nn.Conv2d):
            layer = MaskedConv2d(*self._draw(module.weight, generator), module)
        elif isinstance(module, nn.BatchNorm1d):
            return nn.BatchNorm1d(module.num_features, affine=False)
        elif isinstance(module, nn.BatchNorm2d):
            return nn.BatchNorm2d(module.num_features, affine=False)
        elif next(module.parameters(), None) is not None:
            raise UsageError(
                f"edge-popup has no masked form of {type(module).__name__}",
                field="model",
                value=type(module).__name__,
                fix="a Sequential of Linear, Conv2d, BatchNorm and parameter-free modules",
            )
        else:
            return module
        with torch.no_grad():
            layer.scores.uniform_(-1, 1, generator=generator)
            layer.scores.mul_(1 / math.sqrt(layer.weight[0].numel()))
        return layer

    def _draw(self, like: Tensor, generator: torch.Generator) -> tuple[Tensor, int]:
        kept = self.kept_of(like.numel())
        fan = like[0].numel() * (kept / like.numel() if self.scale_fan else 1.0)
        normal = torch.randn(like.shape, generator=generator)
        unit = normal.sign() if self.init == "signed-constant" else normal
        return unit * math.sqrt(2 / fan), kept


def shuffle_masks(model: nn.Module, seed: int = 0) -> None:
    """Replace every learnt mask by a random one of the same size (the control experiment)."""
    generator = torch.Generator().manual_seed(seed)
    for part in masked_layers(model):
        with torch.no_grad():
            part.scores.uniform_(-1, 1, generator=generator)
