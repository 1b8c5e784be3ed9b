"""From scores to masks: the exact count asked for, ties to the lowest index.

True in a mask always means *pruned*. ``select`` is what every method uses: it ranks by
(score, index), so the count is exact however many scores are equal. ``select_reference`` and
``select_cumulative_reference`` repeat what the original scripts do, over- and under-shoot
included, for agreement with published masks.

A full sort is never needed: the k-th value of a group is found by partial selection, and a
group of N:M is ranked by comparing its members pairwise.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from secateur.errors import NumericsError, UsageError
from secateur.masks.target import Cut, Target, spread

PAIRWISE_LIMIT = 8  # M of N:M above which selecting per group beats M (M - 1) / 2 comparisons


def select(score: Tensor, cut: Cut, name: str = "weight") -> Tensor:
    """The mask of ``cut`` that removes the lowest scores.

    Args:
        score: (d_out, d_in), higher = keep; infinities are allowed, NaN is not.
        cut: the count and its scope, or the pattern; ``cut.shape`` is the score's shape.
        name: the module, for messages.

    Returns:
        (d_out, d_in) bool, exactly ``cut.count`` True: in every row, band of columns or group
        of M its share, and in the matrix the sum. ``global`` inside one matrix is ``layer``.

    Raises:
        NumericsError: a score is NaN.
        UsageError: the score is not of the cut's shape.
    """
    if tuple(score.shape) != tuple(cut.shape):
        raise UsageError(
            f"the score of '{name}' has shape {tuple(score.shape)}, its cut {cut.shape}",
            field="cut",
            value=cut.shape,
        )
    refuse_nan(score, name)
    rows, columns = cut.shape
    if cut.keep is not None and cut.group is not None:
        return smallest_of_groups(score, cut.group - cut.keep, cut.group)
    if cut.scope.kind == "row":
        return smallest(score, spread(cut.count, [columns] * rows))
    if cut.scope.kind == "block":
        mask = torch.empty(cut.shape, dtype=torch.bool, device=score.device)
        for (start, stop), count in zip(bands(cut), band_counts(cut), strict=True):
            band = score[:, start:stop]
            mask[:, start:stop] = smallest(band.reshape(1, -1), [count]).view(band.shape)
        return mask
    return smallest(score.reshape(1, -1), [cut.count]).view(cut.shape)


def bands(cut: Cut) -> list[tuple[int, int]]:
    """The column ranges [start, stop) of a block scope; the last may be narrower."""
    columns, width = cut.shape[1], cut.scope.width
    return [(start, min(start + width, columns)) for start in range(0, columns, width)]


def band_counts(cut: Cut) -> list[int]:
    """How many weights each band of ``bands(cut)`` gives; the sum is ``cut.count``."""
    return spread(cut.count, [cut.shape[0] * (stop - start) for start, stop in bands(cut)])


def refuse_nan(score: Tensor, name: str) -> None:
    """Stop at scores that cannot be ranked, naming the module.

    Raises:
        NumericsError: a score is NaN.
    """
    if not score.is_floating_point() or not torch.isnan(score.sum()):
        return  # a sum is several times cheaper than a look at every element, and cannot miss one
    if bad := int(torch.isnan(score).sum()):  # inf - inf also makes a NaN sum
        raise NumericsError(
            f"{bad} of {score.numel()} scores of '{name}' are NaN, so they cannot be ranked",
            fix="look for NaN in the module's weights, activations or gradients; load in float32",
        )


def smallest(score: Tensor, counts: list[int]) -> Tensor:
    """Per row of ``score`` (groups, n), mark the ``counts[i]`` smallest; ties to the lowest index."""
    score = _comparable(score)
    groups, n = score.shape
    distinct = sorted(set(counts))
    if len(distinct) == 1:
        return _smallest(score, distinct[0])
    mask = torch.empty(groups, n, dtype=torch.bool, device=score.device)
    wanted = torch.tensor(counts, device=score.device)
    for count in distinct:
        chosen = (wanted == count).nonzero().squeeze(1)
        mask[chosen] = _smallest(score[chosen], count)
    return mask


def _smallest(score: Tensor, count: int) -> Tensor:
    """``smallest`` with one count for all rows."""
    groups, n = score.shape
    if count <= 0 or count >= n or groups == 0:
        return torch.full((groups, n), count > 0, dtype=torch.bool, device=score.device)
    if score.device.type != "cpu":
        threshold = torch.kthvalue(score, count, dim=1, keepdim=True).values
        return _break_ties(score, threshold, count)
    # numpy's partition is a vectorised quickselect: several times faster than kthvalue on a CPU.
    ordered = np.partition(score.numpy(), count - 1, axis=1)
    last = ordered[:, count - 1 : count].copy()
    threshold = torch.from_numpy(last)
    mask = score <= threshold
    straddling = np.flatnonzero(ordered[:, count:].min(1, keepdims=True) == last)
    if straddling.size:  # a tie at the threshold: the plain comparison marks too many
        rows = torch.from_numpy(straddling)
        mask[rows] = _break_ties(score[rows], threshold[rows], count)
    return mask


def _break_ties(score: Tensor, threshold: Tensor, count: int) -> Tensor:
    """All below the threshold, and of those equal to it the first few that fill the count."""
    below, tied = score < threshold, score == threshold
    room = count - below.sum(1, keepdim=True)
    return below | (tied & (tied.cumsum(1, dtype=torch.int32) <= room))


def smallest_of_groups(score: Tensor, prune: int, group: int) -> Tensor:
    """In each run of ``group`` consecutive columns mark exactly the ``prune`` smallest."""
    score = _comparable(score)
    members = score.reshape(-1, group)
    if group > PAIRWISE_LIMIT:
        return _smallest(members, prune).view(score.shape)
    mask = torch.empty(members.shape, dtype=torch.bool, device=score.device)
    smallest_members(members.T, prune, out=mask.T)
    return mask.view(score.shape)


def smallest_members(members: Tensor, prune: int, out: Tensor) -> Tensor:
    """Mark the ``prune`` smallest of each column of ``members`` (M, n), M small, into ``out``.

    A member's rank is the number of members before it in (score, index) order; counting them
    takes M (M - 1) / 2 vectorised comparisons and no sort.
    """
    group = members.shape[0]
    ranks: list[Tensor | int] = [0] * group
    for later in range(group):
        for earlier in range(later):
            first = (members[earlier] <= members[later]).view(torch.int8)
            ranks[later] = first + ranks[later]
            ranks[earlier] = ranks[earlier] - first
    for index, rank in enumerate(ranks):
        # a member adds 1 - first for each one after it; the 1s are moved to the right-hand side
        limit = prune - (group - 1 - index)
        if isinstance(rank, Tensor):
            torch.lt(rank, limit, out=out[index])
        else:
            out[index] = rank < limit
    return out


def _comparable(score: Tensor) -> Tensor:
    """Contiguous scores of a type that compares fast everywhere, order unchanged."""
    score = score.detach()
    if score.dtype in (torch.float16, torch.bfloat16):
        score = score.float()
    elif score.dtype == torch.bool:
        score = score.to(torch.uint8)
    return score.contiguous()


def nominal_sparsity(cut: Cut) -> float:
    """The sparsity that was typed, from which the original scripts compute counts per group.

    It is known when the cut was made from a target and still has its count, to the one weight
    by which a uniform plan's matrices differ so that the whole is exact.
    """
    total = cut.shape[0] * cut.shape[1]
    if cut.asked is not None and abs(Target(cut.asked).count(total) - cut.count) <= 1:
        return cut.asked
    return cut.sparsity


def select_reference(score: Tensor, cut: Cut, name: str = "weight") -> Tensor:
    """The masks of the original Wanda, GBLM-Pruner, RIA and SparseGPT scripts, bit for bit.

    ``row``: floor(d_in s) of a stable ascending sort per row. ``layer`` and ``block``: all
    scores <= sorted[floor(n s)], so at least one too many, and every tie. N:M: ``topk`` per
    group, whose order among ties PyTorch leaves open.

    Raises:
        NumericsError: a score is NaN.
        UsageError: a ``layer`` or ``block`` sparsity so high that the original would crash.
    """
    refuse_nan(score, name)
    mask = torch.zeros(score.shape, dtype=torch.bool, device=score.device)
    if cut.keep is not None and cut.group is not None:
        for start in range(0, score.shape[1], cut.group):
            group = score[:, start : start + cut.group].float()
            lowest = group.topk(cut.group - cut.keep, dim=1, largest=False).indices
            mask.scatter_(1, start + lowest, True)
        return mask
    sparsity = nominal_sparsity(cut)
    if cut.scope.kind == "row":
        order = torch.sort(score, dim=-1, stable=True).indices
        return mask.scatter_(1, order[:, : int(score.shape[1] * sparsity)], True)
    if cut.scope.kind != "block":
        return at_most_reference(score, sparsity)
    for start, stop in bands(cut):
        mask[:, start:stop] = at_most_reference(score[:, start:stop], sparsity)
    return mask


def at_most_reference(score: Tensor, sparsity: float) -> Tensor:
    """All scores up to and including the one at index floor(n s) of the sorted scores."""
    index = int(score.numel() * sparsity)
    if index >= score.numel():
        raise UsageError(
            "the original script runs out of range here", field="sparsity", value=sparsity
        )
    return score <= torch.sort(score.flatten()).values[index]


def cumulative_share(score: Tensor) -> Tensor:
    """The share of its row's total score lost when a weight and all below it go, (d_out, d_in).

    Cutting every row at the same share alpha is Wanda's variant; the weights whose share is
    among the ``count`` smallest of the matrix are those of the alpha that removes ``count``.
    """
    ordered, order = torch.sort(score, dim=1, stable=True)
    running = ordered.double().cumsum(1)
    share = running / running[:, -1:].clamp_min(torch.finfo(torch.float64).tiny)
    return torch.empty_like(share).scatter_(1, order, share)


def select_cumulative_reference(score: Tensor, sparsity: float) -> Tensor:
    """Wanda's ``--use_variant``: bisect alpha until the sparsity is within 1e-3 of the target.

    Raises:
        UsageError: some row has nothing below the cut, where the original crashes.
    """
    ordered = torch.sort(score, dim=-1, stable=True).values
    running, total = ordered.cumsum(1), score.sum(1)
    alpha, low, high = 0.4, 0.0, 0.8
    while True:
        below = (running <= (total * alpha).reshape(-1, 1)).sum(1, keepdim=True) - 1
        if (below < 0).any():
            raise UsageError(
                "a row has no weight below the cut; the original variant fails here too",
                field="variant",
                value=True,
                fix="leave compat empty, or variant=False",
            )
        mask = score <= ordered.gather(1, below)
        reached = mask.sum() / mask.numel()
        if abs(reached - sparsity) <= 0.001 or high - low < 0.001:
            return mask
        if reached > sparsity:
            alpha, high = (alpha + low) / 2, alpha
        else:
            alpha, low = (alpha + high) / 2, alpha
