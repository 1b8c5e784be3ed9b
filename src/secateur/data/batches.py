"""What a training draws from, and what one forward gets: tokens or labelled images."""

from __future__ import annotations

import random
from collections.abc import Sequence, Sized
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Windows of one forward: ``ids`` (B, L) int64, ``mask`` (B, L) bool or None."""

    ids: Tensor
    mask: Tensor | None = None

    @property
    def predicted(self) -> int:
        """Tokens whose prediction is scored."""
        if self.mask is None:
            return int(self.ids.shape[0] * (self.ids.shape[1] - 1))
        return int((self.mask[:, 1:] & self.mask[:, :-1]).sum())

    def to(self, device: torch.device) -> Batch:
        """Itself, on ``device``."""
        return Batch(self.ids.to(device), None if self.mask is None else self.mask.to(device))


@dataclass(frozen=True)
class ImageBatch:
    """Images of one forward: ``pixels`` (B, C, H, W) float, ``labels`` (B,) int64."""

    pixels: Tensor
    labels: Tensor

    @property
    def predicted(self) -> int:
        """Images, each of which is scored."""
        return len(self.labels)

    def to(self, device: torch.device) -> ImageBatch:
        """Itself, on ``device``."""
        return ImageBatch(self.pixels.to(device), self.labels.to(device))


class Order(Protocol):
    """An order over samples in which a batch is named by its position alone.

    So a training resumes where it was by knowing its step, on any number of processes.
    """

    def rows(self, start: int, count: int) -> list[int]:
        """Numbers of the samples at positions ``start`` ... ``start + count - 1``."""


@dataclass(frozen=True)
class Shuffled:
    """An endless, deterministic order over samples: each pass a permutation of its own."""

    samples: Sized
    seed: int = 0

    def rows(self, start: int, count: int) -> list[int]:
        """Numbers of the samples at positions ``start`` ... ``start + count - 1``.

        >>> sorted(Shuffled("abcd").rows(4, 4))
        [0, 1, 2, 3]
        """
        n = len(self.samples)
        chosen: list[int] = []
        while len(chosen) < count:
            turn, offset = divmod(start + len(chosen), n)
            order = _permutation(n, self.seed, turn)
            chosen += order[offset : offset + count - len(chosen)]
        return chosen


@lru_cache(maxsize=4)
def _permutation(count: int, seed: int, turn: int) -> tuple[int, ...]:
    """The order of one pass; kept, since every step of the pass asks for it."""
    order = list(range(count))
    random.Random(f"{seed}/{turn}").shuffle(order)
    return tuple(order)


class Data(Protocol):
    """Numbered samples that a training draws batches from."""

    @property
    def unit(self) -> str:
        """What speed is counted in: ``tokens`` or ``images``."""

    def order(self, seed: int) -> Order:
        """In which order they are drawn."""

    @property
    def length(self) -> int:
        """Units in a sample."""

    @property
    def fingerprint(self) -> str:
        """A hash of the samples: a training goes on only with the same ones."""

    def scored(self, rows: Sequence[int]) -> int:
        """How many predictions of these samples are scored."""

    def batch(self, rows: Sequence[int]) -> Any:
        """These samples, as something with ``predicted`` and ``to(device)``."""
