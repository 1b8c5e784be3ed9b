"""Which heads go, from one importance per head: pure functions on lists of (heads,) tensors.

One tensor a layer; layers may differ in their number of heads. Everything is deterministic:
ties go to the lower layer, then to the lower head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.errors import NumericsError, UsageError


@dataclass(frozen=True)
class HeadRules:
    """What a cut has to keep to.

    Attributes:
        at_least: heads that stay in every layer (in one with fewer: all of them).
        multiple_of: what stays of a layer that is cut is a multiple of this.
        uniform: every layer gives the same number.
    """

    at_least: int = 1
    multiple_of: int = 1
    uniform: bool = False

    def __post_init__(self) -> None:
        if self.at_least < 0:
            raise UsageError("cannot be negative", field="at_least", value=self.at_least, fix="0")
        if self.multiple_of < 1:
            raise UsageError("at least 1", field="multiple_of", value=self.multiple_of, fix="1")


def normalised(scores: Sequence[Tensor]) -> list[Tensor]:
    """Each layer's importances divided by their l2 norm (Michel et al. 2019, section 4.1).

    Layers then compete on equal terms; a layer of zeros stays zero. float64.
    """
    return [s.double() / (s.double().norm() + 1e-20) for s in scores]


def removal_order(scores: Sequence[Tensor], rules: HeadRules) -> list[list[tuple[int, int]]]:
    """Bundles of (layer, head) in the order they go; every prefix is a cut the rules allow.

    A bundle is what must go together: one head, as many of a layer as ``multiple_of`` asks,
    or (``uniform``) one such lot of every layer. Bundles are ordered by their mean importance,
    and a layer's own are taken from the least important up, so cuts of any two sizes nest.

    Raises:
        NumericsError: an importance is NaN.
        UsageError: ``uniform`` with layers of different sizes.
    """
    lots = [_lots(layer, score, rules) for layer, score in enumerate(scores)]
    if not rules.uniform:
        flat = [lot for layer in lots for lot in layer]
        return [heads for _, heads in sorted(flat, key=lambda lot: (lot[0], lot[1][0][0]))]
    if len({len(s) for s in scores}) > 1:
        raise UsageError(
            "the layers differ in their number of heads, so they cannot give the same number",
            field="uniform",
            value=True,
            fix="uniform: false, or only layers of one kind",
        )
    return [[head for _, heads in step for head in heads] for step in zip(*lots, strict=True)]


def _lots(layer: int, score: Tensor, rules: HeadRules) -> list[tuple[float, list[tuple[int, int]]]]:
    """(mean importance, heads) of what one layer gives, in the order it gives it."""
    if bool(torch.isnan(score).any()):
        raise NumericsError(
            f"the head importances of layer {layer} hold NaN",
            fix="use --dtype float32, or check the weights",
        )
    heads = score.shape[0]
    # What may go: down to the least multiple of `multiple_of` that leaves `at_least`.
    floor = math.ceil(min(rules.at_least, heads) / rules.multiple_of) * rules.multiple_of
    order = score.double().argsort(stable=True).tolist()
    out: list[tuple[float, list[tuple[int, int]]]] = []
    kept = heads
    while True:
        step = kept % rules.multiple_of or rules.multiple_of
        if kept - step < floor:
            return out
        taken = order[heads - kept : heads - kept + step]
        # Never less than the lot before it, even by rounding: a layer's lots keep their order.
        mean = max(sum(float(score[h]) for h in taken) / step, out[-1][0] if out else -math.inf)
        out.append((mean, [(layer, h) for h in taken]))
        kept -= step


def heads_asked(total: int, share: float) -> int:
    """``share`` of ``total`` heads as a whole number, rounded to the nearest (half: down).

    >>> heads_asked(72, 0.1), heads_asked(10, 0.25)
    (7, 2)
    """
    if not 0 <= share < 1:
        raise UsageError("a share in [0, 1)", field="sparsity", value=share, fix="e.g. 0.3")
    return math.ceil(total * share - 0.5)


def select_heads(scores: Sequence[Tensor], count: int, rules: HeadRules) -> list[Tensor]:
    """Per layer a (heads,) bool, True where the head goes: ``count`` heads, or the most below.

    Fewer go only where the rules move heads in bundles.

    Raises:
        UsageError: the rules forbid so many.
    """
    gone = [torch.zeros(s.shape[0], dtype=torch.bool) for s in scores]
    order = removal_order(scores, rules)
    possible = sum(map(len, order))
    if count > possible:
        total = sum(len(g) for g in gone)
        raise UsageError(
            f"{count} of {total} heads should go, but the rules let no more than {possible} go",
            field="sparsity",
            value=round(count / max(1, total), 6),
            fix=f"at most {possible / max(1, total):.4f}, or a smaller at_least",
        )
    left = count
    for bundle in order:
        if len(bundle) > left:
            break
        for layer, head in bundle:
            gone[layer][head] = True
        left -= len(bundle)
    return gone
