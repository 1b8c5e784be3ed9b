"""Iterative magnitude pruning: how much is gone after each cycle of pruning and retraining.

Geometric cycles remove the same share of what is left each time (Han et al., 2015; Renda et
al., 2020, arXiv:2003.02389); cubic ones much at first and little at the end (Zhu and Gupta,
2017, arXiv:1710.01878, eq. 1). One cycle is one-shot pruning with retraining. What went in an
earlier cycle stays gone: a zero weight is the first to go in the next.
"""

from __future__ import annotations

from typing import Literal, get_args

from secateur.errors import UsageError

Cycles = Literal["geometric", "cubic"]


def sparsities(target: float, cycles: int, schedule: Cycles = "geometric") -> list[float]:
    """The sparsity after each of ``cycles``; the last is ``target`` itself.

    >>> [round(s, 4) for s in sparsities(0.75, 2)]
    [0.5, 0.75]
    >>> [round(s, 4) for s in sparsities(0.8, 2, "cubic")]
    [0.7, 0.8]

    Raises:
        UsageError: no cycles, an unknown schedule, or a target outside [0, 1).
    """
    if cycles < 1:
        raise UsageError("must be at least 1", field="cycles", value=cycles)
    if schedule not in get_args(Cycles):
        raise UsageError(
            f"one of {', '.join(get_args(Cycles))}", field="cycle_schedule", value=schedule
        )
    if not 0 <= target < 1:
        raise UsageError("must lie in [0, 1)", field="sparsity", value=target)
    steps = [k / cycles for k in range(1, cycles)]
    if schedule == "geometric":
        return [*(1 - (1 - target) ** part for part in steps), target]
    return [*(target - target * (1 - part) ** 3 for part in steps), target]
