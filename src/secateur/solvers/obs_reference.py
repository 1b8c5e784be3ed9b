"""The textbook form of the sweep: SparseGPT's own steps, one column at a time.

Slow and plain. It is the oracle of ``obs``, the other side of the benchmark, and with
``inclusive=True`` what ``compat="reference"`` runs to repeat the original's masks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.masks.selection import at_most_reference, nominal_sparsity
from secateur.masks.target import Cut, spread
from secateur.solvers.obs import Factor, Swept


@torch.no_grad()
def factorise_reference(moment: Tensor, damping: float = 0.01) -> Factor:
    """U by way of the explicit inverse: Cholesky, inverse, Cholesky.

    As the original does, a dead input's diagonal becomes 1 *before* the mean that scales the
    damping is taken, and a matrix that is not positive definite raises torch's own error.
    """
    moment = moment.clone()
    dead = moment.diagonal() == 0
    moment[dead, dead] = 1
    diagonal = torch.arange(moment.shape[0], device=moment.device)
    moment[diagonal, diagonal] += damping * torch.mean(torch.diag(moment))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moment))
    return Factor(torch.linalg.cholesky(inverse, upper=True), dead, damping)


@torch.no_grad()
def sweep_reference(
    weight: Tensor,
    factor: Factor,
    cut: Cut | None = None,
    mask: Tensor | None = None,
    *,
    block_size: int = 128,
    inclusive: bool = False,
) -> Swept:
    """Right-looking sweep with lazy updates per block; arguments as in ``obs.sweep``.

    Args:
        weight: (d_out, d_in); columns of dead inputs are zeroed outright.
        factor: of the same d_in.
        cut: N:M, or a count shared evenly over blocks of ``block_size`` columns.
        mask: fixed alternative to ``cut``.
        block_size: columns between two lazy updates; a multiple of M.
        inclusive: the original's threshold, ``score <= sorted[floor(n s)]``, at least one more
            than asked for in each block; and ``topk`` for N:M, ties as they fall.
    """
    upper = factor.upper
    weight = weight.to(upper.dtype).clone()
    weight[:, factor.dead] = 0
    rows, columns = weight.shape
    chosen = torch.zeros(weight.shape, dtype=torch.bool, device=weight.device)
    loss = torch.zeros(rows, dtype=upper.dtype, device=weight.device)
    starts = list(range(0, columns, block_size))
    widths = [min(block_size, columns - start) for start in starts]
    group = cut.group if cut is not None else None
    counts = [0] * len(starts) if cut is None else spread(cut.count, [w * rows for w in widths])
    for start, width, count in zip(starts, widths, counts, strict=True):
        stop = start + width
        current = weight[:, start:stop].clone()
        quotient = torch.zeros_like(current)
        errors = torch.zeros_like(current)
        block = upper[start:stop, start:stop]
        diagonal = torch.diag(block).reshape(1, -1)
        if mask is not None:
            pruned = mask[:, start:stop].clone()
        elif cut is not None and group is None:
            score = current**2 / diagonal**2
            if inclusive:
                pruned = at_most_reference(score, nominal_sparsity(cut))
            else:
                order = torch.sort(score.T.flatten(), stable=True).indices
                pruned = torch.zeros_like(order, dtype=torch.bool)
                pruned[order[:count]] = True
                pruned = pruned.view(width, rows).T.contiguous()
        else:
            pruned = torch.zeros_like(current, dtype=torch.bool)
        for i in range(width):
            if group is not None and cut is not None and cut.keep is not None and i % group == 0:
                score = current[:, i : i + group] ** 2 / diagonal[:, i : i + group] ** 2
                prune = group - cut.keep
                if inclusive:
                    lowest = torch.topk(score, prune, dim=1, largest=False).indices
                    pruned.scatter_(1, i + lowest, True)
                else:
                    order = torch.sort(score, dim=1, stable=True).indices
                    pruned.scatter_(1, i + order[:, :prune], True)
            kept = current[:, i].clone()
            kept[pruned[:, i]] = 0
            quotient[:, i] = kept
            error = (current[:, i] - kept) / block[i, i]
            loss += error**2 / 2
            current[:, i:] -= error.unsqueeze(1).matmul(block[i, i:].unsqueeze(0))
            errors[:, i] = error
        chosen[:, start:stop] = pruned
        weight[:, start:stop] = quotient
        weight[:, stop:] -= errors.matmul(upper[start:stop, stop:])
    return Swept(weight, chosen, loss.sum(dtype=torch.float64))
