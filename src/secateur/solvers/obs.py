"""Optimal Brain Surgeon by columns: prune a matrix and let its survivors make up for the loss.

For the layer-wise problem min ||(W - W') X||_F the columns are visited once, left to right.
Removing w_ij adds an error e = w_ij / U_jj, which the columns to its right absorb:
W[i, j:] -= e U[j, j:], where U is the upper Cholesky factor of H^-1, U^T U = H^-1. One U holds
the inverses of all trailing blocks of H, which is what makes a single sweep possible
(Frantar & Alistarh, "SparseGPT", 2023, section 3; OBS: Hassibi & Stork, 1993).

Here the weights are stored transposed, so a column of W is contiguous, and the column range
is halved recursively: the left half is swept, one GEMM carries its errors into the right
half, the right half is swept. The work is that of the textbook loop, nearly all of it inside
GEMMs; ``obs_reference`` holds that loop as the oracle.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from secateur.errors import NumericsError, UsageError
from secateur.masks.selection import PAIRWISE_LIMIT, select, smallest
from secateur.masks.target import Cut, Scope, spread

_LEAF = 16  # columns swept one by one between two GEMMs
_INVERT_DIRECTLY = 128
Rule = Callable[[Tensor, int, int], Tensor]  # (scores (columns, d_out), start, stop) -> mask


@dataclass(frozen=True)
class Factor:
    """U with U^T U = (H + damping mean(diag H) I)^-1.

    Attributes:
        upper: (d_in, d_in), upper triangular, float32 or float64.
        dead: (d_in,) bool, inputs that were always zero: free to prune, useless to update.
        damping: the relative damping it took; larger than asked for if H was near singular.
    """

    upper: Tensor
    dead: Tensor
    damping: float

    def inverse_diagonal(self) -> Tensor:
        """1 / U_jj, and 0 for dead inputs, whose removal costs nothing. (d_in,)"""
        return torch.where(self.dead, 0.0, 1.0 / self.upper.diagonal())


def factorise(
    moment: Tensor,
    damping: float = 0.01,
    *,
    name: str = "weight",
    tokens: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Factor:
    """Factor the inverse of a damped second moment, from one Cholesky and one triangular inverse.

    With J the reversal of rows and columns and J H J = L L^T, the factor is U = J L^-1 J:
    the inverse itself is never formed. Damped as far as it takes (``damped_cholesky``).

    Args:
        moment: (d_in, d_in) E[x x^T] or X^T X; only U's scale depends on which.
        damping: added to the diagonal, relative to the mean over inputs that are not dead.
        name: the module, for messages.
        tokens: how many tokens are behind ``moment``, for messages.
        dtype: of the result.

    Raises:
        NumericsError: see ``damped_cholesky``.
    """
    flipped = moment.flip(0, 1)
    lower, dead, taken = damped_cholesky(flipped, damping, name=name, tokens=tokens, dtype=dtype)
    return Factor(_inverse_lower(lower).flip(0, 1).to(dtype), dead.flip(0), taken)


def damped_cholesky(
    moment: Tensor,
    damping: float = 0.01,
    *,
    name: str = "weight",
    tokens: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, float]:
    """L with L L^T = H + damping mean(diag H) I, raising the damping as far as it takes.

    When H is not positive definite at the damping asked for, float64 is tried, then ten times
    the damping, and so on up to 1. An input that was always zero gets the mean diagonal.

    Args:
        moment: (d_in, d_in).
        damping: added to the diagonal, relative to the mean over inputs that are not dead.
        name: the module, for messages.
        tokens: how many tokens are behind ``moment``, for messages.
        dtype: tried first.

    Returns:
        L (d_in, d_in) lower triangular, in ``dtype`` or float64; the dead inputs (d_in,) bool;
        the damping it took.

    Raises:
        NumericsError: not finite, no input ever differed from zero, or not positive definite
            even at damping 1. Never a silent fallback.
    """
    diagonal = moment.diagonal()
    seen = "" if tokens is None else f" ({tokens} tokens)"
    if not torch.isfinite(moment.sum()) and not torch.isfinite(moment).all():
        raise NumericsError(
            f"the input moments of '{name}' are not finite{seen}",
            fix="load the model in float32 or look for broken weights before it",
        )
    dead = diagonal <= 0
    if dead.all():
        raise NumericsError(
            f"'{name}' saw nothing but zeros{seen}, so there is nothing to solve for",
            fix="calibrate with more text, leave the module dense, or use a method without Gram",
        )
    attempts = [damping, *(d for d in (1e-4, 1e-3, 1e-2, 0.1, 1.0) if d > damping * 1.001)]
    for attempt in attempts:
        for precision in dict.fromkeys((dtype, torch.float64)):
            lower, info = torch.linalg.cholesky_ex(damp(moment, dead, attempt, precision))
            if info.item() == 0 and torch.isfinite(lower.diagonal()).all():
                return lower, dead, attempt
    raise NumericsError(
        f"the input moments of '{name}'{seen} cannot be factored, even with damping {attempts[-1]:g}",
        fix="calibrate with more text; the moments may be corrupt (not symmetric, negative)",
    )


def damp(moment: Tensor, dead: Tensor, damping: float, dtype: torch.dtype) -> Tensor:
    """A copy of H with ``damping`` times its mean live diagonal added; dead inputs get that mean."""
    mean = moment.diagonal()[~dead].double().mean().item()
    damped = moment.to(dtype, copy=True)
    damped.diagonal().masked_fill_(dead, mean).add_(damping * mean)
    return damped


def _inverse_lower(lower: Tensor) -> Tensor:
    """The inverse of a lower triangular matrix by halves: two GEMMs a level, a third of the flops."""
    size = lower.shape[0]
    if size <= _INVERT_DIRECTLY:
        eye = torch.eye(size, dtype=lower.dtype, device=lower.device)
        return torch.linalg.solve_triangular(lower, eye, upper=False)
    half = size // 2
    inverse = torch.zeros_like(lower)
    inverse[:half, :half] = _inverse_lower(lower[:half, :half])
    inverse[half:, half:] = _inverse_lower(lower[half:, half:])
    inverse[half:, :half] = -inverse[half:, half:] @ (lower[half:, :half] @ inverse[:half, :half])
    return inverse


class Swept(NamedTuple):
    """What a sweep leaves: W' and M, both (d_out, d_in), and sum of e^2 / 2 as a 0-d tensor.

    ``loss`` equals tr((W - W') H (W - W')^T) / 2 in the damped H of the factor.
    """

    weight: Tensor
    mask: Tensor
    loss: Tensor


@torch.no_grad()
def sweep(
    weight: Tensor,
    factor: Factor,
    cut: Cut | None = None,
    mask: Tensor | None = None,
    *,
    block_size: int = 128,
    forced: Tensor | None = None,
    name: str = "weight",
) -> Swept:
    """Prune and update in one pass over the columns, with a mask given or chosen on the way.

    A chosen mask ranks w_ij^2 / U_jj^2 on the current, already updated values. ``block``
    scope (SparseGPT's): among all rows in each band of ``cut.scope.width`` columns; ``row``: an
    equal share of every row in each band of ``block_size``; ``layer`` and ``global``: among all
    rows in each such band, which gives as many as the whole matrix's first ranking takes from
    it; N:M: in each group as it is reached. All exact.

    Args:
        weight: (d_out, d_in).
        factor: of the same d_in.
        cut: what to choose; exclusive with ``mask``.
        mask: (d_out, d_in) bool, what goes.
        block_size: width of a band for scopes that have none; no effect on a given mask.
        forced: (d_out, d_in) bool, weights to choose first (those that are zero already).
        name: the module, for messages.

    Raises:
        UsageError: both or neither of ``cut`` and ``mask``.
        NumericsError: a weight is not finite.
    """
    if (cut is None) == (mask is None):
        raise UsageError("a sweep takes either a cut or a mask", field="cut", value=cut)
    refuse_infinite(weight, name)
    state = _Sweep(weight, factor)
    columns = weight.shape[1]
    if mask is not None:
        state.use(slice(0, columns), mask.T)
        state.descend(0, columns)
    elif cut is not None and cut.keep is not None and cut.group is not None:
        state.choose = _group_rule(cut.group - cut.keep, cut.group, forced, weight.device)
        state.group = cut.group
        state.descend(0, columns, unit=cut.group * max(1, _LEAF // cut.group))
    elif cut is not None:
        band = cut.scope.width if cut.scope.kind == "block" else block_size
        state.choose = _band_rule(cut, band, state, forced)
        state.descend(0, columns, unit=band, choose=True)
    return state.result(weight.dtype)


def refuse_infinite(weight: Tensor, name: str) -> None:
    """Stop at weights that are NaN or infinite, naming the module.

    Raises:
        NumericsError: some weight is not finite.
    """
    if not torch.isfinite(weight.sum()) and (bad := int((~torch.isfinite(weight)).sum())):
        raise NumericsError(
            f"{bad} of {weight.numel()} weights of '{name}' are not finite",
            fix="the checkpoint is broken there: exclude the module or fetch the model again",
        )


class _Sweep:
    """The working arrays, all transposed to (d_in, d_out), and the walk over the columns."""

    choose: Rule
    group: int | None = None

    def __init__(self, weight: Tensor, factor: Factor) -> None:
        self.upper = factor.upper
        self.inverse = factor.inverse_diagonal()[:, None]
        self.weight = weight.T.to(factor.upper.dtype).clone(memory_format=torch.contiguous_format)
        self.error = torch.empty_like(self.weight)
        self.scaled_mask = torch.empty_like(self.weight)  # 1 / U_jj where pruned, else 0
        self.mask = torch.empty(self.weight.shape, dtype=torch.bool, device=weight.device)
        self.rows = tuple(
            zip(
                *(part.unbind(0) for part in (self.weight, self.scaled_mask, self.error)),
                strict=True,
            )
        )

    def saliency(self, columns: slice) -> Tensor:
        """w^2 / U_jj^2 of some columns as they are now, (columns, d_out)."""
        return (self.weight[columns] * self.inverse[columns]).square_()

    def use(self, columns: slice, mask: Tensor) -> None:
        """Fix the mask (columns, d_out) of some columns."""
        self.mask[columns] = mask
        torch.mul(self.mask[columns], self.inverse[columns], out=self.scaled_mask[columns])

    def decide(self, start: int, stop: int) -> None:
        """Choose the mask of columns [start, stop) by their current values."""
        here = slice(start, stop)
        self.use(here, self.choose(self.saliency(here), start, stop))

    def descend(self, start: int, stop: int, unit: int = _LEAF, choose: bool = False) -> None:
        """Sweep columns [start, stop), whose values are current; split at multiples of ``unit``.

        With ``choose`` a unit is a band, and its mask is chosen when the sweep reaches it.
        """
        if stop - start > unit:
            middle = start + unit * (-(-(stop - start) // unit) // 2)
            self.descend(start, middle, unit, choose)
            self.weight[middle:stop].addmm_(
                self.upper[start:middle, middle:stop].T, self.error[start:middle], alpha=-1
            )
            self.descend(middle, stop, unit, choose)
        elif choose:
            self.decide(start, stop)
            self.descend(start, stop)
        else:
            self.leaf(start, stop)

    def leaf(self, start: int, stop: int) -> None:
        """A few columns one by one; an error reaches the rest of the leaf as a rank-1 update."""
        for column in range(start, stop):
            if self.group is not None and column % self.group == 0:
                self.decide(column, column + self.group)
            weight, scaled_mask, error = self.rows[column]
            torch.mul(weight, scaled_mask, out=error)
            if column + 1 < stop:
                right = self.upper[column, column + 1 : stop]
                self.weight[column + 1 : stop].addr_(right, error, alpha=-1)

    def result(self, dtype: torch.dtype) -> Swept:
        """W' with exact zeros, the mask, and half the sum of squared errors."""
        errors = self.error.view(-1)
        loss = torch.dot(errors, errors).double() / 2
        # Faster than masked_fill_ several times over; adding zero turns -0.0 into 0.0.
        self.weight.mul_(~self.mask).add_(0.0)
        return Swept(self.weight.T.contiguous().to(dtype), self.mask.T.contiguous(), loss)


def _preferring(forced: Tensor | None) -> Callable[[Tensor, int, int], Tensor]:
    """Lower the scores (columns, d_out) of the weights that must be chosen first."""
    if forced is None:
        return lambda score, start, stop: score
    first = forced.T
    return lambda score, start, stop: score.masked_fill_(first[start:stop], -1.0)


def _group_rule(prune: int, group: int, forced: Tensor | None, device: torch.device) -> Rule:
    """In each group of inputs the ``prune`` of lowest score, row by row."""
    prefer = _preferring(forced)
    if group > PAIRWISE_LIMIT:
        return lambda score, start, stop: (
            smallest(prefer(score, start, stop).T, [prune] * score.shape[1]).T
        )
    # ``selection.smallest_members`` in few calls, because groups come by the thousand: for each
    # pair, if the earlier is not larger it precedes the later, else the later precedes it. The
    # matrix product adds these up to ranks, less the number of members after each.
    pairs = torch.tensor(list(combinations(range(group), 2))).reshape(-1, 2)
    ones = torch.eye(group)
    signs = (ones[pairs[:, 1]] - ones[pairs[:, 0]]).T.contiguous()
    limit = prune - torch.arange(group - 1, -1, -1.0)[:, None]
    earlier, later, signs, limit = (t.to(device) for t in (*pairs.T.contiguous(), signs, limit))

    def rule(score: Tensor, start: int, stop: int) -> Tensor:
        score = prefer(score, start, stop)
        first = score.index_select(0, earlier) <= score.index_select(0, later)
        return signs @ first.to(signs.dtype) < limit

    return rule


def _band_rule(cut: Cut, band: int, state: _Sweep, forced: Tensor | None) -> Rule:
    """In each band of inputs its share of the count, per row or over all rows."""
    prefer = _preferring(forced)
    rows, columns = cut.shape
    edges = [*range(0, columns, band), columns]
    widths = [stop - start for start, stop in pairwise(edges)]
    if cut.scope.kind == "row":
        shares = [spread(count, widths) for count in spread(cut.count, [columns] * rows)]

        def by_row(score: Tensor, start: int, stop: int) -> Tensor:
            counts = [share[start // band] for share in shares]
            return smallest(prefer(score, start, stop).T, counts).T

        return by_row

    counts = spread(cut.count, [width * rows for width in widths])
    if cut.scope.kind != "block":  # as many as a ranking of the whole matrix takes from each band
        whole = Cut((columns, rows), cut.count, Scope("layer"))
        first = select(prefer(state.saliency(slice(0, columns)), 0, columns), whole)
        counts = [int(part.sum()) for part in first.split(widths)]

    def by_band(score: Tensor, start: int, stop: int) -> Tensor:
        flat = prefer(score, start, stop).reshape(1, -1)
        return smallest(flat, [counts[start // band]]).view(score.shape)

    return by_band
