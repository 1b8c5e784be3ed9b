"""Structured OBS: work and time against inverting anew each round.

    python -m benchmarks.structured_obs

``flops``: floating-point operations of all matrix products, factorisations and solves, counted
as they are dispatched, for an MLP of 11008 channels (LLaMA-7B) of which half go in the
published 54 rounds. The textbook loop would take hours there, so its count comes from a formula
that must agree with what is counted at an eighth of the size. ``time``: both at that eighth,
in turns. ``selection``: whether both remove the same channels in the same order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.common import alternate, arguments, finish, ratio, spread
from secateur.solvers.groups import contiguous_groups
from secateur.solvers.schedules import batch_sizes
from secateur.solvers.structured_obs import Removal, remove_groups
from secateur.solvers.structured_reference import remove_groups_reference

CHANNELS, ROWS = 11008, 4096
SHARE, SCALE = 0.5, 8
LIMIT_FLOPS = 20


class Count(TorchDispatchMode):
    """Adds up the flops of dense linear algebra; a multiply-add counts two."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0.0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        rule = _FLOPS.get(func.overloadpacket.__name__)
        if rule is not None:
            self.flops += rule(*args)
        return func(*args, **(kwargs or {}))


def _batch(matrix: Tensor) -> int:
    return int(torch.tensor(matrix.shape[:-2]).prod())


_FLOPS: dict[str, Callable[..., float]] = {
    "mm": lambda a, b: 2.0 * a.shape[0] * a.shape[1] * b.shape[1],
    "addmm": lambda c, a, b: 2.0 * a.shape[0] * a.shape[1] * b.shape[1],
    "addmm_": lambda c, a, b: 2.0 * a.shape[0] * a.shape[1] * b.shape[1],
    "bmm": lambda a, b: 2.0 * a.shape[0] * a.shape[1] * a.shape[2] * b.shape[2],
    "linalg_cholesky_ex": lambda a, **_: _batch(a) * a.shape[-1] ** 3 / 3,
    "cholesky_inverse": lambda a: 2 * a.shape[-1] ** 3 / 3,
    "linalg_solve_triangular": lambda a, b, **_: 1.0 * _batch(a) * a.shape[-1] ** 2 * b.shape[-1],
    "cholesky_solve": lambda b, a: 2.0 * a.shape[-1] ** 2 * b.shape[-1],
}


def problem(channels: int, rows: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random W (rows, channels) and second moments of correlated inputs, float32."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, channels, generator=generator)
    rank = channels // 16
    mixed = torch.randn(rank, channels, generator=generator)
    moment = mixed.T @ mixed / rank
    moment.diagonal().add_(0.2 + torch.rand(channels, generator=generator))
    return weight, moment


def rounds(channels: int) -> list[int]:
    """The published rounds for LLaMA-7B, scaled to the width."""
    return [k * channels // CHANNELS for k in batch_sizes(int(CHANNELS * SHARE), "published")]


def reference_flops(channels: int, rows: int, batches: list[int]) -> float:
    """Of the textbook loop: Cholesky, inverse and Cholesky again in each round, and the sweep."""
    total = channels**3 / 3  # the first Cholesky finds the damping
    for k in batches:
        total += 4 * channels**3 / 3 + 2 * rows * k * (channels - k)
    return total


def work() -> dict[str, Any]:
    """Counted flops at full size, the formula checked at an eighth of it."""
    small = CHANNELS // SCALE
    weight, moment = problem(small, ROWS // SCALE)
    groups = contiguous_groups(small, 1)
    with Count() as slow:
        remove_groups_reference(weight, moment, groups, rounds(small))
    formula = reference_flops(small, ROWS // SCALE, rounds(small))
    with Count() as quick:
        remove_groups(weight, moment, groups, rounds(small), dtype=torch.float32)
    weight, moment = problem(CHANNELS, ROWS)
    with Count() as full:
        found = remove_groups(
            weight, moment, contiguous_groups(CHANNELS, 1), rounds(CHANNELS), dtype=torch.float32
        )
    slow_full = reference_flops(CHANNELS, ROWS, rounds(CHANNELS))
    times = slow_full / full.flops
    print(
        f"{CHANNELS} channels: {slow_full:.3g} flops refactorising, {full.flops:.3g} down-dating: "
        f"{times:.1f}x  >= {LIMIT_FLOPS}: {'held' if times >= LIMIT_FLOPS else 'MISSED'}"
    )
    return {
        "channels": CHANNELS,
        "rows": ROWS,
        "rounds": len(rounds(CHANNELS)),
        "removed": int(found.gone.sum()),
        "refactorising": slow_full,
        "down_dating": full.flops,
        "times_fewer": round(times, 2),
        "wanted": LIMIT_FLOPS,
        "refreshes": found.notes["refreshes"],
        "formula_over_count_at_small_size": round(formula / slow.flops, 4),
        "times_fewer_at_small_size": round(slow.flops / quick.flops, 2),
    }


def duel(turns: int) -> dict[str, Any]:
    """Seconds of both at an eighth of the size, and whether they choose the same."""
    channels, rows_ = CHANNELS // SCALE, ROWS // SCALE
    weight, moment = problem(channels, rows_)
    groups, batches = contiguous_groups(channels, 1), rounds(channels)
    found: dict[str, Any] = {}

    def ours(dtype: torch.dtype) -> Callable[[], object]:
        def run() -> None:
            found[str(dtype)] = remove_groups(weight, moment, groups, batches, dtype=dtype)

        return run

    def theirs() -> None:
        found["slow"] = remove_groups_reference(weight, moment, groups, batches)

    seconds = alternate(
        {"refactorising": theirs, "float64": ours(torch.float64), "float32": ours(torch.float32)},
        turns,
    )
    expected, order, error = found["slow"]
    out: dict[str, Any] = {"channels": channels, "rows": rows_, "rounds": len(batches)}
    for dtype in ("float64", "float32"):
        mine: Removal = found[f"torch.{dtype}"]
        times = ratio(seconds["refactorising"], seconds[dtype])
        out[dtype] = {
            "seconds": spread(seconds[dtype]),
            "times_faster": times,
            "same_order": mine.order == order,
            "same_set": set(mine.order) == set(order),
            "differing": len(set(mine.order) ^ set(order)) // 2,
            "largest_difference": float((mine.weight - expected).abs().max()),
            "error_ratio": mine.error / error,
        }
        print(
            f"{channels} channels, {dtype}: {times['median']:.1f}x faster than refactorising; "
            f"same order {out[dtype]['same_order']}, same set {out[dtype]['same_set']}"
        )
    out["refactorising_seconds"] = spread(seconds["refactorising"])
    return out


def main() -> None:
    """All parts, or those named."""
    parser = arguments(__doc__)
    parser.add_argument("--turns", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    figures = {"flops": work(), "time": duel(given.turns)}
    finish("structured_obs", figures, given.json)


if __name__ == "__main__":
    main()
