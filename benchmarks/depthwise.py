"""Depth-wise layers on tap lists beside torch's own, one thread.

    python -m benchmarks.depthwise --json benchmarks/results/depthwise.json

Every layer is run by torch on planes (NCHW), by torch channels last, and by the tap-list kernel
at several shares of taps gone, in turns; medians of wall time over many short calls, so that a
call another process interrupts does not count. The ratio is the better of torch's two over ours.
Also measured: the candidate in numba (``--numba``), and two threads (``--threads 2``).
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from benchmarks.common import alternate, arguments, finish
from secateur.kernels.compiled import why_not
from secateur.kernels.depthwise import Taps, backends, depthwise
from secateur.masks.depthwise import balanced, columns

SHARES = (0.0, 0.5, 0.7, 0.8, 0.9)
WANTED = 2.0
LIMITS = ("CC", "ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")  # how to measure without AVX-512
# channels, height and width, kernel, stride: of MobileNetV2 and EfficientNet-B0 and -Lite0
LAYERS = (
    (32, 112, 3, 1), (96, 112, 3, 2), (144, 56, 3, 1), (144, 56, 5, 2), (192, 28, 3, 1),
    (240, 28, 5, 1), (240, 28, 3, 2), (576, 14, 3, 1), (480, 14, 5, 1), (672, 14, 5, 1),
    (672, 14, 5, 2), (960, 7, 3, 1), (1152, 7, 5, 1), (1152, 7, 3, 1),
)  # fmt: skip


def layer(channels: int, size: int, kernel: int, stride: int, rounds: int, numba: bool) -> dict:
    """Microseconds of each way, and ratios."""
    conv = nn.Conv2d(
        channels, channels, kernel, stride, kernel // 2, groups=channels, bias=False
    ).eval()
    x = torch.randn(1, channels, size, size)
    last = nn.Conv2d(channels, channels, kernel, stride, kernel // 2, groups=channels, bias=False)
    last.load_state_dict(conv.state_dict())
    last, x_last = (
        last.to(memory_format=torch.channels_last),
        x.to(memory_format=torch.channels_last),
    )
    ways: dict[str, Callable[[], object]] = {
        "torch planes": lambda: conv(x),
        "torch channels last": lambda: last(x_last),
    }
    gap = 0.0
    for share in SHARES:
        mask = balanced(conv.weight, columns(kernel * kernel, share))
        taps = Taps.of(conv, mask)
        ways[f"ours {share:g}"] = lambda taps=taps: depthwise(x, taps)
        zeroed = nn.functional.conv2d(x, taps.dense(), None, stride, kernel // 2, 1, channels)
        gap = max(gap, float((depthwise(x, taps) - zeroed).abs().max()))
        if numba:
            from benchmarks.depthwise_numba import depthwise_numba

            ways[f"numba {share:g}"] = lambda taps=taps: depthwise_numba(x, taps)
    for way in ways.values():
        way(), way()
    seconds = alternate(ways, rounds, clock=time.perf_counter)
    micro = {name: 1e6 * statistics.median(times) for name, times in seconds.items()}
    native = min(micro["torch planes"], micro["torch channels last"])
    return {
        "layer": f"{channels}x{size}^2 k{kernel} s{stride}",
        "microseconds": {name: round(value, 1) for name, value in micro.items()},
        "ratio": {f"{s:g}": round(native / micro[f"ours {s:g}"], 2) for s in SHARES},
        "largest_difference": gap,
    }


@torch.no_grad()
def main() -> None:
    """Measure and write."""
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=400)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--numba", action="store_true", help="the candidate in numba too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    rows: list[dict] = []
    layer(
        *LAYERS[1], 30, False
    )  # the allocator learns what sizes come, which is slow the first time
    for shape in LAYERS:
        rows.append(layer(*shape, args.rounds, args.numba))
        print(rows[-1]["layer"], rows[-1]["ratio"], flush=True)
    low = min(row["ratio"]["0.8"] for row in rows)
    print(f"least at 80 %: {low:.2f}x (wanted {WANTED:g}x)")
    figures = {
        "backend": backends()[0],
        "environment": {k: os.environ[k] for k in LIMITS if k in os.environ},
        "no_compiler": why_not("depthwise"),
        "wanted_at_80": WANTED,
        "least_at_80": low,
        "layers": rows,
    }
    finish("depthwise", figures, args.json)


if __name__ == "__main__":
    main()
