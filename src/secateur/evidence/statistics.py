"""Streaming, mergeable statistics of a linear layer's inputs and of its gradients.

All of them are plain sums, so any split of the data over batches, runs or machines gives
the same result after ``merge``; normalisation happens only when a figure is read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from secateur.errors import NumericsError

_STRIP = 192  # features whose products with all later ones are one GEMM


def all_finite(tensor: Tensor) -> bool:
    """True if no entry is NaN or infinite.

    One bad entry makes the sum bad, and a sum is read many times faster than a mask is made;
    a bad sum may be mere overflow, so only then every entry is looked at.
    """
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())


def add_gram(total: Tensor, x: Tensor, scale: float = 1.0) -> None:
    """total += scale x^T x for x (tokens, d), total symmetric (d, d).

    On a CPU each strip of rows is multiplied from the diagonal on and mirrored, which saves
    up to half of the work; on a GPU one product is faster than many.
    """
    size = x.shape[1]
    if x.device.type != "cpu" or size <= _STRIP:
        total.addmm_(x.T, x, alpha=scale)
        return
    for start in range(0, size, _STRIP):
        stop = start + _STRIP
        total[start:stop, start:].addmm_(x[:, start:stop].T, x[:, start:], alpha=scale)
        total[stop:, start:stop] = total[start:stop, stop:].T


class InputMoments:
    """Second moments of the inputs ``X`` (tokens, d_in) of a linear layer.

    ``diagonal`` holds sum_t x_tj^2 and, when asked for, ``gram`` holds X^T X (d_in, d_in).
    Padded tokens are left out by giving ``keep``. Accumulated in float32 per batch.

    ``total`` holds sum_t x_t (d_in,), beside ``gram`` only, and not where it was read from a store.

    ``cross``, if gathered, is X_dense^T X (d_in, d_in): the same tokens' inputs in the dense
    model against those in the model pruned so far.
    """

    def __init__(
        self, features: int, *, gram: bool = False, device: torch.device | str = "cpu"
    ) -> None:
        self.tokens = 0
        self.diagonal = torch.zeros(features, dtype=torch.float32, device=device)
        self.gram: Tensor | None = (
            torch.zeros(features, features, dtype=torch.float32, device=device) if gram else None
        )
        self.total: Tensor | None = torch.zeros(features, device=device) if gram else None
        self.cross: Tensor | None = None
        # (tokens, damping, factor): the last factor made from these sums (methods.factors)
        self.solved: tuple[int, float, Any] | None = None

    @torch.no_grad()
    def update(self, inputs: Tensor, keep: Tensor | None = None) -> None:
        """Add a batch of inputs (..., d_in); ``keep`` (...) marks the tokens that count."""
        x = inputs.reshape(-1, inputs.shape[-1])
        if keep is not None:
            x = x[keep.reshape(-1)]
        if x.shape[0] == 0:
            return
        x = x.to(torch.float32)
        self.tokens += x.shape[0]
        if self.total is not None:
            self.total += x.sum(0)
        if self.gram is None:
            self.diagonal += x.square().sum(0)
        else:
            add_gram(self.gram, x)
            self.diagonal = self.gram.diagonal()

    @torch.no_grad()
    def update_cross(self, dense: Tensor, inputs: Tensor, keep: Tensor | None = None) -> None:
        """Add the dense model's inputs (..., d_in) beside those ``update`` was given."""
        pair = [t.reshape(-1, t.shape[-1]).to(torch.float32) for t in (dense, inputs)]
        if keep is not None:
            pair = [x[keep.reshape(-1)] for x in pair]
        if self.cross is None:
            self.cross = torch.zeros(
                pair[0].shape[1], pair[1].shape[1], device=self.diagonal.device
            )
        self.cross.addmm_(pair[0].T, pair[1])

    def merge(self, other: InputMoments) -> None:
        """Add what another machine, run or batch has seen."""
        self.tokens += other.tokens
        if self.total is not None:
            theirs = other.total
            self.total = None if theirs is None else self.total + theirs.to(self.total.device)
        if other.cross is not None:
            moved = other.cross.to(self.diagonal.device)
            self.cross = moved if self.cross is None else self.cross + moved
        if self.gram is not None and other.gram is not None:
            self.gram += other.gram.to(self.gram.device)
            self.diagonal = self.gram.diagonal()
        else:
            self.gram = None
            self.diagonal = self.diagonal + other.diagonal.to(self.diagonal.device)

    def mean_square(self) -> Tensor:
        """E[x_j^2] over tokens, (d_in,)."""
        return self.diagonal / max(1, self.tokens)

    def mean(self) -> Tensor:
        """E[x] over tokens, (d_in,)."""
        if self.total is None:
            raise ValueError("the sums of the inputs were not kept")
        return self.total / max(1, self.tokens)

    def second_moment(self) -> Tensor:
        """E[x x^T] over tokens, (d_in, d_in)."""
        if self.gram is None:
            raise ValueError("only the diagonal was gathered")
        return self.gram / max(1, self.tokens)

    def check(self, name: str) -> None:
        """Stop at the first NaN or infinity, naming the module.

        Raises:
            NumericsError: a sum is not finite.
        """
        if not all_finite(self.diagonal):
            bad = int((~torch.isfinite(self.diagonal)).sum())
            raise NumericsError(
                f"the inputs of '{name}' are not finite in {bad} of {self.diagonal.numel()} features",
                fix="load the model in float32 (--dtype float32) or look for broken weights before it",
            )

    def state(self) -> dict[str, Tensor]:
        """Tensors to save."""
        state = {"tokens": torch.tensor(self.tokens)}
        state |= (
            {"diagonal": self.diagonal.contiguous()} if self.gram is None else {"gram": self.gram}
        )
        return state

    @classmethod
    def from_state(
        cls, state: dict[str, Tensor], device: torch.device | str = "cpu"
    ) -> InputMoments:
        """The inverse of ``state``."""
        out = cls(0, device=device)
        out.total = None
        out.tokens = int(state["tokens"])
        if "gram" in state:
            out.gram = state["gram"].to(device)
            out.diagonal = out.gram.diagonal()
        else:
            out.diagonal = state["diagonal"].to(device)
        return out


