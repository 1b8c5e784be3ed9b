"""Who is whom among channels: labels of activations, and which of them must go together.

Every channel a layer makes gets a number, its *atom*. A tensor's labels have the tensor's shape
and say which atom each element belongs to (``FREE``: none). Shape operations are done on labels as
they are on activations; operations that need two channels to go together merge their atoms.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

FREE = -1
"""Label of an element that belongs to no channel in particular."""


class Atoms:
    """Channels, and which of them were found to be one (a union-find on arrays)."""

    def __init__(self) -> None:
        self._held = np.arange(1 << 12, dtype=np.int64)
        self._count = 0
        self.pinned: list[tuple[np.ndarray, str]] = []

    def __len__(self) -> int:
        return self._count

    @property
    def _parent(self) -> np.ndarray:
        return self._held[: self._count]

    def fresh(self, count: int) -> Tensor:
        """``count`` new atoms, (count,) int64."""
        start, self._count = self._count, self._count + count
        if self._count > len(self._held):
            more = np.arange(2 * self._count, dtype=np.int64)
            more[:start] = self._held[:start]
            self._held = more
        return torch.arange(start, self._count)

    def find(self, labels: Tensor) -> Tensor:
        """Labels with every atom replaced by the first of those it is one with."""
        flat = labels.reshape(-1).numpy() if isinstance(labels, Tensor) else labels
        found = flat.copy()
        held = found >= 0
        found[held] = self._roots(found[held])
        return torch.from_numpy(found).reshape(labels.shape)

    def _roots(self, atoms: np.ndarray) -> np.ndarray:
        parent = self._parent
        roots = atoms
        while True:
            above = parent[roots]
            if np.array_equal(above, roots):
                break
            roots = parent[above]
        parent[atoms] = roots
        return roots

    def merge(self, left: Tensor, right: Tensor) -> None:
        """Make the atoms of two label tensors of one shape the same, element by element."""
        a, b = left.reshape(-1).numpy(), right.reshape(-1).numpy()
        both = (a >= 0) & (b >= 0) & (a != b)
        a, b = a[both], b[both]
        while len(a):
            a, b = self._roots(a), self._roots(b)
            apart = a != b
            a, b = a[apart], b[apart]
            np.minimum.at(self._parent, np.maximum(a, b), np.minimum(a, b))

    def pin(self, labels: Tensor, why: str) -> None:
        """Say that these channels can never go."""
        atoms = np.unique(labels.reshape(-1).numpy())
        atoms = atoms[atoms >= 0]
        if len(atoms):
            self.pinned.append((atoms, why))

    def reasons(self) -> dict[int, str]:
        """First atom of every channel that cannot go -> why."""
        found: dict[int, str] = {}
        for atoms, why in self.pinned:
            for root in np.unique(self._roots(atoms.copy())).tolist():
                found.setdefault(root, why)
        return found


def free(shape: Sequence[int]) -> Tensor:
    """Labels of a tensor no element of which is a channel's."""
    return torch.full((1,) * len(shape), FREE).expand(tuple(shape))


def along(atoms: Tensor, dim: int, shape: Sequence[int]) -> Tensor:
    """Labels of a tensor whose dimension ``dim`` counts the channels ``atoms``."""
    view = [1] * len(shape)
    view[dim] = len(atoms)
    return atoms.view(view).expand(tuple(shape))


def small(labels: Tensor) -> Tensor:
    """The same without the dimensions along which nothing changes (they get size 1)."""
    for dim in range(labels.dim()):
        if labels.shape[dim] > 1:
            first = labels.narrow(dim, 0, 1)
            if labels.stride(dim) == 0 or bool((labels == first).all()):
                labels = first
    return labels


def packed(labels: Tensor) -> Tensor:
    """The same labels held in as little memory as they need."""
    return small(labels).expand(labels.shape)


def changing(labels: Tensor) -> list[int]:
    """Dimensions along which the labels are not all the same."""
    return [d for d, size in enumerate(small(labels).shape) if size > 1]


def aligned(labels: Iterable[Tensor]) -> list[Tensor]:
    """Labels of tensors that broadcast together, each small, in a common number of dimensions."""
    parts = [small(part) for part in labels]
    most = max(part.dim() for part in parts)
    parts = [part.reshape((1,) * (most - part.dim()) + tuple(part.shape)) for part in parts]
    sizes = [max(part.shape[d] for part in parts) for d in range(most)]
    return [part.expand(sizes) for part in parts]
