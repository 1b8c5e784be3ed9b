"""Structured Optimal Brain Surgeon: remove whole groups of input columns, survivors make up.

For min ||(W - W') X||_F^2 with H = E[x x^T] and B = H^-1, taking the columns S away costs

    tr(W_S (B_SS)^-1 W_S^T)      and leaves      W - W_S (B_SS)^-1 B_S: ,  B - B_:S (B_SS)^-1 B_S:

(Hassibi & Stork, 1993, for a set of weights; SlimGPT, arXiv 2412.18110, eq. 4; OSSCAR, ICML 2024).
A group is an attention head's columns of the output projection, or one MLP channel. Groups
are taken greedily in rounds, scored on the values that earlier rounds have left.

SlimGPT inverts and factors H anew each round. Here the one inverse is down-dated as above:
the same selection for a fraction of the work. The down-dates are collected in a panel, so
that B is written by matrix products even when groups go one at a time, and what is gone is
physically compacted away. ``structured_reference`` holds the slow form as the oracle.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from secateur.errors import NumericsError, UsageError
from secateur.evidence.statistics import add_gram
from secateur.solvers.groups import HEAD_SCORES, HeadScore, group_scores
from secateur.solvers.obs import damp, damped_cholesky, refuse_infinite
from secateur.solvers.swaps import improve

Update = Literal["none", "obs", "exact"]

_PANEL = 128  # down-dates waiting for one product
_COMPACT = 0.25  # share of gone columns that is worth copying the rest
_DOUBLE_UP_TO = 4096  # columns; beyond, float32 between float64 inversions
_DRIFT = 1e-3  # relative error of B H z at which B is inverted anew


@dataclass(frozen=True)
class Removal:
    """What a structured elimination leaves.

    Attributes:
        weight: (d_out, c), zeros in the columns that are gone.
        gone: (c,) bool.
        order: group numbers in the order they went.
        error: E||(W - W') x||^2 under the damped H, of the weight returned.
        scores: (n,) each group's score before anything went.
        notes: damping it took, rounds, times B was inverted anew, exchanges that stood.
    """

    weight: Tensor
    gone: Tensor
    order: list[int]
    error: float
    scores: Tensor
    notes: dict[str, float] = field(default_factory=dict)


@torch.no_grad()
def remove_groups(
    weight: Tensor,
    moment: Tensor,
    groups: Tensor,
    batches: Sequence[int],
    *,
    score: HeadScore = "slimgpt",
    update: Update = "exact",
    damping: float = 0.01,
    swaps: int = 0,
    first: Tensor | None = None,
    even: int = 1,
    name: str = "weight",
    tokens: int | None = None,
    dtype: torch.dtype | None = None,
) -> Removal:
    """Take ``sum(batches)`` groups away, so many a round, the cheapest first; ties by number.

    Inputs that were always zero cost nothing and go first; where they stay, their weights are
    left as they are.

    Args:
        weight: (d_out, c).
        moment: (c, c) E[x x^T].
        groups: (n, size) column numbers, each at most once; columns in no group always stay.
        batches: groups removed in each round (see ``schedules.batch_sizes``).
        score: see ``group_scores``.
        update: survivors' values: ``none`` as they were; ``obs`` what the elimination leaves;
            ``exact`` the least-squares optimum for the columns kept, by one more Cholesky solve
            (the same without rounding).
        damping: of H, relative to its mean diagonal; raised where H is near singular.
        first: (n,) bool, groups that go before all others, on top of ``batches`` (those that are
            zero already).
        even: the groups fall into so many equal runs, each of which loses the same number.
        swaps: rounds of local search after the elimination (see ``swaps.improve``); 0 for none,
            and none where runs must stay even.
        name: the module, for messages.
        tokens: how many are behind ``moment``, for messages.
        dtype: of the elimination; None: float64 up to 4096 columns, then float32 with B watched
            and inverted anew in float64 when it drifts.

    Raises:
        UsageError: shapes that do not fit, or a removal that leaves no group.
        NumericsError: NaN or infinity; H that cannot be factored even with damping 1.
    """
    ahead = [] if first is None else first.nonzero().flatten().tolist()
    count = _checked(weight, moment, groups, [*batches, len(ahead)], score, update, name, even)
    refuse_infinite(weight, name)
    dtype = dtype or (torch.float64 if weight.shape[1] <= _DOUBLE_UP_TO else torch.float32)
    groups = groups.to(weight.device)
    lower, dead, taken = damped_cholesky(
        moment, damping, name=name, tokens=tokens, dtype=torch.float64
    )
    inverse = torch.cholesky_inverse(lower).to(dtype)
    del lower  # as large as H: not held while H is worked on
    damped = damp(moment, dead, taken, dtype)
    before = weight.to(dtype).masked_fill(dead, 0.0)
    work = _Elimination(before, damped, inverse, groups, score, name)
    work.quota = [count // even] * even
    del inverse
    scores = work.scores()
    order = work.remove_these(ahead)
    for k in batches:
        order += work.remove(k)
    gone = torch.zeros(weight.shape[1], dtype=torch.bool, device=weight.device)
    gone[groups[order].flatten()] = True
    error = work.error
    notes = {"damping": taken, "rounds": float(len(batches)), "refreshes": float(work.refreshes)}
    if swaps and count and even == 1:
        gone, error, done = improve(before, damped, groups, gone, rounds=swaps, locked=first)
        order = _reordered(order, gone[groups[:, 0]])
        notes["swaps"] = float(done)
    if not count:
        return Removal(weight.clone(), gone, order, 0.0, scores, notes)
    if update == "none":
        after = weight.masked_fill(gone, 0.0)
        error = _error_of_zeroing(before, damped, gone)
    else:
        exact = update == "exact" or bool(swaps)
        after = (refit(before, damped, gone) if exact else work.whole()).to(weight.dtype)
        # Where nothing was ever seen there is nothing to fit: such columns stay as they were.
        after = torch.where(dead & ~gone, weight, after)
    return Removal(after, gone, order, error, scores, notes)


def refit(weight: Tensor, moment: Tensor, gone: Tensor) -> Tensor:
    """Least-squares values of the columns kept: W_K + W_R H_RK (H_KK)^-1, zero elsewhere.

    Args:
        weight: (d_out, c) before the removal.
        moment: (c, c), positive definite.
        gone: (c,) bool.
    """
    kept, removed = (~gone).nonzero().flatten(), gone.nonzero().flatten()
    lower = torch.linalg.cholesky(moment[kept][:, kept].double())
    carried = (weight[:, removed] @ moment[removed][:, kept]).double()
    out = torch.zeros_like(weight)
    solved = torch.cholesky_solve(carried.T, lower).T.to(weight.dtype)
    out[:, kept] = weight[:, kept] + solved
    return out


def _error_of_zeroing(weight: Tensor, moment: Tensor, gone: Tensor) -> float:
    """tr(W_R H_RR W_R^T): what zeroing columns costs when the others do not answer."""
    lost = weight[:, gone]
    return float(((lost @ moment[gone][:, gone]) * lost).sum(dtype=torch.float64))


def _reordered(order: list[int], absent: Tensor) -> list[int]:
    """The removal order after swaps: those that are still gone, then the newcomers by number."""
    now = set(absent.nonzero().flatten().tolist())
    stayed = [g for g in order if g in now]
    return stayed + sorted(now - set(stayed))


def _checked(
    weight: Tensor,
    moment: Tensor,
    groups: Tensor,
    batches: Sequence[int],
    score: str,
    update: str,
    name: str,
    even: int,
) -> int:
    """How many groups go, once everything fits together."""
    columns = weight.shape[1]
    if tuple(moment.shape) != (columns, columns):
        raise UsageError(
            f"'{name}' has {columns} columns, so its moments are square of that size",
            field="moment",
            value=list(moment.shape),
        )
    if groups.dim() != 2 or groups.shape[1] == 0 or len(groups.unique()) != groups.numel():
        raise UsageError(
            "groups are rows of column numbers, each column in one group at most",
            field="groups",
            value=list(groups.shape),
        )
    if groups.numel() and (int(groups.min()) < 0 or int(groups.max()) >= columns):
        raise UsageError(f"'{name}' has no such column", field="groups", value=int(groups.max()))
    if score not in HEAD_SCORES:
        raise UsageError(
            "unknown", field="head_score", value=score, fix=f"one of {', '.join(HEAD_SCORES)}"
        )
    if update not in ("none", "obs", "exact"):
        raise UsageError("unknown", field="update", value=update, fix="none, obs or exact")
    count = sum(batches)
    if even < 1 or len(groups) % even or count % even:
        raise UsageError(
            f"{count} of {len(groups)} groups of '{name}' cannot go evenly from {even} runs",
            field="even",
            value=even,
            fix=f"ask for a multiple of {even}",
        )
    if any(k < 0 for k in batches) or count >= max(1, len(groups)):
        raise UsageError(
            f"'{name}' has {len(groups)} groups, and at least one must stay",
            field="count",
            value=count,
            fix="ask for less, or drop the whole layer",
        )
    return count


class _Elimination:
    """W and B over the columns that are left, grouped ones first; B less its panel's rows.

    The current inverse is ``inverse - panel^T panel``; ``blocks`` are its diagonal blocks.
    """

    def __init__(
        self,
        weight: Tensor,
        moment: Tensor,
        inverse: Tensor,
        groups: Tensor,
        rule: HeadScore,
        name: str,
    ) -> None:
        self.original, self.moment = weight, moment
        self.rule, self.name = rule, name
        self.size, self.total = groups.shape[1], len(groups)
        self.quota = [self.total]  # how many each run of groups may still lose
        self.numbers = torch.arange(len(groups), device=weight.device)
        self.live = torch.ones(len(groups), dtype=torch.bool, device=weight.device)
        rest = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
        rest[groups] = False
        self.columns = torch.cat([groups.flatten(), rest.nonzero().flatten()])
        straight = torch.arange(len(self.columns), device=weight.device)
        plain = torch.equal(self.columns, straight)
        self.weight = weight.clone() if plain else weight[:, self.columns]
        self.inverse = inverse if plain else inverse[self.columns][:, self.columns]
        self.panel = self.inverse.new_empty(_PANEL, len(self.columns))
        self.waiting = 0
        self.refreshes = 0
        self.error = 0.0
        self.blocks = self._blocks_of_inverse()

    @property
    def _grouped(self) -> int:
        return len(self.numbers) * self.size

    def _blocks_of_inverse(self) -> Tensor:
        if self.size == 1:
            return self.inverse.diagonal()[: self._grouped].clone().view(-1, 1, 1)
        n, s = len(self.numbers), self.size
        square = self.inverse[: n * s, : n * s].view(n, s, n, s)
        return square.diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()

    def scores(self) -> Tensor:
        """Of every group still listed; infinite for those gone since the last compaction."""
        found = self._try_scores()
        if found is None:
            self._refresh()
            found = self._try_scores()
        if found is None:
            raise NumericsError(
                f"the inverse moments of '{self.name}' are not positive definite any more",
                fix="give more damping (--option damping=0.1) or more calibration text",
            )
        return found

    def _try_scores(self) -> Tensor | None:
        by_group = self.weight[:, : self._grouped].unflatten(1, (-1, self.size))
        eye = torch.eye(self.size, dtype=self.blocks.dtype, device=self.blocks.device)
        blocks = torch.where(self.live[:, None, None], self.blocks, eye)
        found = group_scores(by_group, blocks, self.rule)
        return None if found is None else found.masked_fill(~self.live, float("inf"))

    def remove(self, count: int) -> list[int]:
        """One round: the ``count`` cheapest groups, cheapest first, by their original numbers."""
        ranked = torch.sort(self.scores(), stable=True).indices
        if len(self.quota) == 1:
            return self._take(ranked[:count])
        per_run = self.total // len(self.quota)
        chosen: list[int] = []
        taken = [0] * len(self.quota)
        for place in ranked.tolist():
            run = int(self.numbers[place]) // per_run
            if len(chosen) < count and self.live[place] and taken[run] < self.quota[run]:
                chosen.append(place)
                taken[run] += 1
        return self._take(torch.tensor(chosen, device=ranked.device))

    def remove_these(self, numbers: list[int]) -> list[int]:
        """Groups that go whatever they cost, before anything was compacted."""
        return self._take(torch.tensor(numbers, device=self.live.device)) if numbers else []

    def _take(self, places: Tensor) -> list[int]:
        numbers: list[int] = self.numbers[places].tolist()
        for number in numbers:
            self.quota[number * len(self.quota) // self.total] -= 1
        steps = torch.arange(self.size, device=places.device)
        self._down_date((places[:, None] * self.size + steps).flatten())
        self.live[places] = False
        if 1 - self.live.float().mean() > _COMPACT:
            self._compact()
        return numbers

    def _down_date(self, picked: Tensor) -> None:
        """Eliminate columns from W, the blocks and B (or the panel that will reach B)."""
        k = len(picked)
        if self.waiting + k > _PANEL:
            self._flush()
        rows = self.inverse[picked]
        if self.waiting:
            held = self.panel[: self.waiting]
            rows.addmm_(held[:, picked].T, held, alpha=-1)
        lower, info = torch.linalg.cholesky_ex(rows[:, picked])
        if bool(info.any()):
            if self.refreshes > 100:
                raise NumericsError(f"'{self.name}' cannot be eliminated any further")
            self._refresh()
            rows = self.inverse[picked]
            lower = torch.linalg.cholesky(rows[:, picked])
        fresh = torch.linalg.solve_triangular(lower, rows, upper=False)
        errors = torch.linalg.solve_triangular(lower, self.weight[:, picked].T, upper=False)
        self.error += float(errors.square().sum(dtype=torch.float64))
        self.weight.addmm_(errors.T, fresh, alpha=-1)
        self.weight[:, picked] = 0
        by_group = fresh[:, : self._grouped].view(k, -1, self.size)
        if self.size == 1:
            self.blocks -= by_group.square().sum(0).unsqueeze(-1)
        else:
            self.blocks -= torch.einsum("kms,kmt->mst", by_group, by_group)
        if k > _PANEL:
            add_gram(self.inverse, fresh, -1.0)
        else:
            self.panel[self.waiting : self.waiting + k] = fresh
            self.waiting += k

    def _flush(self) -> None:
        """Let the panel's down-dates reach B."""
        if self.waiting:
            add_gram(self.inverse, self.panel[: self.waiting], -1.0)
            self.waiting = 0

    def _kept(self) -> Tensor:
        """Positions among the listed columns that are not gone."""
        kept = torch.ones(len(self.columns), dtype=torch.bool, device=self.live.device)
        kept[: self._grouped] = self.live.repeat_interleave(self.size)
        return kept.nonzero().flatten()

    def _compact(self) -> None:
        """Copy what is left, so that later rounds do not carry the gone columns along."""
        self._flush()
        kept = self._kept()
        self.columns = self.columns[kept]
        self.weight = self.weight[:, kept]
        self.inverse = self.inverse[kept][:, kept]
        self.numbers, self.live = self.numbers[self.live], self.live[self.live]
        self.panel = self.inverse.new_empty(_PANEL, len(self.columns))
        if self.inverse.dtype != torch.float64 and self._drift() > _DRIFT:
            self._refresh()
        self.blocks = self._blocks_of_inverse()

    def _drift(self) -> float:
        """||B H z - z|| / ||z|| for one fixed z: four vector products tell how far B has strayed."""
        generator = torch.Generator().manual_seed(0)
        z = torch.randn(len(self.columns), generator=generator).to(self.inverse)
        spread = torch.zeros(self.moment.shape[0], dtype=z.dtype, device=z.device)
        spread[self.columns] = self.inverse @ z
        return float((self.moment @ spread)[self.columns].sub_(z).norm() / z.norm())

    def _refresh(self) -> None:
        """Invert what is left of H anew and refit W to it, in float64."""
        self.refreshes += 1
        self.waiting = 0
        kept = self._kept()
        here = self.columns[kept]
        lower = torch.linalg.cholesky(self.moment[here][:, here].double())
        fresh = torch.cholesky_inverse(lower)
        self.inverse.zero_()
        self.inverse[kept[:, None], kept] = fresh.to(self.inverse.dtype)
        gone = torch.ones(self.moment.shape[0], dtype=torch.bool, device=here.device)
        gone[here] = False
        carried = self.original[:, gone] @ self.moment[gone][:, here]
        solved = (carried.double() @ fresh).to(self.weight.dtype)
        self.weight.zero_()
        self.weight[:, kept] = self.original[:, here] + solved
        self.blocks = self._blocks_of_inverse()

    def whole(self) -> Tensor:
        """W' (d_out, c) with zeros where columns are gone, in the original order."""
        out = torch.zeros_like(self.original)
        kept = self._kept()
        out[:, self.columns[kept]] = self.weight[:, kept]
        return out