class GradientMoments:
    """Per-weight sums over samples of |g|, g^2 and g, each (d_out, d_in) and optional.

    ``g`` is the gradient of one sequence's mean cross-entropy with respect to the weight.
    """

    def __init__(self, norms: tuple[str, ...] = ("l1",)) -> None:
        self.norms = norms
        self.samples = 0
        self.sums: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self, gradient: Tensor, *, consume: bool = False) -> None:
        """Add the gradient of one sample, (d_out, d_in).

        With ``consume`` its memory may be overwritten: nothing of its size is allocated.
        """
        g = gradient.to(torch.float32)
        for norm in self.norms:
            if norm not in self.sums:
                self.sums[norm] = torch.zeros_like(g)
        if "l2" in self.sums:
            self.sums["l2"].addcmul_(g, g)
        if "signed" in self.sums:
            self.sums["signed"] += g
        if "l1" in self.sums:
            self.sums["l1"] += g.abs_() if consume else g.abs()
        self.samples += 1

    def merge(self, other: GradientMoments) -> None:
        """Add another machine's samples."""
        self.samples += other.samples
        for norm, total in other.sums.items():
            self.sums[norm] = self.sums[norm] + total if norm in self.sums else total

    def to(self, device: torch.device | str) -> GradientMoments:
        """The same sums, moved in place."""
        self.sums = {name: tensor.to(device) for name, tensor in self.sums.items()}
        return self

    def norm(self, kind: str) -> Tensor:
        """``l1``: sum |g|; ``l2``: sqrt(sum g^2); ``signed``: |sum g|. Over samples, not averaged."""
        total = self.sums[kind]
        return total.sqrt() if kind == "l2" else total.abs()


@dataclass
class Evidence:
    """All that is known about one matrix; a method reads what it declared in ``needs``."""

    name: str
    inputs: InputMoments | None = None
    gradients: GradientMoments | None = None
    sequences: int = 0
    """Calibration sequences behind ``inputs`` (the original codes normalise by it)."""

    def moments(self) -> InputMoments:
        """The input moments, which the engine gathers for every method that needs them."""
        if self.inputs is None:
            raise ValueError(f"no input statistics were gathered for '{self.name}'")
        return self.inputs

    def gradient(self, norm: str) -> Tensor:
        """A gradient norm over samples, (d_out, d_in)."""
        if self.gradients is None:
            raise ValueError(f"no gradients were gathered for '{self.name}'")
        return self.gradients.norm(norm)
