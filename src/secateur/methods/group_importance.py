"""LLM-Pruner's importance of coupled channels: pure functions on tensors, no model.

Ma, Fang, Wang, "LLM-Pruner: On the Structural Pruning of Large Language Models", NeurIPS 2023,
arXiv:2305.11627, section 3.2. W is a parameter, g the gradient of the calibration text's mean
cross-entropy, F the mean over samples of each sample's squared gradient (empirical Fisher):

    element1   S = W g                        element2   S = W F W
    mix        S = W g - 1/2 W F W            vector     as element1, summed before the size is taken

A channel's importance in one member of its group is sum |S| over its slice (``vector``:
|sum S|); the members are then reduced to one figure a channel, and a unit of many channels
(a head) is the sum of its channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from secateur.errors import NumericsError, UsageError

Criterion = Literal["element1", "element2", "mix", "vector", "l1", "l2", "random"]
Reduction = Literal["sum", "mean", "max", "prod", "first", "second", "last"]

CRITERIA: tuple[str, ...] = get_args(Criterion)
REDUCTIONS: tuple[str, ...] = get_args(Reduction)

NORMS: dict[str, tuple[str, ...]] = {
    "element1": ("signed",),
    "element2": ("l2",),
    "mix": ("signed", "l2"),
    "vector": ("signed",),
    "l1": (),
    "l2": (),
    "random": (),
}
"""Gradient sums each criterion needs (see ``GradientMoments``)."""


def channel_importance(
    weight: Tensor,
    dim: int,
    criterion: Criterion,
    gradient: Tensor | None = None,
    fisher: Tensor | None = None,
) -> Tensor:
    """Importance of each position of ``weight`` along ``dim``: (weight.shape[dim],) float32.

    Args:
        weight: W, of any shape (a matrix, a bias, a norm's scale).
        dim: the dimension that is cut: rows of a producer, columns of a consumer.
        gradient: g, same shape; needed by element1, mix and vector.
        fisher: F, same shape; needed by element2 and mix.

    Raises:
        UsageError: an unknown criterion.
        ValueError: what the criterion needs was not given.
    """
    w = weight.float()
    others = [d for d in range(w.dim()) if d != dim]
    # One temporary of the weight's size, worked on in place: it is held beside the gradients.
    if criterion == "l1":
        score = w.abs()
    elif criterion == "l2":
        score = w.square()
    elif criterion in ("element1", "vector"):
        score = w * _needed(gradient, "gradient", criterion)
    elif criterion == "element2":
        score = (w * _needed(fisher, "fisher", criterion)).mul_(w)
    elif criterion == "mix":
        score = w * _needed(fisher, "fisher", criterion)
        score.mul_(-0.5).add_(_needed(gradient, "gradient", criterion)).mul_(w)
    else:
        raise UsageError(
            "unknown", field="criterion", value=criterion, fix=f"one of {', '.join(CRITERIA)}"
        )
    if criterion == "vector":
        return (score.sum(others) if others else score).abs_()
    score = score.abs_()
    return score.sum(others) if others else score


def _needed(value: Tensor | None, name: str, criterion: str) -> Tensor:
    if value is None:
        raise ValueError(f"criterion '{criterion}' needs the {name}")
    return value.float()


def folded(channels: Tensor, index: Tensor, width: int) -> Tensor:
    """Channel importances of one member, arranged by unit: (n_units, width) float64.

    A unit may own more channels in one member than in another: with grouped-query attention a
    key-value head has ``width`` channels, and the queries of its ``rep`` heads have rep x width.
    Those are the unit's own (``index`` says which), and are added up head by head.

    Args:
        channels: (d,) importances along the member's cut dimension.
        index: (n_units, r) positions of each unit, r a multiple of ``width``.
    """
    return channels.double()[index.to(channels.device)].unflatten(1, (-1, width)).sum(1)


def reduced(members: Sequence[Tensor], how: Reduction) -> Tensor:
    """One importance a unit, (n_units,) float64, from its members' (n_units, width).

    Args:
        how: over members, channel by channel: ``sum`` (the default of the authors), ``mean``,
            ``max``, ``prod``, or one member alone: ``first``, ``second``, ``last``.

    Raises:
        UsageError: an unknown reduction. NumericsError: NaN.
    """
    stack = torch.stack([m.double() for m in members])
    if how not in REDUCTIONS:
        raise UsageError(
            "unknown", field="reduction", value=how, fix=f"one of {', '.join(REDUCTIONS)}"
        )
    if bool(torch.isnan(stack).any()):
        raise NumericsError(
            "the importances of a group hold NaN",
            fix="use --dtype float32 (products of half-precision gradients underflow)",
        )
    if how in ("first", "second", "last"):
        channels = stack[{"first": 0, "second": min(1, len(stack) - 1), "last": -1}[how]]
    elif how == "max":
        channels = stack.amax(0)
    elif how == "prod":
        channels = stack.prod(0)
    else:
        channels = stack.sum(0) if how == "sum" else stack.mean(0)
    return channels.sum(1)
