"""Aligning widths to what the hardware likes, where measured times say that it pays.

A general form of the hardware-aware recalibration of DEPrune (Park et al., NeurIPS 2024): a
width that is no multiple of the tile costs as much as the next multiple. Those that gain most
per unit given up are rounded down, the others up, so that the total stays what it was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

WORTH = 0.02
"""A gain below this share of the time is noise, and the width stays."""


def align_by_benefit(
    widths: Sequence[int],
    limits: Sequence[int],
    tile: int,
    seconds: Callable[[int, int], float],
    worth: float = WORTH,
) -> list[int]:
    """Each width at a multiple of ``tile``, or as it was where alignment gains nothing.

    For width n with n mod tile = e > 0: alpha = t(n) - t(n - e) seconds, beta = alpha / e.
    Widths are sorted by beta; a prefix goes down by e, the rest up to the next multiple, and
    the prefix is chosen whose sum of moves is nearest zero.

    Args:
        widths: units kept in each layer.
        limits: the most each can keep.
        tile: 8, 32, 64.
        seconds: (layer, width) -> measured time.
        worth: least gain, as a share of t(n), for which a width is moved.
    """
    odd: list[tuple[float, int]] = []
    for index, width in enumerate(widths):
        extra = width % tile
        if not extra or width < tile or width - extra + tile > limits[index]:
            continue
        before = seconds(index, width)
        gain = before - seconds(index, width - extra)
        if gain > worth * before:
            odd.append((gain / extra, index))
    order = [index for _, index in sorted(odd, key=lambda item: (-item[0], item[1]))]
    down = [-(widths[i] % tile) for i in order]
    up = [tile - widths[i] % tile for i in order]
    drifts = [abs(sum(down[:k]) + sum(up[k:])) for k in range(len(order) + 1)]
    split = drifts.index(min(drifts)) if order else 0
    out = list(widths)
    for place, index in enumerate(order):
        out[index] += down[place] if place < split else up[place]
    return out
