"""Local search over a structured removal: exchange a few groups while the error falls.

After the greedy elimination the cheapest groups still there are taken out and as many of the
absent ones that help most are put back; the exchange stands if the least-squares error of
the columns kept is lower (OSSCAR, ICML 2024, section on local search).

With K the columns kept and B = (H_KK)^-1: removing g costs tr(W_g (B_gg)^-1 W_g^T) with the
refitted W; adding g gains tr(R_g S_g^-1 R_g^T), where R_g = ((W0 - W) H)_g is what the survivors
leave unexplained at g and S_g = H_gg - H_gK B H_Kg.
"""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.solvers.groups import group_scores


@torch.no_grad()
def improve(
    weight: Tensor,
    moment: Tensor,
    groups: Tensor,
    gone: Tensor,
    *,
    rounds: int = 20,
    locked: Tensor | None = None,
) -> tuple[Tensor, float, int]:
    """Exchange groups until nothing is gained; as many are gone afterwards as before.

    An exchange starts with a tenth of the groups that are gone; each that fails halves it.

    Args:
        weight: (d_out, c) before any removal.
        moment: (c, c) positive definite (damped).
        groups: (n, size) column numbers.
        gone: (c,) bool, the removal to improve.
        rounds: exchanges tried at most.
        locked: (n,) bool, groups that are gone and must stay so.

    Returns:
        The improved (c,) bool, its least-squares error, and how many exchanges stood.
    """
    weight, moment = weight.double(), moment.double()
    absent = gone[groups[:, 0]]
    width = max(1, min(int(absent.sum()), int((~absent).sum()) - 1) // 10)
    never = torch.zeros_like(absent) if locked is None else locked.to(absent.device)
    best = _State(weight, moment, groups, absent)
    done = 0
    for _ in range(rounds):
        if int((~absent).sum()) <= width:
            break
        costs = best.costs()
        thinner = absent.clone()
        thinner[costs.argsort(stable=True)[:width]] = True
        without = _State(weight, moment, groups, thinner)
        trial = thinner.clone()
        gains = without.gains().masked_fill(never, float("-inf"))
        trial[gains.argsort(descending=True, stable=True)[:width]] = False
        state = without if torch.equal(trial, absent) else _State(weight, moment, groups, trial)
        if not torch.equal(trial, absent) and state.error < best.error * (1 - 1e-9):
            absent, best, done = trial, state, done + 1
        elif width > 1:
            width //= 2
        else:
            break
    out = torch.zeros_like(gone)
    out[groups[absent].flatten()] = True
    return out, best.error, done


class _State:
    """The least-squares fit for one choice of groups."""

    def __init__(self, weight: Tensor, moment: Tensor, groups: Tensor, absent: Tensor) -> None:
        self.moment, self.groups, self.absent = moment, groups, absent
        gone = torch.zeros(weight.shape[1], dtype=torch.bool, device=weight.device)
        gone[groups[absent].flatten()] = True
        self.kept = (~gone).nonzero().flatten()
        lower = torch.linalg.cholesky(moment[self.kept][:, self.kept])
        self.inverse = torch.cholesky_inverse(lower)
        self.fitted = torch.zeros_like(weight)
        carried = weight[:, gone] @ moment[gone][:, self.kept]
        self.fitted[:, self.kept] = weight[:, self.kept] + carried @ self.inverse
        self.unexplained = (weight - self.fitted) @ moment
        self.error = float(((weight - self.fitted) * self.unexplained).sum())

    def costs(self) -> Tensor:
        """Of removing each group that is there, (n,); infinite for the absent ones."""
        place = torch.full((self.moment.shape[0],), -1, device=self.kept.device)
        place[self.kept] = torch.arange(len(self.kept), device=self.kept.device)
        at = place[self.groups[~self.absent]]
        blocks = self.inverse[at[:, :, None], at[:, None, :]]
        out = self.fitted.new_full((len(self.groups),), float("inf"))
        found = group_scores(self.fitted[:, self.groups[~self.absent]], blocks, "exact")
        if found is not None:
            out[~self.absent] = found
        return out

    def gains(self) -> Tensor:
        """Of putting each absent group back, (n,); minus infinity for those that are there."""
        columns = self.groups[self.absent]
        n, size = columns.shape
        across = self.moment[self.kept][:, columns.flatten()]
        solved = (self.inverse @ across).view(-1, n, size)
        inner = torch.einsum("kns,knt->nst", across.view(-1, n, size), solved)
        schur = self.moment[columns[:, :, None], columns[:, None, :]] - inner
        out = self.fitted.new_full((len(self.groups),), float("-inf"))
        found = group_scores(self.unexplained[:, columns], schur, "exact")
        if found is not None:
            out[self.absent] = found
        return out
