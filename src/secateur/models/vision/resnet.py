"""Residual networks for small images: He et al. 2016 (arXiv:1512.03385, section 4.2) and wide ones,
Zagoruyko and Komodakis 2016 (arXiv:1605.07146), with a batch norm and ReLU before each convolution.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Basic(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut; norms and ReLUs after the convolutions."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) -> (B, outputs, H / stride, W / stride)."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class PreActivation(nn.Module):
    """The wide network's block: norms and ReLUs before the convolutions."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.shortcut: nn.Module | None = None
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) -> (B, outputs, H / stride, W / stride)."""
        y = F.relu(self.bn1(x))
        beside = x if self.shortcut is None else self.shortcut(y)
        out: Tensor = self.conv2(F.relu(self.bn2(self.conv1(y)))) + beside
        return out


class ResNet(nn.Module):
    """Three stages of ``blocks`` blocks, each twice as wide and half as large as the one before.

    Args:
        channels: of the images.
        classes: logits.
        width: channels of the first stage.
        blocks: in each stage.
        wide: pre-activation blocks.
    """

    def __init__(
        self,
        channels: int = 1,
        classes: int = 10,
        width: int = 16,
        blocks: int = 2,
        wide: bool = False,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 16 if wide else width, 3, 1, 1, bias=False)
        before = self.conv1.out_channels
        self.bn1 = nn.Identity() if wide else nn.BatchNorm2d(before)
        kind = PreActivation if wide else Basic
        self.stages = nn.ModuleList()
        for stage in range(3):
            outputs = width * 2**stage
            stage_blocks = []
            for block in range(blocks):
                stride = 2 if stage and not block else 1
                stage_blocks.append(kind(before, outputs, stride))
                before = outputs
            self.stages.append(nn.Sequential(*stage_blocks))
        self.bn2 = nn.BatchNorm2d(before) if wide else nn.Identity()
        self.fc = nn.Linear(before, classes)
        self.wide = wide

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) -> (B, classes)."""
        x = self.bn1(self.conv1(x))
        x = x if self.wide else F.relu(x)
        for stage in self.stages:
            x = stage(x)
        x = F.relu(self.bn2(x))
        out: Tensor = self.fc(x.mean((2, 3)))
        return out


def wrn(channels: int = 1, classes: int = 10, width: int = 32, blocks: int = 1) -> ResNet:
    """A wide residual network; ``width`` is that of its first stage (16 times the factor)."""
    return ResNet(channels, classes, width, blocks, wide=True)
