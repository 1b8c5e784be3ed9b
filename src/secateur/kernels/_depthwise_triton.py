# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""The kernels of ``depthwise_triton``; sums are kept in float32 whatever the input's type."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def direct(
    x, out, start, tap, weight, bias, total, low, high,
    OUTPUTS: tl.constexpr, MULTIPLIER: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    OUT_HEIGHT: tl.constexpr, OUT_WIDTH: tl.constexpr, KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr, TOP: tl.constexpr, LEFT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A tile of BLOCK outputs of a channel, counted over all ``total`` of the batch.

    Sizes are constants, so that no division is left, and small planes of several images share a tile.
    """
    # One axis: the second has room for 65,535 programs only.
    channel = tl.program_id(0) % OUTPUTS
    at = tl.program_id(0) // OUTPUTS * BLOCK + tl.arange(0, BLOCK)
    inside = at < total
    image = (at // (OUT_HEIGHT * OUT_WIDTH)).to(tl.int64)
    place = at % (OUT_HEIGHT * OUT_WIDTH)
    y = place // OUT_WIDTH * STRIDE_H - TOP
    z = place % OUT_WIDTH * STRIDE_W - LEFT
    plane = image * (OUTPUTS // MULTIPLIER) + channel // MULTIPLIER
    source = x + plane * (HEIGHT * WIDTH) + y * WIDTH + z
    sums = tl.zeros((BLOCK,), tl.float32) + tl.load(bias + channel)
    first = tl.load(start + channel)
    last = tl.load(start + channel + 1)
    for t in range(first, last):
        which = tl.load(tap + t)
        down = which // KERNEL_W * DILATION_H
        right = which % KERNEL_W * DILATION_W
        row, column = y + down, z + right
        seen = inside & (row >= 0) & (row < HEIGHT) & (column >= 0) & (column < WIDTH)
        value = tl.load(source + down * WIDTH + right, mask=seen, other=0.0)
        sums += tl.load(weight + t) * value.to(tl.float32)
    # comparisons, so that NaN stays
    sums = tl.where(sums < low, low, sums)
    sums = tl.where(sums > high, high, sums)
    target = (image * OUTPUTS + channel) * (OUT_HEIGHT * OUT_WIDTH) + place
    tl.store(out + target, sums, mask=inside)


@triton.jit
def gather(
    x, out, matrix, owner, tap, bias,
    outputs, multiplier, height, width, out_height, out_width, kernel_w,
    stride_h, stride_w, dilation_h, dilation_w, top, left, low, high,
    ranges, groups, columns,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A tile of BLOCK outputs of 32 channels of one image; ``ranges`` = images * groups."""
    image = (tl.program_id(0) % ranges // groups).to(tl.int64)
    group = tl.program_id(0) % ranges % groups
    at = tl.program_id(0) // ranges * BLOCK + tl.arange(0, BLOCK)
    inside = at < out_height * out_width
    y = at // out_width * stride_h - top
    z = at % out_width * stride_w - left
    channel = group * 32 + tl.arange(0, 32)
    known = channel < outputs
    first = tl.load(bias + channel, mask=known, other=0.0)
    total = tl.zeros((32, BLOCK), tl.float32) + first[:, None]
    planes = outputs // multiplier
    for step in range(0, columns, 32):
        number = group * columns + step + tl.arange(0, 32)
        mine = tl.load(owner + number)
        place = tl.load(tap + number)
        row = y[None, :] + (place // kernel_w * dilation_h)[:, None]
        column = z[None, :] + (place % kernel_w * dilation_w)[:, None]
        seen = (mine >= 0)[:, None] & inside[None, :] & (row >= 0) & (row < height)
        seen = seen & (column >= 0) & (column < width)
        plane = image * planes + tl.maximum(mine, 0) // multiplier
        value = tl.load(
            x + plane[:, None] * height * width + row * width + column, mask=seen, other=0.0
        )
        line = (group * 32 + tl.arange(0, 32)) * columns + step
        left_hand = tl.load(matrix + line[:, None] + tl.arange(0, 32)[None, :])
        total += tl.dot(left_hand, value, input_precision="ieee")
    total = tl.where(total < low, low, total)
    total = tl.where(total > high, high, total)
    target = (image * outputs + channel)[:, None] * out_height * out_width + at[None, :]
    tl.store(out + target, total, mask=known[:, None] & inside[None, :])
