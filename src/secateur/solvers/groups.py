"""Groups of columns that go together, and what taking each away would cost."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from secateur.errors import UsageError

HeadScore = Literal["slimgpt", "exact", "initial_diag"]
HEAD_SCORES: tuple[str, ...] = ("slimgpt", "exact", "initial_diag")


def contiguous_groups(columns: int, size: int, name: str = "weight") -> Tensor:
    """(n, size) column numbers of heads or channels that lie side by side.

    Raises:
        UsageError: ``size`` does not divide ``columns``.
    """
    if size < 1 or columns % size:
        raise UsageError(
            f"'{name}' has {columns} columns, which are no whole number of groups of {size}",
            field="group size",
            value=size,
            fix="give the model's own head size",
        )
    return torch.arange(columns).view(-1, size)


def group_scores(weight: Tensor, blocks: Tensor, rule: str = "slimgpt") -> Tensor | None:
    """What removing each group would cost, (n,); None if a block is not positive definite.

    ``exact``: tr(W_j B_jj^-1 W_j^T), the joint cost. ``slimgpt``: sum_t ||W_:t||^2 / L_tt^2 with
    B_jj = L L^T, the diagonal as it evolves while the group is eliminated, W held fixed.
    ``initial_diag``: sum_t ||W_:t||^2 / B_tt. They agree for groups of one column.

    Args:
        weight: (d_out, n, size) current columns by group.
        blocks: (n, size, size) diagonal blocks of the current B.
    """
    if rule == "initial_diag" or blocks.shape[-1] == 1:
        diagonal = blocks.diagonal(dim1=1, dim2=2)
        if not bool((diagonal > 0).all()):
            return None
        return (_square_columns(weight) / diagonal).sum(1)
    lower, info = torch.linalg.cholesky_ex(blocks)
    if bool(info.any()):
        return None
    if rule == "exact":
        solved = torch.linalg.solve_triangular(lower, weight.permute(1, 2, 0), upper=False)
        return solved.square_().sum((1, 2))
    return (_square_columns(weight) / lower.diagonal(dim1=1, dim2=2).square()).sum(1)


def _square_columns(weight: Tensor) -> Tensor:
    """||W_:t||^2 by group and column, (n, size)."""
    return torch.linalg.vector_norm(weight, dim=0).square_()


def centred(moment: Tensor, mean: Tensor) -> Tensor:
    """E[x x^T] - E[x] E[x]^T (c, c), float64: the moments that count where there is a bias.

    A bias free to move makes up for the mean of every change: the best one is
    b' = b + (W - W') E[x], and what is left of the error sees the inputs less their mean.
    """
    away = mean.double()
    return moment.double() - torch.outer(away, away)
