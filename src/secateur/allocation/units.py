"""From ratios per matrix to whole structures: how many heads or channels each block gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from secateur.allocation.plan import UnitCut
from secateur.allocation.projection import project, round_to_units
from secateur.errors import UsageError


@dataclass(frozen=True)
class UnitGroup:
    """A block's like structures (its heads, its MLP channels).

    Attributes:
        of: how many there are.
        weights: parameters one of them takes along, in all its matrices.
        matrices: names of the matrices it lies in, whose ratios speak for it.
        least: how many must stay.
        multiple: they go in lots of so many (channels in multiples of 32, say).
    """

    of: int
    weights: int
    matrices: tuple[str, ...]
    least: int = 1
    multiple: int = 1


def unit_cuts(
    ratios: Mapping[str, float],
    sizes: Mapping[str, int],
    groups: Mapping[str, UnitGroup],
    sparsity: float,
) -> dict[str, UnitCut]:
    """Whole structures to remove from each group, so that ``sparsity`` of their weights go.

    A group's wish is the mean of its matrices' ratios, weighted by their ``sizes``. The total is
    exact to half of the smallest lot that still has room to move.

    Args:
        ratios: share of each matrix, as in ``Plan.ratios``.
        sizes: weights in each matrix.
        groups: ``"BLOCK:KIND"`` -> its structures.
        sparsity: share of all groups' weights that goes.

    Raises:
        UsageError: more is asked than may go with ``least`` kept everywhere.
    """
    names = list(groups)
    lots = [max(1, groups[n].multiple) for n in names]
    for name, lot in zip(names, lots, strict=True):
        if groups[name].of < groups[name].least:
            raise UsageError(
                f"'{name}' has {groups[name].of} structures",
                field="least",
                value=groups[name].least,
            )
        if groups[name].of % lot:
            raise UsageError(
                f"'{name}' has {groups[name].of} structures", field="multiple", value=lot
            )
    wishes = []
    for name in names:
        members = groups[name].matrices
        weight = sum(sizes[m] for m in members)
        wishes.append(sum(ratios[m] * sizes[m] for m in members) / weight)
    whole = [groups[n].of * groups[n].weights for n in names]
    most = [(groups[n].of - groups[n].least) // lot for n, lot in zip(names, lots, strict=True)]
    counts = [groups[n].of // lot for n, lot in zip(names, lots, strict=True)]
    highs = [m / max(1, c) for m, c in zip(most, counts, strict=True)]
    found = project(wishes, whole, sparsity, 0.0, highs)
    taken = round_to_units(
        found,
        [groups[n].weights * lot for n, lot in zip(names, lots, strict=True)],
        counts,
        round(sparsity * sum(whole)),
        None,
        most,
    )
    return {
        n: UnitCut(groups[n].of, t * lot, groups[n].weights)
        for n, t, lot in zip(names, taken, lots, strict=True)
    }
