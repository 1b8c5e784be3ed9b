"""LAMP: one ranking of all weights by how much of the rest of its matrix each one is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.allocation.base import Allocator, Problem
from secateur.allocation.erdos_renyi import warn
from secateur.allocation.global_rank import global_plan
from secateur.masks.target import Target


def lamp_score(weight: Tensor) -> Tensor:
    """w_u^2 / sum of w_v^2 over all v not smaller than u, same shape, float32.

    Ties count in order of their index, so each matrix has exactly one weight of score 1.
    """
    flat = weight.reshape(-1).double().square()
    ordered, order = torch.sort(flat, stable=True)
    rest = ordered.flip(0).cumsum(0).flip(0)
    score = torch.empty_like(flat)
    score[order] = ordered / rest.clamp_min(torch.finfo(torch.float64).tiny)
    return score.view_as(weight).float()


@dataclass(frozen=True)
class LAMP(Allocator):
    """Layer-adaptive magnitude: what a global ranking of ``lamp_score`` takes from each matrix.

    Lee et al., "Layer-adaptive Sparsity for the Magnitude-based Pruning", ICLR 2021. Needs
    weights alone, all their scores at once. Made for vision networks.
    """

    name = "lamp"
    summary = "global ranking of w^2 over the sum of all larger w^2; weights alone"
    paper = "Lee et al. 2021, arXiv:2010.07611"
    ranks_weights = True

    def bounds(self, problem: Problem) -> tuple[float, float]:
        """Whatever the ranking says, unless bounds were given."""
        low = 0.0 if self.min_sparsity is None else self.min_sparsity
        return low, 1.0 if self.max_sparsity is None else self.max_sparsity

    def wishes(self, problem: Problem) -> dict[str, float]:
        """The share of each matrix below the one threshold."""
        warn(problem, self.name)
        if problem.weights is None:
            raise ValueError("LAMP needs the weights")
        weights = problem.weights

        def scores() -> Iterator[tuple[str, Tensor]]:
            for name, weight in weights():
                yield name, lamp_score(weight)

        return global_plan(scores(), Target(problem.sparsity)).ratios
