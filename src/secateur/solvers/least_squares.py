"""The best values the survivors of a mask can take: masked least squares.

Every row w of W is its own problem: min (w - w0) H (w - w0)^T over w that are zero on the
mask, with H = E[x x^T] of the layer's inputs. Solving each by Cholesky costs a factorisation
per row, because each row keeps different columns. Conjugate gradients on all rows at once
cost one GEMM an iteration whatever the masks are: masking the residual keeps the search
inside the survivors. H is scaled to a unit diagonal first, which is Jacobi preconditioning.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.errors import NumericsError, UsageError
from secateur.solvers.obs import refuse_infinite

_COMPACT_BELOW = 0.75  # drop converged rows from the GEMM once fewer than this share is left
_CHECK_EVERY = 5  # iterations between two looks at the residuals (each synchronises a GPU)


@dataclass(frozen=True)
class Solved:
    """How a solve ended.

    Attributes:
        iterations: conjugate gradient steps taken.
        residual: largest relative residual of a row, in the preconditioned norm.
        converged: rows that reached the tolerance, of ``rows``.
        rows: rows in all.
    """

    iterations: int
    residual: float
    converged: int
    rows: int


@torch.no_grad()
def masked_least_squares(
    weight: Tensor,
    mask: Tensor,
    moment: Tensor,
    start: Tensor | None = None,
    *,
    target: Tensor | None = None,
    iterations: int = 60,
    tolerance: float = 2e-3,
    damping: float = 0.01,
    name: str = "weight",
) -> tuple[Tensor, Solved]:
    """Conjugate gradients on all rows at once.

    Minimises, for each row, w H w^T - 2 w b^T + damping (w - w0) diag(H) (w - w0)^T with
    b = w0 H, or b = ``target`` when the values to reproduce come from another stream of
    inputs than the one the pruned layer will see.

    Args:
        weight: (d_out, d_in), the dense w0.
        mask: (d_out, d_in) bool, True = pruned.
        moment: (d_in, d_in) E[x x^T], x the inputs the pruned layer sees.
        start: (d_out, d_in), where to begin (an OBS result saves iterations); default w0.
        target: (d_out, d_in) W E[x_dense x^T], cross moments times the dense weight.
        iterations: at most so many.
        tolerance: stop a row when its residual has fallen below this share of ||b||.
        damping: pull towards w0, relative to each input's own mean square.
        name: the module, for messages.

    Returns:
        (d_out, d_in) in the dtype of ``weight``, exactly 0 on the mask, and how it went.

    Raises:
        NumericsError: weights, moments or the result are not finite.
        UsageError: the start does not fit.
    """
    refuse_infinite(weight, name)
    work = moment.dtype if moment.dtype == torch.float64 else torch.float32
    system = System.of(weight.to(work), moment.to(work), target, damping, name)
    keep = (~mask).to(work)
    begin = weight if start is None else start
    if begin.shape != weight.shape:
        raise UsageError("has another shape than the weight", field="start", value=begin.shape)
    solution = begin.to(work) * system.scale * keep
    solved = _conjugate_gradients(system, solution, keep, iterations, tolerance)
    out = (solution / system.scale).mul_(keep).add_(0.0).to(weight.dtype)
    refuse_infinite(out, name)
    return out, solved


@dataclass(frozen=True)
class System:
    """The normal equations in coordinates where H has a unit diagonal.

    ``matrix`` (d_in, d_in), ``right`` (d_out, d_in), ``scale`` (d_in,): w_scaled = w scale.
    ``alive`` (d_in,) bool is False for inputs that were always zero.
    """

    matrix: Tensor
    right: Tensor
    scale: Tensor
    alive: Tensor

    @classmethod
    def of(
        cls, weight: Tensor, moment: Tensor, target: Tensor | None, damping: float, name: str
    ) -> System:
        diagonal = moment.diagonal()
        if not torch.isfinite(diagonal).all():
            raise NumericsError(
                f"the input moments of '{name}' are not finite",
                fix="load the model in float32 or look for broken weights before it",
            )
        dead = diagonal <= 0  # any scale does: a dead input's row and column are zero
        scale = torch.where(dead, 1.0, diagonal).sqrt()
        matrix = moment / scale[:, None] / scale
        matrix.diagonal().add_(damping).masked_fill_(dead, 1.0)
        right = weight @ moment if target is None else target.to(weight.dtype)
        right = right / scale + damping * weight * scale
        return cls(matrix, torch.where(dead, weight, right), scale, ~dead)


def _conjugate_gradients(
    system: System, solution: Tensor, keep: Tensor, iterations: int, tolerance: float
) -> Solved:
    """Solve in place; rows that have converged leave the iteration."""
    rows = torch.arange(solution.shape[0], device=solution.device)
    limit = (system.right * keep).square().sum(1, keepdim=True) * tolerance**2
    x, k = solution, keep
    r = torch.addmm(system.right, x, system.matrix, alpha=-1).mul_(k)
    p = r.clone()
    energy = r.square().sum(1, keepdim=True)
    final = torch.zeros_like(energy)
    step = 0
    for step in range(iterations + 1):
        if step % _CHECK_EVERY == 0 or step == iterations:
            final[rows] = energy
            active = (energy > limit[rows]).squeeze(1)
            left = int(active.sum())
            if left == 0 or step == iterations:
                break
            if left < _COMPACT_BELOW * len(active):
                if x is not solution:
                    solution[rows] = x
                rows, x, r, p = rows[active], x[active], r[active], p[active]
                k, energy = k[active], energy[active]
        q = (p @ system.matrix).mul_(k)
        curvature = (p * q).sum(1, keepdim=True)
        # A row that is done has p = 0: 0 / 0 there must stay a step of zero.
        alpha = energy / curvature.clamp_min(torch.finfo(p.dtype).tiny)
        x.addcmul_(alpha, p)
        r.addcmul_(alpha, q, value=-1)
        before, energy = energy, r.square().sum(1, keepdim=True)
        p.mul_(energy / before.clamp_min(torch.finfo(p.dtype).tiny)).add_(r)
    if x is not solution:
        solution[rows] = x
    norm = (limit / tolerance**2).clamp_min(torch.finfo(x.dtype).tiny)
    return Solved(step, float((final / norm).max().sqrt()), int((final <= limit).sum()), len(limit))


@torch.no_grad()
def masked_least_squares_exact(
    weight: Tensor,
    mask: Tensor,
    moment: Tensor,
    *,
    target: Tensor | None = None,
    damping: float = 0.01,
    name: str = "weight",
) -> Tensor:
    """The same minimum by one Cholesky per row in float64: the oracle, for small matrices."""
    system = System.of(weight.double(), moment.double(), target, damping, name)
    out = torch.zeros_like(system.right)
    for row, keep in enumerate(~mask):
        if keep.any():
            lower = torch.linalg.cholesky(system.matrix[keep][:, keep])
            right = system.right[row, keep, None]
            out[row, keep] = torch.cholesky_solve(right, lower).squeeze(1)
    return (out / system.scale).to(weight.dtype)
