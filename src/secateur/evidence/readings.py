"""What an allocator reads off a block of the dense model, small enough to keep for all blocks.

A reading is a pure function of one block: its weights, the second moments of its matrices'
inputs, and the activations of a bounded sample of tokens. It is a frozen dataclass, so two
allocators that ask for an equal reading share it; it is kept on disk by its name and fields.
The engine shows every block once, to all readings together (``run.readings``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from secateur.evidence.statistics import InputMoments


@dataclass(frozen=True)
class MatrixFacts:
    """One matrix of the block shown.

    Attributes:
        name: as in the plan.
        role: q k v qkv o gate up gate_up down fc1 fc2, or "" if not known.
        shape: (d_out, d_in).
        weight: gives the weight, float32 (d_out, d_in); a fresh read, do not write to it.
        moments: second moments of its inputs (diagonal); None when no reading asked for
            inputs, or no token reached it (an expert).
    """

    name: str
    role: str
    shape: tuple[int, int]
    weight: Callable[[], Tensor]
    moments: InputMoments | None = None


@dataclass(frozen=True)
class BlockFacts:
    """A block as a reading sees it.

    Attributes:
        index: its place in the model.
        name: its name.
        matrices: in the order they are defined.
        features: activations of sampled tokens, (T, d) float32, the same tokens in the same
            (random) order under every key: ``"input"`` and ``"output"`` of the block,
            ``"NAME|input"`` and ``"NAME|output"`` of its matrices (not of experts).
    """

    index: int
    name: str
    matrices: list[MatrixFacts]
    features: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Reading(ABC):
    """Something read off one block; subclasses are frozen dataclasses, their fields the key."""

    name: ClassVar[str] = ""
    inputs: ClassVar[bool] = False
    """Needs the input moments of the block's matrices."""

    @property
    def sample(self) -> int:
        """Tokens whose activations it needs; 0: none. It uses the first so many rows."""
        return 0

    @property
    def of_matrices(self) -> int:
        """Of those, tokens whose activations it needs of the block's matrices, not the block's."""
        return 0

    @abstractmethod
    def read(self, block: BlockFacts) -> dict[str, Tensor]:
        """Tensors by name (of a matrix, or of your own), on the CPU; small."""

    def key(self) -> dict[str, Any]:
        """What makes two readings the same."""
        return {"reading": self.name, **asdict(self)}


def sampled_positions(
    mask: Tensor | None, windows: int, length: int, tokens: int, seed: int = 0
) -> Tensor:
    """Where the sampled tokens lie in the flattened (windows * length) ids, in random order.

    They come from the first windows that hold enough real ones, so that few windows need to
    be run; calibration windows are drawn at random already.

    Args:
        mask: (windows, length) bool of real tokens, or None.
    """
    real = torch.ones(windows * length, dtype=torch.bool) if mask is None else mask.reshape(-1)
    places = real.nonzero().flatten()
    upto = int(places[min(tokens, len(places)) - 1]) // length + 1 if len(places) else 0
    places = places[places < upto * length]
    order = torch.randperm(len(places), generator=torch.Generator().manual_seed(seed))
    return places[order[:tokens]]
