"""Tap lists on a CUDA device: two Triton kernels, timed against torch's own layer where they run.

``direct``
    One program makes a tile of one channel from its taps, over the images of the batch; no matrix
    product. Does a 32nd of the other's arithmetic.
``gather``
    The product of DEPrune: 32 channels at a time, A (32, n) of the columns that are left times
    B (n, tile) gathered from the input (never stored). n is padded to a multiple of 32, so time is
    a staircase in n: this is what balance and recalibration are for.

``depthwise_cuda`` believes no expectation: for each shape it measures both, with tiles of several
sizes, and torch (planes and channels last) and takes the fastest.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from secateur.kernels.depthwise import Taps
from secateur.masks.depthwise import CHANNELS

Form = Literal["direct", "gather", "torch", "torch channels last"]
FORMS: tuple[Form, ...] = ("direct", "gather", "torch", "torch channels last")
BLOCKS: dict[Form, tuple[int, ...]] = {"direct": (128, 256, 512, 1024), "gather": (32, 64, 128)}
"""Outputs of a tile that are tried."""
_STEP = 32  # columns of one product


@cache
def available() -> bool:
    """Whether there is a CUDA device and Triton."""
    return torch.cuda.is_available() and _kernels() is not None


@cache
def _kernels() -> Any:
    try:
        from secateur.kernels import _depthwise_triton
    except Exception:  # an import of Triton may fail in more ways than being absent
        return None
    return _depthwise_triton


def depthwise_cuda(x: Tensor, taps: Taps, form: Form | None = None) -> Tensor:
    """The convolution, of its clamp; float32 or float16 on a CUDA device, without a gradient.

    Args:
        form: None: whichever was fastest for this shape when it was first met.
    """
    x = x.detach()
    with torch.cuda.device(x.device):  # kernels start on the current device
        if form is None:
            return _run(x, taps, *_fastest(x, taps))
        return _run(x, taps, form, BLOCKS.get(form, (0,))[0])


def measured(taps: Taps, x: Tensor) -> dict[tuple[Form, int], float]:
    """Seconds of every form and size of tile for this input, from the choice made for it."""
    _fastest(x, taps)
    found: dict[tuple[Form, int], float] = _memory(taps)["seconds", *_key(x)]
    return found


def _fastest(x: Tensor, taps: Taps) -> tuple[Form, int]:
    memory = _memory(taps)
    key = _key(x)
    if key not in memory:
        ways = [(form, block) for form in FORMS for block in BLOCKS.get(form, (0,))]
        seconds = {way: _seconds(lambda way=way: _run(x, taps, *way)) for way in ways}  # type: ignore[misc]
        memory["seconds", *key] = seconds
        memory[key] = min(seconds, key=lambda way: seconds[way])
    way: tuple[Form, int] = memory[key]
    return way


def _key(x: Tensor) -> tuple[Any, ...]:
    """What the choice of a form depends on."""
    return tuple(x.shape), x.stride(), x.dtype, x.device


def _seconds(work: Callable[[], Tensor], rounds: int = 20) -> float:
    for _ in range(3):
        work()
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(rounds):
        work()
    stop.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(stop)) / rounds / 1e3


def _run(x: Tensor, taps: Taps, form: Form, block: int) -> Tensor:
    if form == "direct":
        return direct(x, taps, block)
    if form == "gather":
        return gather(x, taps, block)
    weight, bias = _placed(taps, x)["dense"]
    top, bottom, left, right = taps.padding
    if form == "torch channels last":
        x = x.contiguous(memory_format=torch.channels_last)
        weight = weight.contiguous(memory_format=torch.channels_last)
    even = top == bottom and left == right
    if not even:
        x = F.pad(x, (left, right, top, bottom))
    padding = (top, left) if even else 0
    out = F.conv2d(x, weight, bias, taps.stride, padding, taps.dilation, taps.channels)
    bounded = taps.low > -math.inf or taps.high < math.inf
    return out.clamp_(taps.low, taps.high) if bounded else out


def direct(x: Tensor, taps: Taps, block: int = 256) -> Tensor:
    """One program for each tile of ``block`` outputs of a channel, over all images."""
    x = x.contiguous()
    out = x.new_empty((x.shape[0], taps.outputs, *taps.size(x.shape[2], x.shape[3])))
    lists = _placed(taps, x)
    total = x.shape[0] * out.shape[2] * out.shape[3]
    _kernels().direct[(taps.outputs * -(-total // block),)](
        x, out, lists["start"], lists["tap"], lists["weight"], lists["bias"], total,
        taps.low, taps.high, *_sizes(x, out, taps), block,
    )  # fmt: skip
    return out


def gather(x: Tensor, taps: Taps, block: int = 64) -> Tensor:
    """One program for each tile of ``block`` outputs of 32 channels."""
    x = x.contiguous()
    out = x.new_empty((x.shape[0], taps.outputs, *taps.size(x.shape[2], x.shape[3])))
    lists = _placed(taps, x)
    matrix, row, tap = lists["columns"]
    groups, area = len(matrix), out.shape[2] * out.shape[3]
    ranges = x.shape[0] * groups
    _kernels().gather[(ranges * -(-area // block),)](
        x, out, matrix, row, tap, lists["bias"], *_sizes(x, out, taps), taps.low, taps.high,
        ranges, groups, matrix.shape[2], block,
    )  # fmt: skip
    return out


def columns(taps: Taps) -> tuple[Tensor, Tensor, Tensor]:
    """What ``gather`` multiplies: A (G, 32, n), and of each column its channel and its tap (G, n).

    G = ceil(outputs / 32); n is the most columns of a range, rounded up to a multiple of 32.
    Columns that pad have weight 0 and channel -1.
    """
    starts = taps.start.tolist()
    groups = -(-taps.outputs // CHANNELS)
    bounds = [starts[min(g * CHANNELS, taps.outputs)] for g in range(groups + 1)]
    most = max(bounds[g + 1] - bounds[g] for g in range(groups))
    n = max(_STEP, -(-most // _STEP) * _STEP)
    matrix = torch.zeros(groups, CHANNELS, n)
    row = torch.full((groups, n), -1, dtype=torch.int32)
    tap = torch.zeros(groups, n, dtype=torch.int32)
    owner = torch.repeat_interleave(torch.arange(taps.outputs), taps.counts().long())
    for g in range(groups):
        part = slice(bounds[g], bounds[g + 1])
        width = bounds[g + 1] - bounds[g]
        row[g, :width] = owner[part].int()
        tap[g, :width] = taps.tap[part]
        matrix[g, owner[part] - g * CHANNELS, torch.arange(width)] = taps.weight[part]
    return matrix, row, tap


def _sizes(x: Tensor, out: Tensor, taps: Taps) -> tuple[int, ...]:
    return (
        taps.outputs, taps.multiplier, x.shape[2], x.shape[3], out.shape[2], out.shape[3],
        taps.kernel[1], *taps.stride, *taps.dilation, taps.padding[0], taps.padding[2],
    )  # fmt: skip


def _memory(taps: Taps) -> dict[Any, Any]:
    memory: dict[Any, Any] = taps.__dict__.setdefault("_cuda", {})
    return memory


def _placed(taps: Taps, x: Tensor) -> dict[str, Any]:
    """The lists on the input's device, in its type."""
    memory, key = _memory(taps), ("lists", x.device, x.dtype)
    if key not in memory:
        bias = torch.zeros(taps.outputs) if taps.bias is None else taps.bias
        matrix, row, tap = columns(taps)
        memory[key] = {
            "start": taps.start.to(x.device),
            "tap": taps.tap.to(x.device),
            "weight": taps.weight.to(x.device),
            "bias": bias.to(x.device),
            "columns": (matrix.to(x), row.to(x.device), tap.to(x.device)),
            "dense": (taps.dense().to(x), bias.to(x)),
        }
    found: dict[str, Any] = memory[key]
    return found
