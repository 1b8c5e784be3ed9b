"""Magnitude and random: the two baselines every claim is measured against."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.evidence.statistics import Evidence
from secateur.masks.target import Scope
from secateur.methods.base import Method, Published


@dataclass(frozen=True)
class Magnitude(Published):
    """Remove the smallest weights: S_ij = |W_ij|.

    Han et al., "Learning both weights and connections", NeurIPS 2015. Needs no data. Compared
    within a matrix, as in the Wanda and SparseGPT papers; ``scope=global`` ranks all matrices
    together.
    """

    name = "magnitude"
    summary = "|W|: the smallest weights go; needs no data"
    paper = "Han et al. 2015, arXiv:1506.02626"
    scope = Scope("layer")

    def score(self, weight: Tensor, evidence: Evidence) -> Tensor:
        """|W|, (d_out, d_in)."""
        return weight.abs()


@dataclass(frozen=True)
class Random(Method):
    """Remove weights at random: what pruning would cost without any criterion.

    Attributes:
        seed: together with the module's name it fixes the mask, whatever the order of modules.
    """

    name = "random"
    summary = "a random mask, the floor below every method"

    seed: int = 0

    def score(self, weight: Tensor, evidence: Evidence) -> Tensor:
        """Uniform in [0, 1), (d_out, d_in), drawn on the CPU so that every device agrees."""
        digest = hashlib.sha256(f"{self.seed}/{evidence.name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        return torch.rand(weight.shape, generator=generator).to(weight.device)
