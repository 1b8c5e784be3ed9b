# mypy: disable-error-code="no-untyped-def"
"""The candidate that lost: tap lists walked by numba (``benchmarks.depthwise`` measures it).

A plane is brought into a padded scratch (one per phase of the stride) and is then one long row:
with the padding between rows, a tap is one constant distance, and four taps at a time are added
up over the whole plane. The columns between rows hold nonsense and are left out of the copy back.
"""

from __future__ import annotations

import numba
import numpy as np


@numba.njit(fastmath={"contract", "nsz", "arcp"}, boundscheck=False)
def _plane(image, scratch, total, start, stop, tap, weight, bias, place, out, plan, low, high):
    """One output plane into ``out`` (out_height, out_width)."""
    pitch = plan[4]
    out_height, out_width = out.shape
    length = (out_height - 1) * pitch + out_width
    for i in range(length):
        total[i] = bias
    at = start
    while at < stop:
        a, wa = place[tap[at]], weight[at]
        if at + 3 < stop:
            b, wb = place[tap[at + 1]], weight[at + 1]
            c, wc = place[tap[at + 2]], weight[at + 2]
            d, wd = place[tap[at + 3]], weight[at + 3]
            for i in range(length):
                total[i] += (
                    wa * scratch[a + i]
                    + wb * scratch[b + i]
                    + wc * scratch[c + i]
                    + wd * scratch[d + i]
                )
            at += 4
        elif at + 1 < stop:
            b, wb = place[tap[at + 1]], weight[at + 1]
            for i in range(length):
                total[i] += wa * scratch[a + i] + wb * scratch[b + i]
            at += 2
        else:
            for i in range(length):
                total[i] += wa * scratch[a + i]
            at += 1
    for y in range(out_height):
        for x in range(out_width):
            value = total[y * pitch + x]
            # written so that NaN stays NaN
            if value < low:
                value = low
            if value > high:
                value = high
            out[y, x] = value


@numba.njit(boundscheck=False)
def _bring(image, scratch, plan):
    """Phase planes of a padded image; what lies outside it stays zero."""
    stride_h, stride_w, top, left, pitch, size = plan
    height, width = image.shape
    for y in range(height):
        row, phase_h = (y + top) // stride_h, (y + top) % stride_h
        for phase_w in range(stride_w):
            first = (phase_w - left) % stride_w
            base = (phase_h * stride_w + phase_w) * size + row * pitch
            column = (first + left) // stride_w
            for x in range((width - first + stride_w - 1) // stride_w):
                if column + x < pitch and row < size // pitch:
                    scratch[base + column + x] = image[y, first + x * stride_w]


@numba.njit
def _all(images, bias, start, tap, weight, out, multiplier, place, plan, low, high):
    count, channels = images.shape[:2]
    stride_h, stride_w, _, _, pitch, size = plan
    scratch = np.zeros(stride_h * stride_w * size + pitch * 8, np.float32)
    total = np.empty(out.shape[2] * pitch + pitch, np.float32)
    for i in range(count * channels):
        image, channel = i // channels, i % channels
        _bring(images[image, channel], scratch, plan)
        for o in range(channel * multiplier, (channel + 1) * multiplier):
            _plane(
                images[image, channel], scratch, total, start[o], start[o + 1], tap, weight,
                bias[o], place, out[image, o], plan, low, high,
            )  # fmt: skip


def depthwise_numba(x, taps):
    """``kernels.depthwise.depthwise`` on one thread."""
    out = x.new_empty((x.shape[0], taps.outputs, *taps.size(*x.shape[2:])))
    kernel, stride, dilation = taps.kernel, taps.stride, taps.dilation
    rows, columns = np.divmod(np.arange(kernel[0] * kernel[1]), kernel[1])
    rows, columns = rows * dilation[0], columns * dilation[1]
    pitch = out.shape[3] + (kernel[1] - 1) * dilation[1] // stride[1]
    size = pitch * (out.shape[2] + (kernel[0] - 1) * dilation[0] // stride[0])
    phase = rows % stride[0] * stride[1] + columns % stride[1]
    place = phase * size + rows // stride[0] * pitch + columns // stride[1]
    plan = (stride[0], stride[1], taps.padding[0], taps.padding[2], pitch, size)
    bias = np.zeros(taps.outputs, np.float32) if taps.bias is None else taps.bias.numpy()
    _all(
        x.numpy(), bias, taps.start.numpy(), taps.tap.numpy(), taps.weight.numpy(), out.numpy(),
        taps.multiplier, place, plan, np.float32(taps.low), np.float32(taps.high),
    )  # fmt: skip
    return out
