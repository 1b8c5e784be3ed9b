"""Pieces of documents to one stream of tokens, cut into blocks; any block can be begun at again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from secateur.data.documents import Piece, Source
from secateur.data.windows import opening, text_ids
from secateur.errors import UsageError

Ids = NDArray[np.int32]
TOGETHER = 4 * 65_536
"""Characters tokenised in one call."""


@dataclass(frozen=True)
class Mark:
    """A place in the stream: a piece (source's number, its ``at``) and tokens of it before."""

    source: int = 0
    at: Any = None
    skip: int = 0


@dataclass(frozen=True)
class Joints:
    """What stands before and after each document, as ids."""

    begin: tuple[int, ...]
    end: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: Any, separator: str | None) -> Joints:
        """What the tokenizer begins a text with; its EOS, or the ids of ``separator``.

        Raises:
            UsageError: neither is there, so nothing would keep documents apart.
        """
        if separator is not None:
            end = text_ids(tokenizer, separator, special=False)
        else:
            eos = getattr(tokenizer, "eos_token_id", None)
            end = [] if eos is None else [eos]
        if not end:
            raise UsageError(
                "the tokenizer has no EOS token, so nothing would keep documents apart",
                field="separator",
                value=separator,
                fix='give a text to stand between documents, e.g. separator="\\n\\n"',
            )
        return cls(tuple(opening(tokenizer)), tuple(end))


def tokenised(
    sources: Sequence[Source], tokenizer: Any, joints: Joints, mark: Mark
) -> Iterator[tuple[Mark, Ids]]:
    """(where it begins, ids) of every piece from ``mark``'s piece on, document ends included."""
    held: list[tuple[Mark, Piece]] = []
    size = 0
    for here, piece in _pieces(sources, mark):
        held.append((here, piece))
        size += len(piece.text)
        if size >= TOGETHER:
            yield from _ids(held, tokenizer, joints)
            held, size = [], 0
    yield from _ids(held, tokenizer, joints)


def packed(
    pieces: Iterable[tuple[Mark, Ids]], skip: int, size: int
) -> Iterator[tuple[Ids, Mark | None]]:
    """Blocks of ``size`` tokens, each with where the next one begins.

    Args:
        skip: tokens of the first piece that belong to what was before.

    Yields:
        The last block is shorter (maybe empty), and None follows it: every token is in exactly
        one block, in order.
    """
    parts: list[Ids] = []
    have = 0
    for mark, ids in pieces:
        place, skip = skip, 0
        while place < len(ids):
            taken = ids[place : place + size - have]
            parts.append(taken)
            place, have = place + len(taken), have + len(taken)
            if have == size:
                yield np.concatenate(parts), Mark(mark.source, mark.at, place)
                parts, have = [], 0
    yield np.concatenate(parts) if parts else np.zeros(0, np.int32), None


def _pieces(sources: Sequence[Source], mark: Mark) -> Iterator[tuple[Mark, Piece]]:
    for number in range(mark.source, len(sources)):
        for piece in sources[number].pieces(mark.at if number == mark.source else None):
            yield Mark(number, piece.at), piece


def _ids(
    held: Sequence[tuple[Mark, Piece]], tokenizer: Any, joints: Joints
) -> Iterator[tuple[Mark, Ids]]:
    if not held:
        return
    texts = [piece.text for _, piece in held]
    # verbose=False: a text longer than the model's context is no mistake here, it gets cut.
    rows = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    for (mark, piece), row in zip(held, rows, strict=True):
        before = joints.begin if piece.first else ()
        after = joints.end if piece.last else ()
        yield mark, np.fromiter(chain(before, row, after), np.int32)
