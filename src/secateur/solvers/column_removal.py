"""What the columns that stay become when others go, from a few of the layer's own inputs.

For min ||(W - W') X||^2 over columns K while the columns P go, with H = E[x x^T] + lambda I,

    W'_K = W_K + W_P A,      A = H_PK (H_KK)^-1        (Hassibi & Stork, 1993)

A does not depend on W, so linears that read the same inputs share it. Three ways give it:

    cholesky   of H_KK: best for many inputs
    kernel     (1/n) X_P^T (lambda I + X_K X_K^T / n)^-1 X_K, an n x n system: fewer tokens than columns
    cg         conjugate gradients on the inputs themselves; H is never formed: few columns of very wide
               layers

lambda is ``damping`` times the mean diagonal of E[x x^T] over K and P.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from secateur.errors import NumericsError, UsageError

Solver = Literal["auto", "cholesky", "kernel", "cg"]
_DOUBLE_UP_TO = 1024  # columns (or tokens) of a system that is solved in float64
_TOLERANCE = 1e-5
_CG_STEPS = 40  # what conjugate gradients are expected to take, to choose by


@torch.no_grad()
def removal_coefficients(
    x: Tensor,
    kept: Tensor,
    gone: Tensor,
    damping: float = 0.01,
    solver: Solver = "auto",
    name: str = "weight",
) -> Tensor:
    """A (|gone|, |kept|), so that ``W[:, kept] += W[:, gone] @ A`` compensates best.

    Args:
        x: (n, c) inputs of the layer; rows of zeros change nothing.
        kept, gone: column numbers.
        damping: of H, relative to its mean diagonal.
        name: the layer, for messages.

    Raises:
        UsageError: no inputs. NumericsError: NaN or infinity in them.

    >>> x = torch.tensor([[1.0, 2.0], [2.0, 4.0]]).double()    # the second is twice the first
    >>> removal_coefficients(x, torch.tensor([0]), torch.tensor([1]), damping=1e-9)
    tensor([[2.0000]], dtype=torch.float64)
    """
    if not len(x):
        raise UsageError(f"no inputs of '{name}' were seen", field="hessian_tokens", value=0)
    n, k, p = len(x), len(kept), len(gone)
    x_k, x_p = x[:, kept], x[:, gone]
    diagonal = (x_k.square().sum() + x_p.square().sum()) / (n * (k + p))
    if not torch.isfinite(diagonal):
        raise NumericsError(f"the inputs of '{name}' hold NaN or infinity")
    ridge = damping * float(diagonal)
    if ridge == 0.0:  # nothing was ever seen there, so nothing has to be made up for
        return x.new_zeros(p, k)
    if solver == "auto":
        solver = cheapest(len(x), k, p)
    if solver == "cg":
        return _conjugate(x_k, x_p, ridge, n)
    if solver == "kernel":
        gram = _wide(x_k @ x_k.T) / n
        gram.diagonal().add_(ridge)
        lower = _factor(gram, name)
        middle = torch.cholesky_solve(x_p.to(lower.dtype), lower)
        return (middle.T.to(x.dtype) @ x_k) / n
    gram = _wide(x_k.T @ x_k) / n
    gram.diagonal().add_(ridge)
    lower = _factor(gram, name)
    cross = (x_k.T @ x_p).to(lower.dtype) / n
    return torch.cholesky_solve(cross, lower).T.to(x.dtype)


@torch.no_grad()
def proven_coefficients(
    x: Tensor,
    kept: Tensor,
    gone: Tensor,
    damping: float = 0.01,
    solver: Solver = "auto",
    name: str = "weight",
) -> Tensor:
    """``removal_coefficients``, each column's scaled by what held up on inputs it was not fitted to.

    With few inputs for many columns the fit follows noise and may do more harm than none. So it is
    made on every other input, and its predictions of what goes are regressed on the rest: the
    slope, within [0, 1], scales the coefficients that all inputs give.

    >>> x = torch.randn(400, 40, generator=torch.Generator().manual_seed(0))
    >>> kept, gone = torch.arange(1, 40), torch.tensor([0])
    >>> noise = removal_coefficients(x[:50], kept, gone).norm()
    >>> bool(proven_coefficients(x[:50], kept, gone).norm() < 0.5 * noise)
    True
    """
    whole = removal_coefficients(x, kept, gone, damping, solver, name)
    if len(x) < 2:
        return torch.zeros_like(whole)
    half = removal_coefficients(x[::2], kept, gone, damping, solver, name)
    predicted = x[1::2][:, kept] @ half.T
    agreement = (predicted * x[1::2][:, gone]).sum(0)
    size = predicted.square().sum(0).clamp_min(torch.finfo(x.dtype).tiny)
    return whole * (agreement / size).clamp(0, 1).unsqueeze(1)


def cheapest(tokens: int, kept: int, gone: int) -> Literal["cholesky", "kernel", "cg"]:
    """The way that takes the fewest multiplications.

    >>> cheapest(8192, 512, 8), cheapest(256, 4096, 64), cheapest(4096, 8192, 1)
    ('cholesky', 'kernel', 'cg')
    """
    work: dict[Literal["cholesky", "kernel", "cg"], float] = {
        "cholesky": tokens * kept**2 + kept**3 / 3 + kept**2 * gone,
        "kernel": tokens**2 * kept + tokens**3 / 3 + tokens * (tokens + kept) * gone,
        "cg": 2.0 * _CG_STEPS * tokens * kept * gone,
    }
    return min(work, key=lambda way: work[way])


def _wide(square: Tensor) -> Tensor:
    """In float64 where that costs little."""
    return square.double() if len(square) <= _DOUBLE_UP_TO else square


def _factor(square: Tensor, name: str) -> Tensor:
    lower, info = torch.linalg.cholesky_ex(square)
    if bool(info):
        square = square.double()
        square.diagonal().add_(1e-6 * square.diagonal().mean())
        lower, info = torch.linalg.cholesky_ex(square)
        if bool(info):
            raise NumericsError(
                f"the second moments of '{name}' cannot be factored",
                fix="more damping, or more hessian_tokens",
            )
    return lower


def _conjugate(x_k: Tensor, x_p: Tensor, ridge: float, n: int, most: int = 400) -> Tensor:
    """All right-hand sides at once, each with its own steps, scaled by H's diagonal."""
    scale = 1 / (x_k.square().sum(0) / n + ridge).unsqueeze(1)
    target = x_k.T @ x_p / n
    found = torch.zeros_like(target)
    residual = target.clone()
    size = target.norm(dim=0).clamp_min(torch.finfo(target.dtype).tiny)
    z = scale * residual
    direction, rz = z.clone(), (residual * z).sum(0)
    for _ in range(most):
        if bool((residual.norm(dim=0) <= _TOLERANCE * size).all()):
            break
        product = x_k.T @ (x_k @ direction) / n + ridge * direction
        step = rz / (direction * product).sum(0).clamp_min(torch.finfo(target.dtype).tiny)
        found += step * direction
        residual -= step * product
        z = scale * residual
        before, rz = rz, (residual * z).sum(0)
        direction = z + rz / before.clamp_min(torch.finfo(target.dtype).tiny) * direction
    return found.T
