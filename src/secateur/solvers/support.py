"""Choosing the support and the survivors together: ADMM on the layer-wise problem.

Minimise ||(W - W') X||_F over W' with the zeros a cut asks for. Writing W' twice, once as X
(any values) and once as D (sparse), ADMM alternates two closed forms and lets a dual V carry
their disagreement (Boyd et al. 2011, section 9.1; for pruning: Meng et al., "ALPS", 2024):

    X = (B + rho (D - V)) (H + rho I)^-1        B = W H
    D = P(X + V)                                P keeps the largest as the cut allows
    V = V + X - D

All in coordinates where H has a unit diagonal, so that P ranks by |w| ||x||, Wanda's score.
``rho`` grows by stages: small, X roams and the support moves; large, it freezes. Each stage
inverts one matrix and then costs a single GEMM an iteration, so no eigendecomposition is
needed. The survivors are finished by masked least squares.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.masks.selection import select
from secateur.masks.target import Cut
from secateur.solvers.least_squares import Solved, System, masked_least_squares

_RHO_FIRST, _RHO_LAST = 0.03, 3.0  # relative to H's unit diagonal


@dataclass(frozen=True)
class Refined:
    """How a refinement went.

    Attributes:
        moved: share of the mask that differs from the first one, 0 if none was given.
        settled: share of the mask that changed in the last stage; near 0 when converged.
        solved: the final least squares.
    """

    moved: float
    settled: float
    solved: Solved


@torch.no_grad()
def refine(
    weight: Tensor,
    moment: Tensor,
    cut: Cut,
    start_mask: Tensor | None = None,
    start: Tensor | None = None,
    *,
    target: Tensor | None = None,
    forced: Tensor | None = None,
    damping: float = 0.01,
    stages: int = 8,
    iterations: int = 4,
    name: str = "weight",
) -> tuple[Tensor, Tensor, Refined]:
    """Refine a support by ADMM, then solve for its survivors.

    Args:
        weight: (d_out, d_in), dense.
        moment: (d_in, d_in) E[x x^T].
        cut: the exact count in its scope, or the pattern; every projection obeys it.
        start_mask: (d_out, d_in) bool, for the record of how far the support moved.
        start: (d_out, d_in) sparse values to start from; default the dense ones, no worse.
        target: (d_out, d_in) W E[x_dense x^T], as in ``masked_least_squares``.
        forced: (d_out, d_in) bool, weights that must go first.
        damping: pull towards the dense weight, relative to each input's mean square.
        stages: values of rho, geometric from 0.03 to 3.
        iterations: of ADMM per stage.
        name: the module, for messages.

    Returns:
        weight (d_out, d_in), exactly 0 on the mask; the mask; how it went.

    Raises:
        NumericsError: weights or moments are not finite.
    """
    work = moment.dtype if moment.dtype == torch.float64 else torch.float32
    system = System.of(weight.to(work), moment.to(work), target, damping, name)
    sparse = (weight if start is None else start).to(work) * system.scale
    dual = torch.zeros_like(sparse)
    mask = before = start_mask
    rho = previous = _RHO_FIRST
    for stage in range(stages):
        rho = _RHO_FIRST * (_RHO_LAST / _RHO_FIRST) ** (stage / max(1, stages - 1))
        dual *= previous / rho  # V is the multiplier divided by rho
        inverse, before, previous = _ridge_inverse(system.matrix, rho), mask, rho
        for _ in range(iterations):
            dual += (system.right + rho * (sparse - dual)) @ inverse
            score = dual.abs() * system.alive
            if forced is not None:
                score.masked_fill_(forced, -1.0)
            mask = select(score, cut, name)
            sparse = dual * ~mask
            dual -= sparse
    assert mask is not None
    out, solved = masked_least_squares(
        weight,
        mask,
        moment,
        (sparse / system.scale).to(weight.dtype),
        target=target,
        damping=damping,
        name=name,
    )
    return out, mask, Refined(_changed(start_mask, mask), _changed(before, mask), solved)


def _ridge_inverse(matrix: Tensor, rho: float) -> Tensor:
    """(H + rho I)^-1; with a unit diagonal and rho >= 0.03 the Cholesky factor always exists."""
    shifted = matrix.clone()
    shifted.diagonal().add_(rho)
    return torch.cholesky_inverse(torch.linalg.cholesky(shifted))


def _changed(before: Tensor | None, after: Tensor) -> float:
    return 0.0 if before is None else float((before != after).float().mean())
