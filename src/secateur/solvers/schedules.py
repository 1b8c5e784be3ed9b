"""How many groups go in each round: many at first, fewer as the choice gets harder."""

from __future__ import annotations

import re
from collections.abc import Iterator

from secateur.errors import UsageError


def batch_sizes(count: int, rule: int | str = "1/32") -> list[int]:
    """Group counts of the rounds, adding up to ``count``.

    Args:
        count: groups to remove in all.
        rule: a constant; ``FIRST:LAST``, halved each round from FIRST down to LAST; ``1/N``, that
            share of what is still to go; or ``published``, the schedule of the SlimGPT release:
            from half of what exceeds 512, at most 1024 and never below 64, so that a target of
            up to 64 goes all at once.

    >>> batch_sizes(10, 4), batch_sizes(20, "8:2"), batch_sizes(8, "1/4")
    ([4, 4, 2], [8, 4, 2, 2, 2, 2], [2, 2, 1, 1, 1, 1])
    >>> batch_sizes(5504, "published")[:4]
    [1024, 992, 240, 64]

    Raises:
        UsageError: a rule that cannot be read.
    """
    sizes = _share(count, str(rule)) or _halving(count, str(rule))
    out: list[int] = []
    left = count
    while left > 0:
        out.append(min(left, next(sizes)))
        left -= out[-1]
    return out


def _share(count: int, rule: str) -> Iterator[int] | None:
    """Sizes of a ``1/N`` rule, None for another."""
    found = re.fullmatch(r"1/([1-9]\d*)", rule)
    if not found:
        return None

    def sizes(left: int, parts: int) -> Iterator[int]:
        while left > 0:
            size = -(-left // parts)
            yield size
            left -= size

    return sizes(count, int(found[1]))


def _halving(count: int, rule: str) -> Iterator[int]:
    """Sizes of the other rules, without end."""
    if rule == "published":
        return _published((count - 512) // 2)
    found = re.fullmatch(r"([1-9]\d*)(?::([1-9]\d*))?", rule)
    first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, 1)
    if last > first:
        raise UsageError(
            "not a schedule of group sizes",
            field="group_size",
            value=rule,
            fix="a number such as 8, FIRST:LAST such as 1024:8, a share such as 1/16, or 'published'",
        )

    def sizes(size: int) -> Iterator[int]:
        while True:
            yield size
            size = max(last, size // 2)

    return sizes(first)


def _published(size: int) -> Iterator[int]:
    while True:
        yield min(max(size, 64), 1024)
        size = (size - 512) // 2
