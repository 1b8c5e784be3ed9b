"""Small networks, one for each way in which channels hang together."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.models.vision.mobilenet import MobileNet
from secateur.models.vision.resnet import ResNet, wrn
from secateur.models.vision.vit import Swin, ViT


class Dense(nn.Module):
    """DenseNet: every layer reads the concatenation of all before it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8 + 6 * i) for i in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(8 + 6 * i, 6, 3, padding=1) for i in range(3))
        self.fc = nn.Linear(26, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for norm, conv in zip(self.norms, self.convs, strict=True):
            x = torch.cat([x, conv(F.relu(norm(x)))], 1)
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Inception(nn.Module):
    """Branches side by side, one of them pooled and resized; flattened with its positions."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.three = nn.Conv2d(3, 5, 1), nn.Conv2d(3, 7, 3, padding=1)
        self.mix = nn.Conv2d(12, 6, 1)
        self.fc = nn.Linear(6 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        small = F.interpolate(F.max_pool2d(self.one(x), 2), scale_factor=2)
        x = self.mix(torch.cat([small, F.leaky_relu(self.three(x))], 1))
        return self.fc(torch.flatten(F.avg_pool2d(x, 2), 1))


class Grouped(nn.Module):
    """ResNeXt: a grouped convolution between point-wise ones, a skip around them."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.a, self.b = nn.Conv2d(8, 16, 1), nn.Conv2d(16, 32, 3, padding=1, groups=groups)
        self.norm = nn.BatchNorm2d(32)
        self.c, self.fc = nn.Conv2d(32, 8, 1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.c(F.silu(self.norm(self.b(F.gelu(self.a(x))))))
        return self.fc(x.mean([2, 3]))


class Multiplied(nn.Module):
    """Depth-wise with two outputs for each input, then a transposed convolution and its crop."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 1)
        self.depthwise = nn.Conv2d(6, 12, 3, padding=1, groups=6)
        self.up = nn.ConvTranspose2d(12, 7, 2, 2)
        self.slope = nn.PReLU(7)
        self.down = nn.Conv2d(7, 4, 2, 2)
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.slope(self.up(F.relu(self.depthwise(self.stem(x)))))
        return self.fc(self.down(x).mean((2, 3)))


class Shuffle(nn.Module):
    """ShuffleNet: halves of the channels go different ways and are mixed."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.right = nn.Conv2d(3, 12, 1), nn.Conv2d(6, 6, 3, padding=1)
        self.last, self.fc = nn.Conv2d(12, 8, 1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.stem(x).chunk(2, 1)
        x = torch.cat([left, F.relu(self.right(right))], 1)
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.fc(self.last(x).mean((2, 3)))


class Gated(nn.Module):
    """A gated linear unit, a group norm, scales of each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 1)
        self.norm = nn.GroupNorm(4, 8)
        self.scale = nn.Parameter(torch.rand(8, 1, 1) + 0.5)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.stem(x).chunk(2, 1)
        x = self.norm(value * torch.sigmoid(gate)) * self.scale
        return self.fc(x.amax((2, 3)))


class ConvNeXt(nn.Module):
    """Depth-wise convolution, layer norm over channels in the last place, scaled residual."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 2, 2)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.norm = nn.LayerNorm(8)
        self.fc1, self.fc2 = nn.Linear(8, 24), nn.Linear(24, 8)
        self.gamma = nn.Parameter(torch.rand(8))
        self.last, self.head = nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.gamma * self.fc2(F.gelu(self.fc1(y)))
        x = x + y.permute(0, 3, 1, 2)
        return self.head(self.last(x.mean((-2, -1))))


class Torch(nn.Module):
    """PyTorch's own transformer encoder."""

    def __init__(self, first: bool = True) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 4, 4)
        layer = nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0, batch_first=first)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.first, self.head = first, nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).permute(*((0, 2, 1) if self.first else (2, 0, 1)))
        return self.head(self.layers(x).mean(1 if self.first else 0))


class Written(nn.Module):
    """Attention whose code takes its inner width from the outer one: heads cannot go."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.num_heads = nn.Conv2d(3, 16, 4, 4), 4
        self.qkv, self.proj, self.head = nn.Linear(16, 48), nn.Linear(16, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        b, n, c = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, c // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c)
        return self.head((x + self.proj(y)).mean(1))


class Einsum(nn.Module):
    """Attention as sums over named dimensions, with separate projections."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.heads = nn.Conv2d(3, 16, 4, 4), 4
        self.q, self.k, self.v = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.out, self.head = nn.Linear(16, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        b, n = x.shape[:2]
        q, k, v = (f(x).view(b, n, self.heads, -1) for f in (self.q, self.k, self.v))
        scores = torch.einsum("bihd,bjhd->bhij", q, k) / 2
        y = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v)
        return self.head((x + self.out(y.reshape(b, n, -1))).mean(1))


