"""The torch engine of the searches: whole tiles of pools at once, on a GPU or without numba.

Same arguments and results as ``search``; chunks keep the working set near ``TILE`` elements.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from secateur.lottery.philox import ROLE_IN, ROLE_OUT
from secateur.lottery.search import Floats, Ints, Picks, Pools, Subsets

TILE = 4_000_000


def _device(engine: str) -> torch.device:
    return torch.device("cuda" if engine == "cuda" else "cpu")


def _chunks(count: int, each: int) -> Iterator[slice]:
    step = max(1, TILE // max(each, 1))
    for begin in range(0, count, step):
        yield slice(begin, min(begin + step, count))


class _Tile:
    """The random weights of a few pools: a (P, M), b (P, M, O); usable (P, M)."""

    def __init__(
        self, pools: Pools, part: slice, sign: int, outputs: int, device: torch.device
    ) -> None:
        def column(array: NDArray[Any]) -> Tensor:
            return torch.from_numpy(array[part].astype(np.int64)).to(device)[:, None]

        self.pools, self.sign = pools, sign
        self.ids, self.columns, self.first = map(
            column, (pools.ids, pools.columns, pools.first_out)
        )
        self.sizes, self.carried = column(pools.sizes), column(pools.carried).bool()
        self.outputs = torch.arange(outputs, device=device)

    def neurons_in(self, begin: int, end: int) -> tuple[Tensor, Tensor, Tensor]:
        """Neuron numbers (M,), signed-off in-weights |a| (P, M) and which are usable (P, M)."""
        neurons = torch.arange(begin, end, device=self.ids.device)
        a = self.pools.law.values(
            self.pools.seed, self.pools.layer, ROLE_IN, self.ids, neurons, self.columns
        ).double()
        a = torch.where(self.carried, float(self.sign), a)
        return neurons, a.abs(), (a * self.sign > 0) & (neurons < self.sizes)

    def out_weights(self, neurons: Tensor) -> Tensor:
        """b (P, M, O) of the given neurons, (M,) or (P, M)."""
        column = self.first[:, :, None] + self.outputs
        rows = neurons.expand(len(self.ids), -1)[:, :, None]
        return self.pools.law.values(
            self.pools.seed, self.pools.layer, ROLE_OUT, self.ids[:, :, None], rows, column
        ).double()


def bitwise(
    pools: Pools, sign: int, demand: Floats, edges: Floats, depth: int, engine: str
) -> Picks:
    """See ``search.bitwise``."""
    device, bits = _device(engine), len(edges) - 1
    size = int(pools.sizes.max(initial=1))
    picks = np.empty((*demand.shape, bits), np.int64)
    residual, empty = np.empty(demand.shape), np.zeros(len(demand), np.int64)
    ends = torch.from_numpy(np.ascontiguousarray(edges)).to(device)
    for part in _chunks(len(demand), size * demand.shape[1]):
        tile = _Tile(pools, part, sign, demand.shape[1], device)
        want = torch.from_numpy(np.ascontiguousarray(demand[part])).to(device)
        value, owner, valid = _candidates(tile, size, want, ends, depth)
        chosen, rest, missing = _greedy(want.abs(), value, valid, ends)
        if depth > 1:
            chosen, rest = _refine(rest, chosen, value, valid)
        neuron = owner.gather(3, chosen.clamp(min=0)[..., None])[..., 0]
        picks[part] = torch.where(chosen >= 0, neuron, -1).cpu().numpy()
        residual[part], empty[part] = rest.abs().cpu().numpy(), missing.cpu().numpy()
    return Picks(picks, residual, empty)


def _candidates(
    tile: _Tile, size: int, want: Tensor, ends: Tensor, depth: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The first ``depth`` fitting neurons of every interval: value, owner, valid (P, O, k, depth)."""
    bits = len(ends) - 1
    _, a, usable = tile.neurons_in(0, size)
    neurons = torch.arange(size, device=want.device)
    b = tile.out_weights(neurons)
    product = (a[:, :, None] * b.abs()).transpose(1, 2).contiguous()
    fits = usable[:, None, :] & ((b > 0).transpose(1, 2) == (want > 0)[:, :, None])
    fits &= (want != 0)[:, :, None] & (product <= ends[0]) & (product >= ends[-1])
    # Interval of each product; an inner end belongs to the coarser interval, as in ``compiled``.
    interval = (torch.searchsorted(-ends, -product, right=False) - 1).clamp(0, bits - 1)
    key = torch.where(fits, interval * size + neurons, bits * size)
    key, _ = key.sort(dim=2)
    starts = (torch.arange(bits, device=key.device) * size).expand(*key.shape[:2], -1).contiguous()
    begin = torch.searchsorted(key.contiguous(), starts)
    place = begin[..., None] + torch.arange(depth, device=key.device)
    found = key.gather(2, place.clamp(max=size - 1).flatten(2)).view_as(place)
    valid = (place < size) & (found // size == torch.arange(bits, device=key.device)[:, None])
    owner = found % size
    value = product.gather(2, owner.flatten(2)).view_as(place)
    return value, owner, valid


def _greedy(
    want: Tensor, value: Tensor, valid: Tensor, ends: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    rest = want.clone()
    chosen = torch.full(value.shape[:3], -1, dtype=torch.int64, device=value.device)
    missing = torch.zeros_like(want, dtype=torch.int64)
    for i in range(value.shape[2]):
        first = value[:, :, i, 0]
        take = valid[:, :, i, 0] & (rest >= first)
        missing += ~valid[:, :, i, 0] & (rest > ends[i])
        chosen[:, :, i] = torch.where(take, 0, -1)
        rest = torch.where(take, rest - first, rest)
    return chosen, rest, missing.sum(dim=1)


def _refine(rest: Tensor, chosen: Tensor, value: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    for _ in range(2):
        for i in reversed(range(value.shape[2])):
            current = torch.where(
                chosen[:, :, i] >= 0,
                value[:, :, i].gather(2, chosen[:, :, i, None].clamp(min=0))[..., 0],
                0.0,
            )
            best, best_rest = chosen[:, :, i], rest
            options = [(-1, rest + current, torch.ones_like(rest, dtype=torch.bool))]
            for c in range(value.shape[3]):
                options.append((c, rest + current - value[:, :, i, c], valid[:, :, i, c]))
            for number, left, allowed in options:
                better = allowed & (left.abs() < best_rest.abs())
                best = torch.where(better, number, best)
                best_rest = torch.where(better, left, best_rest)
            chosen[:, :, i], rest = best, best_rest
    return chosen, rest


def subsets(
    pools: Pools, sign: int, demand: Floats, n: int, start: int, tolerance: float, engine: str
) -> Subsets:
    """See ``search.subsets``."""
    device, size = _device(engine), int(pools.sizes.max(initial=1))
    neurons = np.full((len(demand), n), -1, np.int64)
    masks, residual = np.zeros(demand.shape, np.uint64), np.abs(demand)
    for part in _chunks(len(demand), max(n * demand.shape[1], size)):
        tile = _Tile(pools, part, sign, demand.shape[1], device)
        _, a, usable = tile.neurons_in(0, size)
        order = torch.where(usable, torch.arange(size, device=device), size).sort(dim=1)[0]
        order = torch.nn.functional.pad(order, (0, max(0, n - size)), value=size)[:, :n]
        there = order < size
        factor = torch.where(there, a.gather(1, order.clamp(max=size - 1)), 0.0)
        parts = (factor[:, :, None] * tile.out_weights(order)).transpose(1, 2).reshape(-1, n)
        want = torch.from_numpy(np.ascontiguousarray(demand[part])).to(device).reshape(-1)
        # An absent neuron contributes 0 and is cut from the mask.
        present = (there.long() << torch.arange(n, device=device)).sum(dim=1)
        mask, rest = _anytime(want, parts, start, tolerance)
        shape = demand[part].shape
        mask = mask.view(shape) & present[:, None]
        neurons[part] = torch.where(there, order, -1).cpu().numpy()
        masks[part] = mask.cpu().numpy().astype(np.uint64)
        residual[part] = rest.view(shape).cpu().numpy()
    return Subsets(neurons, masks, residual)


def _anytime(want: Tensor, parts: Tensor, start: int, tolerance: float) -> tuple[Tensor, Tensor]:
    n = parts.shape[1]
    mask, rest = torch.zeros_like(want, dtype=torch.int64), want.abs()
    tried = min(start, n)
    while True:
        open_rows = ((rest > tolerance) & (want != 0)).nonzero()[:, 0]
        for part in _chunks(len(open_rows), 1 << ((tried + 1) // 2)):
            rows = open_rows[part]
            found, left = best_subset(want[rows], parts[rows, :tried])
            better = left < rest[rows]
            mask[rows] = torch.where(better, found, mask[rows])
            rest[rows] = torch.where(better, left, rest[rows])
        if tried == n or not len(open_rows):
            return mask, rest
        tried = min(tried + 2, n)


def best_subset(want: Tensor, parts: Tensor) -> tuple[Tensor, Tensor]:
    """Meet in the middle for a batch: want (B,), parts (B, n) -> masks (B,), |rest| (B,)."""
    half = parts.shape[1] // 2
    left, left_masks = _sums(parts[:, :half])
    right, right_masks = _sums(parts[:, half:])
    right, order = right.sort(dim=1)
    need = want[:, None] - left
    above = torch.searchsorted(right, need).clamp(max=right.shape[1] - 1)
    below = (above - 1).clamp(min=0)
    rest_above = (want[:, None] - (left + right.gather(1, above))).abs()
    rest_below = (want[:, None] - (left + right.gather(1, below))).abs()
    pick = torch.where(rest_above < rest_below, above, below)
    best, at = torch.minimum(rest_above, rest_below).min(dim=1)
    chosen = order.gather(1, pick.gather(1, at[:, None]))[:, 0]
    return left_masks[at] | (right_masks[chosen] << half), best


def _sums(parts: Tensor) -> tuple[Tensor, Tensor]:
    sums = torch.zeros(len(parts), 1, dtype=parts.dtype, device=parts.device)
    for i in range(parts.shape[1]):
        sums = torch.cat([sums, sums + parts[:, i : i + 1]], dim=1)
    return sums, torch.arange(sums.shape[1], device=parts.device)


def single(
    pools: Pools, sign: int, demand: Floats, tolerance: float, both: bool, engine: str
) -> tuple[Ints, Floats]:
    """See ``search.single``; returns picks and residual, both (P, O)."""
    device, size, block = _device(engine), int(pools.sizes.max(initial=1)), 1024
    picks = np.full(demand.shape, -1, np.int64)
    residual = np.abs(demand)
    for part in _chunks(len(demand), block * demand.shape[1]):
        tile = _Tile(pools, part, sign, demand.shape[1], device)
        want = torch.from_numpy(np.ascontiguousarray(demand[part])).to(device)
        found = torch.full(want.shape, -1, dtype=torch.int64, device=device)
        rest = want.abs()
        for begin in range(0, size, block):
            if bool(((found >= 0) | (want == 0)).all()):
                break
            neurons, a, usable = tile.neurons_in(begin, min(begin + block, size))
            b = tile.out_weights(neurons)
            error = (want.abs()[:, None] - a[:, :, None] * b.abs()).abs()
            fits = usable[:, :, None] & ((b > 0) == (want > 0)[:, None]) & (error <= tolerance)
            if both:
                root, slack = want.abs().sqrt()[:, None], 0.5 * tolerance / pools.law.scale
                fits &= ((a[:, :, None] - root).abs() <= slack) & ((b.abs() - root).abs() <= slack)
            hit = fits.any(dim=1) & (found < 0) & (want != 0)
            at = fits.int().argmax(dim=1)
            found = torch.where(hit, at + begin, found)
            rest = torch.where(hit, error.gather(1, at[:, None])[:, 0], rest)
        picks[part], residual[part] = found.cpu().numpy(), rest.cpu().numpy()
    return picks, residual
