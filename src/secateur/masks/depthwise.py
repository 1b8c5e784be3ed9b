"""Which taps of a depth-wise layer go: DEPrune's choices and the coarser ones it is compared with.

A layer has one row of K = kernel_h * kernel_w taps an output channel, (M, K) in all. Diagonal-wise
refactorisation lays 32 channels side by side into one matrix product of 32 K columns, so that a
tap is a column; the product of 32 channels is here a *range*. Every choice removes taps of the
least |w| under a constraint, exact to the tap, ties to the lowest index (Park et al., DEPrune,
NeurIPS 2024):

=========  ==================================================================
DCP        any taps of the layer (section 3.1)
balanced   the same number in every range of 32 channels (BWT, section 3.2)
fours      the same number in every four consecutive taps, as N:M does
channels   whole channels
=========  ==================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from secateur.allocation.align import align_by_benefit
from secateur.errors import UsageError
from secateur.masks.selection import refuse_nan, smallest
from secateur.masks.target import spread

CHANNELS = 32
"""Channels in a range: rows of the tile that one matrix product works on."""
Choice = Literal["dcp", "balanced", "fours", "channels"]


def taps_of(weight: Tensor) -> Tensor:
    """|w| of a depth-wise weight (M, 1, kernel_h, kernel_w), as (M, K) float32."""
    return weight.detach().flatten(1).abs().float().cpu()


def columns(taps: int, ratio: float, channels: int = CHANNELS) -> int:
    """Columns that a range of ``channels`` channels keeps when ``ratio`` of them go.

    Raises:
        UsageError: the ratio is outside [0, 1).
    """
    if not 0 <= ratio < 1:
        raise UsageError(
            "the share of taps to remove lies in [0, 1)",
            field="dw",
            value=ratio,
            fix="e.g. 0.8; at 1 a layer would hold nothing",
        )
    return channels * taps - round(ratio * channels * taps)


def dcp(weight: Tensor, count: int, name: str = "weight") -> Tensor:
    """The ``count`` smallest taps of the layer.

    Returns:
        A mask of the weight's shape, True = gone.
    """
    score = taps_of(weight)
    refuse_nan(score, name)
    return smallest(score.reshape(1, -1), [count]).view(weight.shape)


def balanced(weight: Tensor, kept: int, name: str = "weight") -> Tensor:
    """In every range of 32 channels all but the ``kept`` largest taps.

    The last range may have fewer channels; it keeps its share of ``kept``, rounded, which is
    never more. A mask of smaller ``kept`` contains one of larger.
    """
    score = taps_of(weight)
    refuse_nan(score, name)
    return _in_ranges(score, kept, lambda rows, gone: smallest(rows, [gone] * len(rows))).view(
        weight.shape
    )


def fours(weight: Tensor, kept: int, name: str = "weight") -> Tensor:
    """As ``balanced``, and within a range the same number in every four taps, to one.

    Half of them is 2:4. Other shares have no whole number in four: they are spread evenly.
    """
    score = taps_of(weight)
    refuse_nan(score, name)

    def choose(rows: Tensor, gone: int) -> Tensor:
        sizes = [min(4, rows.shape[1] - at) for at in range(0, rows.shape[1], 4)]
        # a last group of fewer than four is filled with taps that nothing would remove
        wide = torch.full((len(rows), 4 * len(sizes)), float("inf"))
        wide[:, : rows.shape[1]] = rows
        counts = spread(gone, sizes) * len(rows)
        return smallest(wide.reshape(-1, 4), counts).view(wide.shape)[:, : rows.shape[1]]

    return _in_ranges(score, kept, choose).view(weight.shape)


def channels(weight: Tensor, count: int, name: str = "weight") -> Tensor:
    """All taps of the ``count`` channels of the least l2 norm."""
    score = taps_of(weight)
    refuse_nan(score, name)
    gone = smallest(score.square().sum(1).view(1, -1), [count])[0]
    return gone[:, None].expand(score.shape).reshape(weight.shape).clone()


def _in_ranges(score: Tensor, kept: int, choose: Callable[[Tensor, int], Tensor]) -> Tensor:
    """``choose(rows, gone)`` on the whole ranges at once and on the last, narrower one."""
    m, taps = score.shape
    whole = m // CHANNELS * CHANNELS
    width = CHANNELS * taps
    if not 0 <= kept <= width:
        raise UsageError(f"a range has {width} columns", field="kept", value=kept)
    parts = []
    if whole:
        parts.append(choose(score[:whole].reshape(-1, width), width - kept).reshape(-1, taps))
    if m > whole:
        rest = (m - whole) * taps
        gone = rest - round(kept * (m - whole) / CHANNELS)
        parts.append(choose(score[whole:].reshape(1, -1), gone).reshape(-1, taps))
    return torch.cat(parts)


def kept_columns(mask: Tensor) -> list[int]:
    """Columns left in each range; the last may have had fewer."""
    return [int((~part).sum()) for part in mask.flatten(1).split(CHANNELS)]


def imbalance(mask: Tensor) -> float:
    """How far the fullest range lies above the layer, as a share of its taps: >= 0.

    The product of a layer takes as long as its fullest range.
    """
    gone = mask.flatten(1).float()
    return float(gone.mean() - min(part.mean() for part in gone.split(CHANNELS)))


def layer_counts(
    weights: Mapping[str, Tensor], ratio: float, layers: Literal["uniform", "global", "raw"]
) -> dict[str, int]:
    """Taps each layer loses, ``ratio`` of all of them together.

    The paper does not say how the share is laid out over layers; its aligned and unaligned
    counts only show that it was not the same everywhere.

    Args:
        layers: ``uniform``: the same share, rounded, in each, one tap left. ``global``: by one threshold on
            |w| over the layer's root mean square. ``raw``: by one threshold on |w|.
    """
    if not 0 <= ratio < 1:
        columns(1, ratio)  # says so
    scores = {name: taps_of(weight) for name, weight in weights.items()}
    for name, score in scores.items():
        refuse_nan(score, name)
    if layers == "uniform":
        return {n: min(round(ratio * s.numel()), s.numel() - 1) for n, s in scores.items()}
    if layers == "global":
        scores = {n: s / s.square().mean().sqrt().clamp_min(1e-30) for n, s in scores.items()}
    line = torch.cat([score.reshape(-1) for score in scores.values()])
    gone = smallest(line.view(1, -1), [round(ratio * len(line))])[0]
    parts = gone.split([score.numel() for score in scores.values()])
    # a layer that lost everything would let nothing through
    return {
        name: min(int(part.sum()), part.numel() - 1)
        for name, part in zip(scores, parts, strict=True)
    }


def recalibrate(
    kept: Sequence[int], limits: Sequence[int], seconds: Callable[[int, int], float]
) -> list[int]:
    """Hardware-aware recalibration (HSR, section 3.3): every width becomes a multiple of 32.

    The half that gains most time per unit that lies beyond a multiple gives those units up, the
    other half takes units back up to the next multiple, so that the whole stays what it was to
    a few. Below one multiple a width can only go up; without room above it only down.

    Args:
        kept: columns of a range, or filters, in each layer. limits: the most each can have.
        seconds: (layer, width) -> time, measured (``methods.deprune_latency``) or modelled.
    """
    return align_by_benefit(kept, limits, CHANNELS, seconds, worth=None, split="half")


def staircase(base: float, step: float) -> Callable[[int, int], float]:
    """The model of a tiled matrix product, t(n) = base + step * ceil(n / 32), for want of a device."""
    return lambda layer, width: base + step * -(-width // CHANNELS)
