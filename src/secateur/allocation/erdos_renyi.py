"""ER and ERK: densities in proportion to how few weights connect a layer's neurons."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from secateur.allocation.base import Allocator, Problem
from secateur.allocation.projection import Mode


def er_density(d_out: int, d_in: int, kernel: Sequence[int] = ()) -> float:
    """(d_out + d_in + sum kernel) / (d_out d_in prod kernel), up to a common factor.

    With ``kernel`` (of a convolution) it is ERK (Evci et al. 2020), without it ER (Mocanu et
    al. 2018); for a linear layer the two are one.

    >>> er_density(4, 4)
    0.5
    """
    return (d_out + d_in + sum(kernel)) / (d_out * d_in * math.prod(kernel))


@dataclass(frozen=True)
class ER(Allocator):
    """Small matrices stay dense, large ones give most: s = 1 - eps (d_in + d_out) / (d_in d_out).

    Mocanu et al., "Scalable Training of Artificial Neural Networks with Adaptive Sparse
    Connectivity", 2018. eps follows from the target, with densities above 1 held there. Made
    for vision networks: on language models it collapses from 65 % on.
    """

    name = "er"
    summary = "density in proportion to (d_in + d_out) / (d_in d_out)"
    paper = "Mocanu et al. 2018, arXiv:1707.04780"
    mode: ClassVar[Mode] = "density"

    def wishes(self, problem: Problem) -> dict[str, float]:
        """1 - the density, whose scale the projection finds."""
        warn(problem, self.name)
        return {n: 1 - er_density(rows, columns) for n, (rows, columns) in problem.shapes.items()}


@dataclass(frozen=True)
class ERK(ER):
    """ER with the kernel of a convolution counted in; on matrices it is ER.

    Evci et al., "Rigging the Lottery: Making All Tickets Winners", ICML 2020.
    """

    name = "erk"
    summary = "ER with convolution kernels counted in; on linear layers the same"
    paper = "Evci et al. 2020, arXiv:1911.11134"


def warn(problem: Problem, name: str) -> None:
    """The classics of vision networks are known to fail on language models."""
    if problem.sparsity >= 0.6:
        problem.notes.append(
            f"'{name}' was made for vision networks; on language models it is known to collapse "
            "from about 65 % on"
        )
