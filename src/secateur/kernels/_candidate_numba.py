# mypy: disable-error-code="no-untyped-def"
"""The numba form of ``kernels.candidate_mix``: one pass over the groups, nothing kept for backward.

A chunk of groups lives in a small buffer (in cache) while noise, logits, softmax and mixture are
made of it. Logarithm and exponential are polynomials on the bits of float32 numbers, which the
compiler turns into vector instructions; their relative error is below 3e-7, less than the noise's
own resolution of 24 bits.
"""

from __future__ import annotations

import numba
import numpy as np

CHUNK = 512  # groups in cache at a time

_LN2 = np.float32(0.6931471805599453)
_LOG2E = np.float32(1.4426950408889634)


@numba.njit(inline="always")
def _hash(counter, key_low, key_high):
    """Two rounds of a 32-bit finaliser over a counter and a 64-bit key."""
    # numba widens products of uint32 to 64 bits, so each is cut back.
    x = np.uint32(counter ^ key_low)
    x = np.uint32((x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D))
    x = np.uint32((x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B))
    x = np.uint32((x ^ (x >> np.uint32(16))) + key_high)
    x = np.uint32((x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D))
    x = np.uint32((x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B))
    return np.uint32(x ^ (x >> np.uint32(16)))


@numba.njit(fastmath=True)
def _log(values, as_bits, count):
    """Natural logarithm in place of the first ``count`` positive normal float32 ``values``."""
    for i in range(count):
        bits = as_bits[i]
        # Mantissa brought to [sqrt(1/2), sqrt(2)), so that 1 is in the middle.
        exponent = (bits - np.int32(0x3F3504F3)) >> np.int32(23)
        as_bits[i] = bits - (exponent << np.int32(23))
        z = (values[i] - np.float32(1)) / (values[i] + np.float32(1))
        z2 = z * z
        series = (
            np.float32(2)
            * z
            * (
                np.float32(1)
                + z2
                * (
                    np.float32(1 / 3)
                    + z2 * (np.float32(1 / 5) + z2 * (np.float32(1 / 7) + z2 * np.float32(1 / 9)))
                )
            )
        )
        values[i] = series + np.float32(exponent) * _LN2


@numba.njit(fastmath=True)
def _exp(values, as_bits, scratch, count):
    """exp in place of the first ``count`` values, all <= 0; below -87 it is 0."""
    for i in range(count):
        x = max(values[i], np.float32(-87.0)) * _LOG2E
        whole = np.int32(x - np.float32(0.5))
        f = (x - np.float32(whole)) * _LN2
        scratch[i] = np.float32(1) + f * (
            np.float32(1)
            + f
            * (
                np.float32(1 / 2)
                + f
                * (
                    np.float32(1 / 6)
                    + f * (np.float32(1 / 24) + f * (np.float32(1 / 120) + f * np.float32(1 / 720)))
                )
            )
        )
        as_bits[i] = (whole + np.int32(127)) << np.int32(23)
    for i in range(count):
        values[i] = scratch[i] * values[i]


@numba.njit(fastmath=True)
def _softmax(
    logits, first, groups, patterns, key_low, key_high, noisy, kappa, tau, y, bits, scratch
):
    """Probabilities of ``groups`` groups from ``first`` on, into ``y`` (groups x patterns, flat)."""
    count = groups * patterns
    start = first * patterns
    if noisy:
        for i in range(count):
            u = _hash(np.uint32(start + i), key_low, key_high) >> np.uint32(8)
            y[i] = (np.float32(u) + np.float32(0.5)) * np.float32(1 / 16777216)
        _log(y, bits, count)
        for i in range(count):
            y[i] = max(-y[i], np.float32(2.9802322e-08))
        _log(y, bits, count)
        for i in range(count):
            y[i] = (kappa * logits[start + i] - y[i]) / tau
    else:
        for i in range(count):
            y[i] = kappa * logits[start + i] / tau
    for g in range(groups):
        most = y[g * patterns]
        for k in range(1, patterns):
            most = max(most, y[g * patterns + k])
        for k in range(patterns):
            y[g * patterns + k] -= most
    _exp(y, bits, scratch, count)
    for g in range(groups):
        total = np.float32(0)
        for k in range(patterns):
            total += y[g * patterns + k]
        share = np.float32(1) / total
        for k in range(patterns):
            y[g * patterns + k] *= share


@numba.njit(inline="always")
def _number(index, g, k):
    """Row of the table that slot ``k`` of group ``g`` stands for; without an ``index`` it is k."""
    if index is None:
        return k
    return index[g, k]


@numba.njit(inline="always")
def _mixture(y, at, table, index, g, patterns, m):
    """``sum_k y[at + k] table[number of k, m]`` of group ``g``."""
    total = np.float32(0)
    for k in range(patterns):
        total += y[at + k] * table[_number(index, g, k), m]
    return total


@numba.njit(parallel=True, fastmath=True, cache=True)
def masked(logits, table, index, key_low, key_high, noisy, kappa, tau, weight, out):
    """``out[g] = weight[g] * sum_k y[g, k] table[k]``; ``logits`` flat (G * K), the others (G, M).

    With an ``index`` (G, K) the patterns of a group are ``table[index[g]]``.
    """
    groups, width = out.shape
    patterns = logits.size // groups
    for chunk in numba.prange((groups + CHUNK - 1) // CHUNK):
        first = chunk * CHUNK
        count = min(CHUNK, groups - first)
        y = np.empty(CHUNK * patterns, np.float32)
        scratch = np.empty(CHUNK * patterns, np.float32)
        _softmax(
            logits, first, count, patterns, key_low, key_high, noisy, kappa, tau,
            y, y.view(np.int32), scratch,
        )  # fmt: skip
        for g in range(count):
            for m in range(width):
                total = _mixture(y, g * patterns, table, index, first + g, patterns, m)
                out[first + g, m] = weight[first + g, m] * total


@numba.njit(parallel=True, fastmath=True, cache=True)
def masked_backward(
    logits, table, index, key_low, key_high, noisy, kappa, tau, weight, grad, square, d_logits, out
):
    """``CandidateMix.backward``: probabilities made again, ``out`` and ``d_logits`` filled."""
    groups, width = grad.shape
    patterns = logits.size // groups
    scale = kappa / tau
    for chunk in numba.prange((groups + CHUNK - 1) // CHUNK):
        first = chunk * CHUNK
        count = min(CHUNK, groups - first)
        y = np.empty(CHUNK * patterns, np.float32)
        scratch = np.empty(CHUNK * patterns, np.float32)
        row = np.empty(width, np.float32)
        _softmax(
            logits, first, count, patterns, key_low, key_high, noisy, kappa, tau,
            y, y.view(np.int32), scratch,
        )  # fmt: skip
        for g in range(count):
            for m in range(width):
                total = _mixture(y, g * patterns, table, index, first + g, patterns, m)
                w = weight[first + g, m]
                out[first + g, m] = w * total
                row[m] = w * (grad[first + g, m] + np.float32(2) * square * w * total)
            mean = np.float32(0)
            for k in range(patterns):
                u, number = np.float32(0), _number(index, first + g, k)
                for m in range(width):
                    u += row[m] * table[number, m]
                scratch[k] = u
                mean += u * y[g * patterns + k]
            for k in range(patterns):
                d_logits[(first + g) * patterns + k] = (
                    scale * y[g * patterns + k] * (scratch[k] - mean)
                )
