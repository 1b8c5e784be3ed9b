"""N:M masks as numbers: each group of M weights holds the index of one of its C(M, N) patterns.

2:4 has six patterns, so a group needs log2(6) = 2.585 bits, 0.646 a weight. ``encode`` gives the
index of each group, ``pack_indices`` writes indices in base K into words of whole bits: seventeen
base-6 digits fit 44 bits, so 2:4 costs 0.647 bits a weight, and a 4:8 mask 0.767 of 0.766.

The order of patterns is lexicographic in the kept positions (2:4: 1100, 1010, 1001, 0110, 0101,
0011), as MaskLLM's (arXiv 2409.17481), and part of the file format. Up to M = 16 a table knows the
numbers; beyond, they are computed: the pattern keeping c_1 < ... < c_N has as many before it as
``C(M, N) - 1 - sum_i C(M - 1 - c_i, N - i + 1)`` says. Patterns of which there are 2^62 or more
have no number here (``numbered``).
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
"""Most weights in a group that tables are made for: one has 2**M entries."""

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


@lru_cache(maxsize=32)
def _following(keep: int, group: int) -> np.ndarray:
    """C(M - 1 - j, r) for position j and r weights still to be kept, int64 (M, N + 1); r = 0: 0."""
    out = np.zeros((group, keep + 1), np.int64)
    for place in range(group):
        for left in range(1, keep + 1):
            out[place, left] = comb(group - 1 - place, left)
    return out


def numbered(keep: int, group: int) -> bool:
    """Whether patterns of N:M have indices: there are fewer than 2^62 of them."""
    return comb(group, keep) < 1 << _WORD_BITS


def _refuse_unnumbered(keep: int, group: int) -> None:
    if not numbered(keep, group):
        raise UsageError(
            "has too many patterns to count", field="sparsity", value=f"{keep}:{group}"
        )


def encode(mask: Tensor, keep: int, group: int) -> Tensor:
    """Index of each group's pattern, int (..., d_in / M), of a mask whose True = pruned.

    Raises:
        SecateurError: M does not divide the columns, or a group does not keep exactly N.
        UsageError: 2^62 patterns or more.
    """
    _refuse_unnumbered(keep, group)
    if mask.shape[-1] % group:
        raise SecateurError(f"{group} does not divide {mask.shape[-1]} columns")
    kept = ~mask.detach().cpu().numpy().reshape(*mask.shape[:-1], -1, group)
    bad = int((kept.sum(-1) != keep).sum())
    if bad:
        groups = kept.size // group
        raise SecateurError(f"{bad} of {groups} groups do not keep {keep} of {group}")
    if group <= WIDEST:
        return torch.from_numpy(_index_of_bits(keep, group)[kept @ (1 << np.arange(group))])
    following, left = _following(keep, group), np.full(kept.shape[:-1], keep)
    index = np.full(kept.shape[:-1], comb(group, keep) - 1, np.int64)
    for place in range(group):
        here = kept[..., place]
        index -= np.where(here, following[place][left], 0)
        left -= here
    return torch.from_numpy(index)


def decode(index: Tensor, keep: int, group: int) -> Tensor:
    """The mask (..., d_in), True = pruned, whose groups have these pattern indices."""
    if group <= WIDEST:
        patterns = ~candidates(keep, group)
        return patterns[index.long()].reshape(*index.shape[:-1], -1)
    following = _following(keep, group)
    after = comb(group, keep) - 1 - index.numpy().astype(np.int64)
    left = np.full(after.shape, keep)
    mask = np.ones((*after.shape, group), bool)
    for place in range(group):
        count = following[place][left]
        here = (left > 0) & (after >= count)
        after -= np.where(here, count, 0)
        left -= here
        mask[..., place] = ~here
    return torch.from_numpy(mask).reshape(*index.shape[:-1], -1)


@lru_cache(maxsize=32)
def word(keep: int, group: int) -> tuple[int, int]:
    """Digits and bits of one packed word: the best ratio of the two within 62 bits.

    >>> word(2, 4), word(1, 4)
    ((17, 44), (1, 2))
    """
    patterns = comb(group, keep)
    if patterns == 1:
        return 1, 0
    digits = range(1, int(_WORD_BITS / log2(patterns)) + 1)
    sizes = [(d, (patterns**d - 1).bit_length()) for d in digits]
    return min(sizes, key=lambda size: (size[1] / size[0], size[0]))


def packed_bytes(groups: int, keep: int, group: int) -> int:
    """Bytes ``pack_indices`` needs for that many groups.

    Raises:
        UsageError: 2^62 patterns or more.
    """
    _refuse_unnumbered(keep, group)
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
    """The first ``groups`` indices that ``pack_indices`` packed, int32 (int64 beyond M = 16).

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
    kind = np.int32 if group <= WIDEST else np.int64
    if not bits or not groups:
        return torch.from_numpy(np.zeros(groups, kind))
    words = ceil(groups / digits)
    raw = packed.reshape(-1).numpy()
    shifts = np.arange(bits, dtype=np.uint64)
    values = np.empty(words, np.uint64)
    for at in range(0, words, _CHUNK):
        count = min(_CHUNK, words - at)
        part = raw[at * bits // 8 : ceil((at + count) * bits / 8)]
        ones = np.unpackbits(part, count=count * bits, bitorder="little").reshape(count, bits)
        values[at : at + count] = (ones.astype(np.uint64) << shifts).sum(1, dtype=np.uint64)
    out = np.empty((words, digits), kind)
    base = np.uint64(patterns)
    for digit in range(digits):
        out[:, digit] = values % base
        values //= base
    if values.any() or out.reshape(-1)[groups:].any():
        raise SecateurError("the packed pattern numbers are damaged")
    return torch.from_numpy(out.reshape(-1)[:groups].copy())
