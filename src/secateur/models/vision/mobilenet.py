"""Depth-wise separable networks for small images: inverted residuals with linear bottlenecks,
Sandler et al. 2018 (arXiv:1801.04381), and squeeze-and-excitation as of Howard et al. 2019
(arXiv:1905.02244) where asked for.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class SqueezeExcite(nn.Module):
    """Each channel times a gate in [0, 1] computed from all channels' means."""

    def __init__(self, channels: int, reduced: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, reduced, 1)
        self.expand = nn.Conv2d(reduced, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same."""
        gate = self.expand(F.relu(self.reduce(F.adaptive_avg_pool2d(x, 1))))
        return x * F.hardsigmoid(gate)


class InvertedResidual(nn.Module):
    """Point-wise expansion, depth-wise convolution, point-wise projection."""

    def __init__(
        self, inputs: int, outputs: int, stride: int, expansion: int, kernel: int, gate: bool
    ) -> None:
        super().__init__()
        inside = inputs * expansion
        self.expand = nn.Conv2d(inputs, inside, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inside)
        self.depthwise = nn.Conv2d(
            inside, inside, kernel, stride, kernel // 2, groups=inside, bias=False
        )
        self.bn2 = nn.BatchNorm2d(inside)
        self.gate = SqueezeExcite(inside, max(4, inside // 4)) if gate else nn.Identity()
        self.project = nn.Conv2d(inside, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.skips = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) -> (B, outputs, H / stride, W / stride)."""
        y = F.relu6(self.bn1(self.expand(x)))
        y = self.gate(F.relu6(self.bn2(self.depthwise(y))))
        y = self.bn3(self.project(y))
        out: Tensor = x + y if self.skips else y
        return out


class MobileNet(nn.Module):
    """A stem, inverted residuals in three resolutions, and a wide last layer.

    Args:
        channels: of the images.
        classes: logits.
        width: channels of the narrowest blocks.
        expansion: how much wider blocks are inside.
        kernel: of the depth-wise convolutions.
        gate: with squeeze-and-excitation.
    """

    def __init__(
        self,
        channels: int = 1,
        classes: int = 10,
        width: int = 16,
        expansion: int = 4,
        kernel: int = 3,
        gate: bool = False,
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        plan = [(width, 1), (2 * width, 2), (2 * width, 1), (3 * width, 2), (3 * width, 1)]
        before, blocks = width, []
        for outputs, stride in plan:
            blocks.append(InvertedResidual(before, outputs, stride, expansion, kernel, gate))
            before = outputs
        self.blocks = nn.Sequential(*blocks)
        self.last = nn.Conv2d(before, 4 * before, 1, bias=False)
        self.bn_last = nn.BatchNorm2d(4 * before)
        self.classifier = nn.Linear(4 * before, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) -> (B, classes)."""
        x = self.blocks(F.relu6(self.bn(self.stem(x))))
        x = F.relu6(self.bn_last(self.last(x)))
        out: Tensor = self.classifier(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return out