class Mixer(nn.Module):
    """Linear layers over positions and over channels in turn, a group norm of one group."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.norm = nn.Conv2d(3, 12, 4, 4), nn.LayerNorm(12)
        self.tokens = nn.Sequential(nn.Linear(9, 5), nn.GELU(), nn.Linear(5, 9))
        self.fc1, self.fc2, self.head = nn.Linear(12, 20), nn.Linear(20, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2)
        x = x + self.tokens(x)
        x = x.transpose(1, 2)
        x = x + self.fc2(F.gelu(self.fc1(self.norm(x))))
        return self.head(x.mean(1))


class UNet(nn.Module):
    """Down, up, and what was seen on the way down beside it; a pixel shuffle."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 8, 3, 2, 1)
        self.up = nn.ConvTranspose2d(8, 5, 2, 2)
        self.wide, self.c = nn.Conv2d(11, 16, 3, 2, 1), nn.Conv2d(4, 7, 1)
        self.fc = nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.a(x))
        x = torch.cat([self.up(F.elu(self.b(a))), a], 1)
        return self.fc(self.c(F.pixel_shuffle(self.wide(x), 2)).mean((2, 3)))


class TimmLike(nn.Module):
    """A block as libraries carry it along: layers called qkv and proj, widths in the code."""

    class Attention(nn.Module):
        def __init__(self, twisted: bool) -> None:
            super().__init__()
            self.num_heads, self.scale, self.twisted = 4, 0.5, twisted
            self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            b, n, c = x.shape
            qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, c // self.num_heads)
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
            scores = (q * self.scale) @ k.transpose(-2, -1)
            scores = scores.softmax(-1) + (0.1 if self.twisted else 0.0)
            return self.proj((scores @ v).transpose(1, 2).reshape(b, n, c))

    def __init__(self, twisted: bool = False) -> None:
        super().__init__()
        self.patch, self.norm = nn.Conv2d(3, 16, 4, 4), nn.LayerNorm(16)
        self.attn, self.head = self.Attention(twisted), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        return self.head((x + self.attn(self.norm(x))).mean(1))


CASES: dict[str, tuple[Any, int, int]] = {  # make, image channels, size
    "resnet": (lambda: ResNet(3, 5, 8, 2), 3, 12),
    "wrn": (lambda: wrn(3, 5, 8), 3, 12),
    "mobilenet": (lambda: MobileNet(3, 5, 8), 3, 12),
    "gated mobilenet": (lambda: MobileNet(3, 5, 8, gate=True, kernel=5), 3, 12),
    "vit": (lambda: ViT(3, 5, 12, 4, 16, 2), 3, 12),
    "swin": (lambda: Swin(3, 5, 16, 2, 8, 2, 2, 2, 2), 3, 16),
    "dense": (Dense, 3, 8),
    "inception": (Inception, 3, 8),
    "groups": (lambda: Grouped(8), 3, 8),
    "few groups": (lambda: Grouped(2), 3, 8),
    "multiplied": (Multiplied, 3, 8),
    "shuffle": (Shuffle, 3, 8),
    "glu": (Gated, 3, 8),
    "convnext": (ConvNeXt, 3, 8),
    "einsum": (Einsum, 3, 12),
    "mixer": (Mixer, 3, 12),
    "unet": (UNet, 3, 8),
    "torch": (Torch, 3, 12),
    "torch, sequence first": (lambda: Torch(False), 3, 12),
}


def network(name: str, seed: int = 0) -> tuple[nn.Module, Tensor]:
    """A network whose norms have seen something, and an example."""
    make, channels, size = CASES[name]
    torch.manual_seed(seed)
    model = make()
    liven(model)
    return model.eval(), torch.randn(1, channels, size, size)


def liven(model: nn.Module) -> None:
    """Statistics and affine numbers that are not all the same."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
            if isinstance(module, nn.BatchNorm2d | nn.GroupNorm | nn.LayerNorm):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_()


def some_gone(groups: Any, seed: int = 0, share: float = 0.4) -> dict[str, Tensor]:
    """About ``share`` of the units of every group that can lose any, never all."""
    generator = torch.Generator().manual_seed(seed)
    gone = {}
    for group in groups.prunable:
        count = min(group.n_units - 1, max(1, round(share * group.n_units)))
        units = torch.zeros(group.n_units, dtype=torch.bool)
        units[torch.randperm(group.n_units, generator=generator)[:count]] = True
        gone[group.key] = units
    return gone
