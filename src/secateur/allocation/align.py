"""Aligning widths to what the hardware likes, where measured times say that it pays.

A general form of the hardware-aware recalibration of DEPrune (Park et al., NeurIPS 2024): a
width that is no multiple of the tile costs as much as the next multiple. Those that gain most
per unit given up are rounded down, the others up, so that the total stays what it was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

WORTH = 0.02
"""A gain below this share of the time is noise, and the width stays."""


def align_by_benefit(
    widths: Sequence[int],
    limits: Sequence[int],
    tile: int,
    seconds: Callable[[int, int], float],
    worth: float | None = WORTH,
    split: Literal["nearest", "half"] = "nearest",
) -> list[int]:
    """Each width at a multiple of ``tile``, or as it was where alignment gains nothing.

    For width n with n mod tile = e > 0: alpha = t(n) - t(n - e) seconds, beta = alpha / e.
    Widths are sorted by beta; a prefix goes down by e, the rest up to the next multiple.

    Args:
        widths: units kept in each layer.
        limits: the most each can keep.
        tile: 8, 32, 64.
        seconds: (layer, width) -> measured time.
        worth: least gain, as a share of t(n), for which a width is moved, and a width that can
            move one way only stays; None: every width moves, in the way it can.
        split: which prefix goes down: the one whose sum of moves is ``nearest`` zero, or, as the
            paper has it, the first ``half``.
    """
    odd: list[tuple[float, int]] = []
    only_up, only_down = [], []
    for index, width in enumerate(widths):
        extra = width % tile
        if not extra:
            continue
        if width < tile or width - extra + tile > limits[index]:
            if worth is None and width - extra + tile <= limits[index]:
                only_up.append(index)
            elif worth is None and width > tile:
                only_down.append(index)
            continue
        before = seconds(index, width)
        gain = before - seconds(index, width - extra)
        if worth is None or gain > worth * before:
            odd.append((gain / extra, index))
    order = [index for _, index in sorted(odd, key=lambda item: (-item[0], item[1]))]
    down = [-(widths[i] % tile) for i in order]
    up = [tile - widths[i] % tile for i in order]
    if split == "half":
        prefix = (len(order) + 1) // 2
    else:
        drifts = [abs(sum(down[:k]) + sum(up[k:])) for k in range(len(order) + 1)]
        prefix = drifts.index(min(drifts)) if order else 0
    out = list(widths)
    for place, index in enumerate(order):
        out[index] += down[place] if place < prefix else up[place]
    for index in only_up:
        out[index] += tile - widths[index] % tile
    for index in only_down:
        out[index] -= widths[index] % tile
    return out
