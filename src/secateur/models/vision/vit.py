"""Vision transformers for small images: plain, Dosovitskiy et al. 2021 (arXiv:2010.11929), and with
shifted windows, Liu et al. 2021 (arXiv:2103.14030).

No width is written into the code that runs: heads and channels are counted in the tensors.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Self-attention over (B, L, d), with a bias for each pair of positions where there is one.

    Args:
        width: d.
        heads: how many; ``num_heads`` follows a cut.
        bias: (2 s - 1)^2 relative positions of windows of s x s, or None.
    """

    index: Tensor

    def __init__(self, width: int, heads: int, window: int | None = None) -> None:
        super().__init__()
        self.num_heads, self.scale = heads, (width // heads) ** -0.5
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.table: nn.Parameter | None = None
        if window is not None:
            self.table = nn.Parameter(torch.randn((2 * window - 1) ** 2, heads) * 0.02)
            place = torch.stack(
                torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
            ).flatten(1)
            far = (place[:, :, None] - place[:, None]) + window - 1
            index = far[0] * (2 * window - 1) + far[1]
            self.register_buffer("index", index, persistent=False)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, L, d) -> the same; ``mask`` (windows, L, L) is added to the scores."""
        count, length = x.shape[:2]
        qkv = self.qkv(x).reshape(count, length, 3, self.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        scores = q @ k.transpose(-2, -1) * self.scale
        if self.table is not None:
            bias = self.table[self.index.flatten()].view(length, length, -1)
            scores = scores + bias.permute(2, 0, 1)
        if mask is not None:
            windows = mask.shape[0]
            scores = scores.view(count // windows, windows, -1, length, length)
            scores = (scores + mask[:, None]).view(count, -1, length, length)
        context = scores.softmax(-1) @ v
        out: Tensor = self.proj(context.transpose(1, 2).reshape(count, length, -1))
        return out


class Mlp(nn.Module):
    """Two linear layers with a GELU between."""

    def __init__(self, width: int, inside: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, inside), nn.Linear(inside, width)

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) -> the same."""
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, width: int, heads: int, ratio: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.mlp = Mlp(width, ratio * width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, d) -> the same."""
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class ViT(nn.Module):
    """Patches, a class token, positions, and ``depth`` blocks.

    Args:
        channels: of the images; size: their height and width; patch: of a token's square.
        classes: logits. width, depth, heads, ratio: of the blocks.
    """

    def __init__(
        self,
        channels: int = 1,
        classes: int = 10,
        size: int = 28,
        patch: int = 7,
        width: int = 64,
        depth: int = 4,
        heads: int = 4,
        ratio: int = 2,
    ) -> None:
        super().__init__()
        self.patch = nn.Conv2d(channels, width, patch, patch)
        tokens = (size // patch) ** 2
        self.cls = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.position = nn.Parameter(torch.randn(1, tokens + 1, width) * 0.02)
        self.blocks = nn.Sequential(*[Block(width, heads, ratio) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, size, size) -> (B, classes)."""
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1) + self.position
        out: Tensor = self.head(self.norm(self.blocks(x))[:, 0])
        return out


class WindowBlock(nn.Module):
    """Attention inside windows, shifted by half a window in every other block, and an MLP."""

    mask: Tensor | None

    def __init__(
        self, width: int, heads: int, ratio: int, size: int, window: int, shifted: bool
    ) -> None:
        super().__init__()
        self.window, self.shift = window, window // 2 if shifted and size > window else 0
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = Attention(width, heads, window)
        self.mlp = Mlp(width, ratio * width)
        mask = None
        if self.shift:  # windows that wrap around must not see across the edge
            zones = torch.zeros(1, size, size, 1)
            edges = (slice(-window), slice(-window, -self.shift), slice(-self.shift, None))
            for number, (rows, columns) in enumerate((r, c) for r in edges for c in edges):
                zones[:, rows, columns] = number
            zones = self._split(zones).squeeze(-1)
            mask = (zones[:, None] != zones[:, :, None]) * -100.0
        self.register_buffer("mask", mask, persistent=False)

    def _split(self, x: Tensor) -> Tensor:
        """(B, H, W, d) -> (B windows, s s, d)."""
        b, h, w, _ = x.shape
        s = self.window
        x = x.view(b, h // s, s, w // s, s, -1).transpose(2, 3)
        return x.reshape(b * (h // s) * (w // s), s * s, -1)

    def _join(self, x: Tensor, shape: Any) -> Tensor:
        b, h, w = shape[:3]
        s = self.window
        return x.view(b, h // s, w // s, s, s, -1).transpose(2, 3).reshape(b, h, w, -1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, d) -> the same."""
        y = self.norm1(x)
        if self.shift:
            y = torch.roll(y, (-self.shift, -self.shift), (1, 2))
        y = self._join(self.attn(self._split(y), self.mask), x.shape)
        if self.shift:
            y = torch.roll(y, (self.shift, self.shift), (1, 2))
        x = x + y
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class Merge(nn.Module):
    """Four neighbours become one, twice as wide."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * width)
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, d) -> (B, H / 2, W / 2, 2 d)."""
        parts = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
        out: Tensor = self.reduction(self.norm(torch.cat(parts, -1)))
        return out


class Swin(nn.Module):
    """Two stages of shifted windows.

    Args:
        channels: of the images; size: their height and width, a multiple of 4 ``patch``.
        classes: logits. patch: of a token's square. width: of the first stage.
        depth: blocks in each stage. heads: of the first stage. ratio: of the MLPs.
    """

    def __init__(
        self,
        channels: int = 1,
        classes: int = 10,
        size: int = 32,
        patch: int = 2,
        width: int = 32,
        depth: int = 2,
        heads: int = 2,
        ratio: int = 2,
        window: int = 4,
    ) -> None:
        super().__init__()
        self.patch = nn.Conv2d(channels, width, patch, patch)
        side = size // patch
        self.stage1 = nn.Sequential(
            *[WindowBlock(width, heads, ratio, side, window, i % 2 == 1) for i in range(depth)]
        )
        self.merge = Merge(width)
        self.stage2 = nn.Sequential(
            *[
                WindowBlock(2 * width, 2 * heads, ratio, side // 2, window, i % 2 == 1)
                for i in range(depth)
            ]
        )
        self.norm = nn.LayerNorm(2 * width)
        self.head = nn.Linear(2 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, size, size) -> (B, classes)."""
        x = self.patch(x).permute(0, 2, 3, 1)
        x = self.stage2(self.merge(self.stage1(x)))
        out: Tensor = self.head(self.norm(x).mean((1, 2)))
        return out
