"""How much the activations of different layers say the same: linear CKA over sampled tokens.

RM(i, j) = ||X_i^T X_j||_F^2 / (||X_i^T X_i||_F ||X_j^T X_j||_F) in [0, 1], X (T, d) with the same
tokens in its rows. With G = X X^T it is <G_i, G_j> / (||G_i|| ||G_j||): one GEMM per layer and dot
products, where the feature form takes one per pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from secateur.errors import UsageError
from secateur.evidence.readings import BlockFacts, Reading
from secateur.evidence.statistics import add_gram

Feature = Literal["input", "output", "gate"]
Normalise = Literal["none", "centre", "standardise"]
_GATES = ("gate", "gate_up", "fc1", "up")
_CHUNK = 1 << 18  # entries of all Grams whose products are summed before float64


def normalised(x: Tensor, how: Normalise = "centre") -> Tensor:
    """Features (T, d) as they are, with their mean over tokens removed, or also at unit variance.

    Uncentred, a few massive activations dominate every product and all layers look alike.
    """
    x = x.to(torch.float32)
    if how == "none":
        return x
    x = x - x.mean(0, keepdim=True)
    if how == "standardise":
        x = x / x.square().mean(0, keepdim=True).sqrt().clamp_min(1e-12)
    return x


def token_gram(x: Tensor) -> Tensor:
    """X X^T, (T, T) float32."""
    gram = torch.zeros(x.shape[0], x.shape[0], dtype=torch.float32, device=x.device)
    add_gram(gram, x.T.contiguous())
    return gram


def redundancy(grams: Sequence[Tensor]) -> Tensor:
    """Psi (n, n) float64 of n token Grams (T, T): symmetric, unit diagonal, entries in [0, 1].

    A layer whose features are constant is redundant with nothing: 0 off the diagonal.
    """
    n = len(grams)
    products = torch.zeros(n, n, dtype=torch.float64)
    flat = [g.reshape(-1) for g in grams]
    width = max(1, _CHUNK // n)
    for start in range(0, flat[0].numel(), width):
        part = torch.stack([f[start : start + width] for f in flat])
        products += (part @ part.T).double()
    products = (products + products.T) / 2  # a GEMM is symmetric only up to rounding
    norm = products.diagonal().sqrt()
    psi = products / (norm[:, None] * norm).clamp_min(torch.finfo(torch.float64).tiny)
    return psi.clamp(0, 1).fill_diagonal_(1.0)


def redundancy_of_features(features: Sequence[Tensor]) -> Tensor:
    """The same in feature space, a GEMM for each pair: for T much larger than d, and as a check."""
    x = [f.double() for f in features]
    n = len(x)
    squares = torch.tensor(
        [[float((x[i].T @ x[j]).square().sum()) for j in range(n)] for i in range(n)],
        dtype=torch.float64,
    )
    norm = squares.diagonal().sqrt()
    tiny = torch.finfo(torch.float64).tiny
    return (squares / (norm[:, None] * norm).clamp_min(tiny)).clamp(0, 1).fill_diagonal_(1.0)


@dataclass(frozen=True)
class BlockFeatures(Reading):
    """A block's activations of sampled tokens: (T, d) if that is smaller than its (T, T) Gram.

    Attributes:
        feature: the block's ``input`` or ``output``, or the output of its ``gate`` matrix.
        tokens: how many are sampled.
        normalise: see ``normalised``.
    """

    name = "block-features"

    feature: Feature = "input"
    tokens: int = 2048
    normalise: Normalise = "centre"

    @property
    def sample(self) -> int:
        """Tokens whose activations are needed."""
        return self.tokens

    @property
    def of_matrices(self) -> int:
        """Of matrices only for the gate."""
        return self.tokens if self.feature == "gate" else 0

    def read(self, block: BlockFacts) -> dict[str, Tensor]:
        """``features`` (T, d) or ``gram`` (T, T), float32."""
        key: str = self.feature
        if self.feature == "gate":
            gates = [m.name for role in _GATES for m in block.matrices if m.role == role]
            key = next((f"{n}|output" for n in gates if f"{n}|output" in block.features), "")
        if key not in block.features:
            raise UsageError(
                f"block '{block.name}' shows no such activations",
                field="feature",
                value=self.feature,
                fix="input or output",
            )
        x = normalised(block.features[key][: self.tokens], self.normalise)
        return {"gram": token_gram(x)} if x.shape[1] > x.shape[0] else {"features": x}


def gram_of(record: dict[str, Tensor]) -> Tensor:
    """The token Gram (T, T) of what ``BlockFeatures`` kept of a block."""
    return record["gram"] if "gram" in record else token_gram(record["features"])


@dataclass(frozen=True)
class MatrixRedundancy(Reading):
    """Redundancy among the matrices of one block.

    Attributes:
        feature: their ``input`` (q, k, v share theirs, so are equal) or ``output``.
        tokens: how many are sampled.
        normalise: see ``normalised``.
    """

    name = "matrix-redundancy"

    feature: Literal["input", "output"] = "output"
    tokens: int = 256
    normalise: Normalise = "centre"

    @property
    def sample(self) -> int:
        """Tokens whose activations are needed."""
        return self.tokens

    @property
    def of_matrices(self) -> int:
        """All of them of matrices."""
        return self.tokens

    def read(self, block: BlockFacts) -> dict[str, Tensor]:
        """``psi`` (n, n) float64 over those matrices, and ``which`` of the block's they are."""
        which = [
            i for i, m in enumerate(block.matrices) if f"{m.name}|{self.feature}" in block.features
        ]
        grams: dict[int, Tensor] = {}
        for i in which:
            x = block.features[f"{block.matrices[i].name}|{self.feature}"][: self.tokens]
            grams[i] = token_gram(normalised(x, self.normalise))
        psi = redundancy(list(grams.values())) if which else torch.zeros(0, 0, dtype=torch.float64)
        return {"psi": psi, "which": torch.tensor(which, dtype=torch.int64)}
