"""The searches' inner loops, compiled by numba; bit for bit the random weights of ``laws``.

Everything here has a plain torch counterpart (``laws``, ``search_torch``): tests hold the two
together, and the torch one is used on GPUs and where numba is missing. Kernels release the
interpreter lock, so that ``search`` can run one per core on slices of the pools. No fused
multiply-adds are allowed (numba's default), so that a weight has the same bits everywhere.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit

from secateur.lottery.laws import (
    CENTRE_BOTTOM,
    CENTRE_TOP,
    EXP2_COEFFICIENTS,
    LOG2_E,
    UPPER_SHARE,
)
from secateur.lottery.philox import LOW32, MULTIPLIERS, ROUNDS, WEYL

_U = np.uint64
_M0, _M1 = _U(MULTIPLIERS[0]), _U(MULTIPLIERS[1])
_W0, _W1, _LOW = _U(WEYL[0]), _U(WEYL[1]), _U(LOW32)
_S32, _S20, _S12, _ONE, _TWO, _FOUR = _U(32), _U(20), _U(12), _U(1), _U(2), _U(4)
_EXP2 = np.array(EXP2_COEFFICIENTS)
_TOP, _BOTTOM = np.array(CENTRE_TOP), np.array(CENTRE_BOTTOM)
_SHIFT, _RATE = 1 - UPPER_SHARE, LOG2_E
_ROUNDS = ROUNDS


@njit(cache=True)
def _word_pair(seed: Any, tag: Any, pool: Any, neuron: Any, column: Any) -> Any:
    """The two 32-bit words of one address; see ``philox.uniforms``."""
    c0, c1, c2, c3 = neuron, pool, column >> _ONE, tag
    k0, k1 = seed & _LOW, seed >> _S32
    for _ in range(_ROUNDS):
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = (p1 >> _S32) ^ c1 ^ k0, p1 & _LOW, (p0 >> _S32) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    if column & _ONE:
        return c2, c3
    return c0, c1


@njit(cache=True)
def _magnitude(code: Any, span: Any, unit: Any) -> Any:
    """|w| / scale; the same arithmetic, in the same order, as ``Law.magnitude``."""
    if code == 0:
        power = (unit - _SHIFT) * (span * _RATE)
        whole = math.floor(power + 0.5)
        part = power - whole
        result = _EXP2[0]
        for i in range(1, _EXP2.size):
            result = result * part + _EXP2[i]
        return math.ldexp(result, int(whole))
    if code == 1:
        return unit
    centred = unit * 0.47575
    square = centred * centred
    top, bottom = _TOP[0], _BOTTOM[0]
    for i in range(1, _TOP.size):
        top = top * square + _TOP[i]
    for i in range(1, _BOTTOM.size):
        bottom = bottom * square + _BOTTOM[i]
    return top * centred / bottom


@njit(cache=True)
def _weight(code: Any, scale: Any, span: Any, high: Any, low: Any) -> Any:
    unit = (np.float64((high << _S20) + (low >> _S12)) + 0.5) * 2.0**-52
    size = np.float32(scale * _magnitude(code, span, unit))
    return -size if low & _ONE else size


@njit(cache=True)
def values(law: Any, seed: Any, layer: Any, role: Any, addresses: Any, out: Any) -> None:
    """Fill ``out`` (float32) with the weights at ``addresses``: pools, neurons, columns (uint64).

    ``law``: code, scale, span.
    """
    code, scale, span = law
    pool, neuron, column = addresses
    tag = _U(layer) * _FOUR + _U(role)
    for i in range(out.size):
        high, low = _word_pair(_U(seed), tag, pool[i], neuron[i], column[i])
        out[i] = _weight(code, scale, span, high, low)


@njit(cache=True)
def _pool_in_weights(
    law: Any,
    seed: Any,
    layer: Any,
    sign: Any,
    pool: Any,
    column: Any,
    size: Any,
    neurons: Any,
    a: Any,
) -> Any:
    """Collect the neurons of a pool whose in-weight has ``sign``; returns how many."""
    code, scale, span = law
    tag = _U(layer) * _FOUR
    count = 0
    for m in range(size):
        high, low = _word_pair(_U(seed), tag, pool, _U(m), column)
        if (low & _ONE == 0) == (sign > 0):
            neurons[count] = m
            a[count] = abs(_weight(code, scale, span, high, low))
            count += 1
            if count == neurons.size:
                break
    return count


@njit(cache=True)
def _interval(product: Any, edges: Any, inverse_log: Any) -> Any:
    """i with edges[i + 1] <= product <= edges[i], or -1."""
    bits = edges.size - 1
    if product > edges[0] or product < edges[bits]:
        return -1
    # The logarithm may be off by one interval at an end; the ends themselves decide.
    i = min(max(int(math.log(edges[0] / product) * inverse_log), 0), bits - 1)
    if product > edges[i]:
        i -= 1
    elif product < edges[i + 1]:
        i += 1
    return i if i < bits else -1


@njit(cache=True, nogil=True)
def _candidates(
    law: Any,
    seed: Any,
    out_tag: Any,
    pool: Any,
    column: Any,
    positive: Any,
    neurons: Any,
    a: Any,
    edges: Any,
    found: Any,
    value: Any,
    owner: Any,
) -> None:
    """The first products of each interval: value, owner (k, depth), found (k,) of them."""
    code, scale, span = law
    bits, depth = value.shape
    inverse_log = 1.0 / math.log(edges[0] / edges[1])
    missing = bits
    for c in range(neurons.size):
        high, low = _word_pair(_U(seed), out_tag, _U(pool), _U(neurons[c]), _U(column))
        if (low & _ONE == 0) != positive:
            continue
        product = a[c] * np.float64(abs(_weight(code, scale, span, high, low)))
        i = _interval(product, edges, inverse_log)
        if i < 0 or found[i] == depth:
            continue
        value[i, found[i]] = product
        owner[i, found[i]] = neurons[c]
        found[i] += 1
        if found[i] == depth:
            missing -= 1
            if missing == 0:
                return


@njit(cache=True, nogil=True)
def bitwise(
    law: Any,
    seed: Any,
    layer: Any,
    sign: Any,
    pools: Any,
    columns: Any,
    first_out: Any,
    sizes: Any,
    demand: Any,
    edges: Any,
    depth: Any,
    picks: Any,
    residual: Any,
    empty: Any,
) -> None:
    """Greedy decomposition of every demand from its pool (see ``search.bitwise``).

    Shapes: pools, columns, first_out, sizes, empty (P,); demand, residual (P, O);
    edges (k + 1,) descending; picks (P, O, k) int32, -1 where no neuron is taken.
    """
    bits = edges.size - 1
    out_tag = _U(layer) * _FOUR + _ONE
    for p in range(pools.size):
        outputs = demand.shape[1]
        neurons = np.empty(sizes[p], np.int64)
        a = np.empty(sizes[p], np.float64)
        usable = _pool_in_weights(
            law, seed, layer, sign, _U(pools[p]), _U(columns[p]), sizes[p], neurons, a
        )
        for o in range(outputs):
            want = abs(demand[p, o])
            residual[p, o] = want
            for i in range(bits):
                picks[p, o, i] = -1
            if want == 0.0:
                continue
            found = np.zeros(bits, np.int64)
            value = np.empty((bits, depth), np.float64)
            owner = np.empty((bits, depth), np.int64)
            _candidates(
                law, seed, out_tag, pools[p], first_out[p] + o, demand[p, o] > 0,
                neurons[:usable], a, edges, found, value, owner,
            )  # fmt: skip
            remainder = want
            chosen = np.full(bits, -1, np.int64)
            for i in range(bits):
                if found[i] == 0:
                    if remainder > edges[i]:
                        empty[p] += 1
                elif remainder >= value[i, 0]:
                    chosen[i] = 0
                    remainder -= value[i, 0]
            if depth > 1:
                remainder = _refine(remainder, bits, found, value, chosen)
            residual[p, o] = abs(remainder)
            for i in range(bits):
                if chosen[i] >= 0:
                    picks[p, o, i] = owner[i, chosen[i]]


@njit(cache=True, nogil=True)
def first_come(
    law: Any,
    seed: Any,
    layer: Any,
    sign: Any,
    pools: Any,
    columns: Any,
    first_out: Any,
    sizes: Any,
    demand: Any,
    edges: Any,
    picks: Any,
    residual: Any,
    empty: Any,
) -> None:
    """Greedy decomposition from pools whose neurons serve one slot each (see ``exclusive``).

    Shapes as in ``bitwise``. An out-weight is drawn only where a slot of its output is open.
    """
    code, scale, span = law
    bits, outputs = edges.size - 1, demand.shape[1]
    in_tag, out_tag = _U(layer) * _FOUR, _U(layer) * _FOUR + _ONE
    inverse_log = 1.0 / math.log(edges[0] / edges[1])
    value = np.empty((outputs, bits), np.float64)
    unfilled = np.empty(outputs, np.int64)
    for p in range(pools.size):
        left, usable = 0, 0
        for o in range(outputs):
            unfilled[o] = bits if demand[p, o] != 0.0 else 0
            left += unfilled[o]
            for i in range(bits):
                picks[p, o, i], value[o, i] = -1, math.inf
        for m in range(sizes[p]):
            if left == 0:
                break
            high, low = _word_pair(_U(seed), in_tag, _U(pools[p]), _U(m), _U(columns[p]))
            if (low & _ONE == 0) != (sign > 0):
                continue
            a = np.float64(abs(_weight(code, scale, span, high, low)))
            for step in range(outputs):
                o = (usable + step) % outputs
                if unfilled[o] == 0:
                    continue
                out = _U(first_out[p] + o)
                high, low = _word_pair(_U(seed), out_tag, _U(pools[p]), _U(m), out)
                if (low & _ONE == 0) != (demand[p, o] > 0):
                    continue
                product = a * np.float64(abs(_weight(code, scale, span, high, low)))
                i = _interval(product, edges, inverse_log)
                if i >= 0 and picks[p, o, i] < 0:
                    picks[p, o, i], value[o, i] = m, product
                    unfilled[o] -= 1
                    left -= 1
                    break
            usable += 1
        for o in range(outputs):
            remainder = abs(demand[p, o])
            for i in range(bits):
                if remainder > 0 and remainder >= value[o, i]:
                    remainder -= value[o, i]
                else:
                    empty[p] += remainder > edges[i] and picks[p, o, i] < 0
                    picks[p, o, i] = -1
            residual[p, o] = remainder


@njit(cache=True)
def _refine(remainder: Any, bits: Any, found: Any, value: Any, chosen: Any) -> Any:
    """Swap, add or drop one candidate per bit while that shrinks the remainder."""
    for _ in range(2):
        for i in range(bits - 1, -1, -1):
            current = value[i, chosen[i]] if chosen[i] >= 0 else 0.0
            best, best_left = chosen[i], remainder
            if abs(remainder + current) < abs(best_left):
                best, best_left = -1, remainder + current
            for c in range(found[i]):
                left = remainder + current - value[i, c]
                if abs(left) < abs(best_left):
                    best, best_left = c, left
            chosen[i] = best
            remainder = best_left
    return remainder


@njit(cache=True)
def _sorted_sums(
    parts: Any, first: Any, last: Any, sums: Any, masks: Any, swap: Any, other: Any
) -> Any:
    """All subset sums of parts[first:last], ascending, with their masks; returns their number."""
    sums[0], masks[0] = 0.0, _U(0)
    count = 1
    for index in range(first, last):
        part, bit = parts[index], _ONE << _U(index)
        i = j = 0
        for n in range(2 * count):
            if j == count or (i < count and sums[i] <= sums[j] + part):
                swap[n], other[n] = sums[i], masks[i]
                i += 1
            else:
                swap[n], other[n] = sums[j] + part, masks[j] | bit
                j += 1
        count *= 2
        sums[:count] = swap[:count]
        masks[:count] = other[:count]
    return count


@njit(cache=True)
def best_subset(target: Any, parts: Any, n: Any, work: Any, bits: Any) -> Any:
    """The subset of parts[:n] whose sum is nearest ``target`` (meet in the middle).

    ``work`` (3, 2^ceil(n/2)) float64 and ``bits`` (3, ...) uint64 are scratch. Returns the mask
    and the signed rest ``target - sum``.
    """
    half = n // 2
    left = _sorted_sums(parts, 0, half, work[0], bits[0], work[2], bits[2])
    right = _sorted_sums(parts, half, n, work[1], bits[1], work[2], bits[2])
    best, mask = math.inf, _U(0)
    j = right - 1
    for i in range(left):
        # Walk down until the pair is no longer too large; its neighbour above was tried before.
        while True:
            rest = target - (work[0, i] + work[1, j])
            if abs(rest) < abs(best):
                best, mask = rest, bits[0, i] | bits[1, j]
            if rest >= 0 or j == 0:
                break
            j -= 1
    return mask, best


@njit(cache=True, nogil=True)
def subsets(
    law: Any,
    seed: Any,
    layer: Any,
    sign: Any,
    pools: Any,
    columns: Any,
    sizes: Any,
    carried: Any,
    demand: Any,
    n: Any,
    start: Any,
    tolerance: Any,
    neurons: Any,
    masks: Any,
    residual: Any,
) -> None:
    """Best subset sum for every demand (see ``search.subsets``).

    Shapes: pools, columns, sizes, carried (P,); demand, residual (P, O); neurons (P, n) int32,
    -1 padded; masks (P, O) uint64. Where ``carried``, every in-weight is 1. Tries ``start`` parts
    first and more only while above ``tolerance``.
    """
    code, scale, span = law
    out_tag = _U(layer) * _FOUR + _ONE
    for p in range(pools.size):
        indices = np.empty(n, np.int64)
        a = np.empty(n, np.float64)
        parts = np.empty(n, np.float64)
        work = np.empty((3, 1 << ((n + 1) // 2)), np.float64)
        bits = np.empty((3, 1 << ((n + 1) // 2)), np.uint64)
        if carried[p]:
            usable = min(n, sizes[p])
            for c in range(usable):
                indices[c], a[c] = c, 1.0
        else:
            usable = _pool_in_weights(
                law, seed, layer, sign, _U(pools[p]), _U(columns[p]), sizes[p], indices, a
            )
        for c in range(n):
            neurons[p, c] = indices[c] if c < usable else -1
        for o in range(demand.shape[1]):
            masks[p, o] = _U(0)
            residual[p, o] = abs(demand[p, o])
            if demand[p, o] == 0.0:
                continue
            for c in range(usable):
                high, low = _word_pair(_U(seed), out_tag, _U(pools[p]), _U(indices[c]), _U(o))
                parts[c] = a[c] * np.float64(_weight(code, scale, span, high, low))
            tried = min(start, usable)
            while True:
                mask, rest = best_subset(demand[p, o], parts, tried, work, bits)
                if abs(rest) < residual[p, o]:
                    masks[p, o], residual[p, o] = mask, abs(rest)
                if residual[p, o] <= tolerance or tried == usable:
                    break
                tried = min(tried + 2, usable)


@njit(cache=True, nogil=True)
def single(
    law: Any,
    seed: Any,
    layer: Any,
    sign: Any,
    pools: Any,
    columns: Any,
    first_out: Any,
    sizes: Any,
    demand: Any,
    tolerance: Any,
    both: Any,
    picks: Any,
    residual: Any,
) -> None:
    """The first neuron whose one product meets the demand (see ``search.single``).

    With ``both``, each factor must be within ``tolerance / 2`` (in units of the scale) of
    sqrt|demand|, Malach's requirement. picks (P, O) int64, -1 where none did.
    """
    code, scale, span = law
    in_tag, out_tag = _U(layer) * _FOUR, _U(layer) * _FOUR + _ONE
    for p in range(pools.size):
        for o in range(demand.shape[1]):
            want = abs(demand[p, o])
            picks[p, o], residual[p, o] = -1, want
            if want == 0.0:
                continue
            root = math.sqrt(want)
            for m in range(sizes[p]):
                high, low = _word_pair(_U(seed), in_tag, _U(pools[p]), _U(m), _U(columns[p]))
                if (low & _ONE == 0) != (sign > 0):
                    continue
                a = np.float64(abs(_weight(code, scale, span, high, low)))
                if both and abs(a - root) > 0.5 * tolerance / scale:
                    continue
                high, low = _word_pair(_U(seed), out_tag, _U(pools[p]), _U(m), _U(first_out[p] + o))
                if (low & _ONE == 0) != (demand[p, o] > 0):
                    continue
                b = np.float64(abs(_weight(code, scale, span, high, low)))
                if both and abs(b - root) > 0.5 * tolerance / scale:
                    continue
                rest = abs(want - a * b)
                if rest <= tolerance:
                    picks[p, o], residual[p, o] = m, rest
                    break
