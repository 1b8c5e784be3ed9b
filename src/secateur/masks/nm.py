"""N:M masks as numbers: each group of M weights holds the index of one of its C(M, N) patterns.

2:4 has six patterns, so a group needs log2(6) = 2.585 bits, 0.646 a weight. ``encode`` gives the
index of each group, ``pack_indices`` writes indices in base K into words of whole bits: seventeen
base-6 digits fit 44 bits, so 2:4 costs 0.647 bits a weight, and a 4:8 mask 0.767 of 0.766.

The order of patterns is lexicographic in the kept positions (2:4: 1100, 1010, 1001, 0110, 0101,
0011), as MaskLLM's (arXiv 2409.17481), and part of the file format.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import combinations
from math import ceil, comb, log2

import numpy as np
import torch
from torch import Tensor

from secateur.errors import SecateurError, UsageError

WIDEST = 16
"""Most weights in a group: the table that finds a pattern's index has 2**M entries."""

_WORD_BITS = 62
_CHUNK = 1 << 18  # words packed at a time, which bounds the temporary of one byte a bit


@lru_cache(maxsize=32)
def candidates(keep: int, group: int) -> Tensor:
    """All patterns of N:M, bool (C(M, N), M), True = kept, in lexicographic order.

    >>> candidates(2, 4).int().tolist()[:3]
    [[1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1]]

    Raises:
        UsageError: not 1 <= N <= M <= 16.
    """
    if not 1 <= keep <= group <= WIDEST:
        raise UsageError(
            f"patterns are enumerated for 1 <= N <= M <= {WIDEST}",
            field="sparsity",
            value=f"{keep}:{group}",
        )
    table = torch.zeros(comb(group, keep), group, dtype=torch.bool)
    for row, kept in enumerate(combinations(range(group), keep)):
        table[row, list(kept)] = True
    return table


@lru_cache(maxsize=32)
def _index_of_bits(keep: int, group: int) -> np.ndarray:
    """Pattern as bits (first weight = lowest) -> its index; -1 where not N bits are set."""
    lookup = np.full(1 << group, -1, np.int32)
    weights = 1 << np.arange(group)
    bits = candidates(keep, group).numpy() @ weights
    lookup[bits] = np.arange(len(bits))
    return lookup


def encode(mask: Tensor, keep: int, group: int) -> Tensor:
    """Index of each group's pattern, int32 (..., d_in / M), of a mask whose True = pruned.

    Raises:
        SecateurError: M does not divide the columns, or a group does not keep exactly N.
    """
    if mask.shape[-1] % group:
        raise SecateurError(f"{group} does not divide {mask.shape[-1]} columns")
    kept = ~mask.detach().cpu().numpy().reshape(*mask.shape[:-1], -1, group)
    weights = (1 << np.arange(group)).astype(np.int64)
    index = _index_of_bits(keep, group)[kept @ weights]
    if index.size and int(index.min()) < 0:
        bad = int((index < 0).sum())
        raise SecateurError(f"{bad} of {index.size} groups do not keep {keep} of {group}")
    return torch.from_numpy(index)


def decode(index: Tensor, keep: int, group: int) -> Tensor:
    """The mask (..., d_in), True = pruned, whose groups have these pattern indices."""
    patterns = ~candidates(keep, group)
    return patterns[index.long()].reshape(*index.shape[:-1], -1)


@lru_cache(maxsize=32)
def word(keep: int, group: int) -> tuple[int, int]:
    """Digits and bits of one packed word: the best ratio of the two within 62 bits.

    >>> word(2, 4), word(1, 4)
    ((17, 44), (1, 2))
    """
    bits = log2(comb(group, keep))
    if bits == 0:
        return 1, 0
    sizes = [(d, ceil(d * bits - 1e-9)) for d in range(1, max(2, int(_WORD_BITS / bits) + 1))]
    return min(sizes, key=lambda size: (size[1] / size[0], size[0]))


def packed_bytes(groups: int, keep: int, group: int) -> int:
    """Bytes ``pack_indices`` needs for that many groups."""
    digits, bits = word(keep, group)
    return ceil(ceil(groups / digits) * bits / 8)


def pack_indices(index: Tensor, keep: int, group: int) -> Tensor:
    """Indices (any shape, read in order) as uint8: base-K digits in words of whole bits.

    The first index is a word's lowest digit, and a word's lowest bit comes first.
    """
    digits, bits = word(keep, group)
    flat = index.reshape(-1).numpy().astype(np.uint64)
    if not flat.size or not bits:
        return torch.zeros(0, dtype=torch.uint8)
    words = ceil(len(flat) / digits)
    padded = np.zeros(words * digits, np.uint64)
    padded[: len(flat)] = flat
    place = np.uint64(comb(group, keep)) ** np.arange(digits, dtype=np.uint64)
    values = (padded.reshape(words, digits) * place).sum(1, dtype=np.uint64)
    shifts = np.arange(bits, dtype=np.uint64)
    # A chunk of a multiple of eight words ends on a whole byte.
    parts = [
        np.packbits(
            ((values[at : at + _CHUNK, None] >> shifts) & np.uint64(1))
            .astype(np.uint8)
            .reshape(-1),
            bitorder="little",
        )
        for at in range(0, words, _CHUNK)
    ]
    return torch.from_numpy(np.concatenate(parts))


def unpack_indices(packed: Tensor, groups: int, keep: int, group: int) -> Tensor:
    """The first ``groups`` indices that ``pack_indices`` packed, int32.

    Raises:
        SecateurError: another number of bytes, or a number no packing gives.
    """
    digits, bits = word(keep, group)
    want = packed_bytes(groups, keep, group)
    if packed.dtype is not torch.uint8 or packed.numel() != want:
        raise SecateurError(
            f"{groups} groups of {keep}:{group} take {want} bytes, not {packed.numel()}"
        )
    patterns = comb(group, keep)
    if not bits or not groups:
        return torch.zeros(groups, dtype=torch.int32)
    words = ceil(groups / digits)
    raw = packed.reshape(-1).numpy()
    shifts = np.arange(bits, dtype=np.uint64)
    values = np.empty(words, np.uint64)
    for at in range(0, words, _CHUNK):
        count = min(_CHUNK, words - at)
        part = raw[at * bits // 8 : ceil((at + count) * bits / 8)]
        ones = np.unpackbits(part, count=count * bits, bitorder="little").reshape(count, bits)
        values[at : at + count] = (ones.astype(np.uint64) << shifts).sum(1, dtype=np.uint64)
    out = np.empty((words, digits), np.int32)
    base = np.uint64(patterns)
    for digit in range(digits):
        out[:, digit] = values % base
        values //= base
    if values.any() or out.reshape(-1)[groups:].any():
        raise SecateurError("the packed pattern numbers are damaged")
    return torch.from_numpy(out.reshape(-1)[:groups].copy())
