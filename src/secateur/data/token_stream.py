"""Texts larger than memory as training windows: packed, shuffled by block, found by position.

The documents of all sources follow one another (several files in an order drawn by a seed),
each begun as the tokenizer begins one and ended by its EOS token; the stream of their tokens is
cut into windows, the windows into blocks. Training takes block after block, the windows of each
in an order drawn anew for every pass. What is in a window depends on the sources, the tokenizer
and its number alone, so a training resumes by its position, and any number of processes walk
through the same batches. Memory holds a few blocks and a piece of a document, whatever the
sources' size.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from secateur.data.batches import Batch
from secateur.data.documents import Source
from secateur.data.marks import Marks
from secateur.data.packing import Ids, Joints, Mark, packed, tokenised
from secateur.data.windows import Windows, tokenizer_fingerprint
from secateur.errors import UsageError
from secateur.progress import SILENT, Progress

COUNTED_TOKENS = 8_000_000
COUNTED_BYTES = 64 * 2**20
"""A budget of so many tokens, or a text of so many bytes, is counted before training begins;
a larger one is found wanting where it ends."""


class TokenStream:
    """Windows of a stream of tokens; what ``fit`` and ``Shuffled`` ask of training data.

    Attributes:
        length: tokens in a window.
        epochs: passes allowed; None: as many as are asked for.
        held_out: the first so many windows are in no batch (``held`` gives them).
        record: where the windows come from, JSON-able.
        fingerprint: hash of all that decides what is in them. ``epochs`` does not.
    """

    unit: ClassVar[str] = "tokens"

    def __init__(
        self,
        sources: Sequence[Source],
        tokenizer: Any,
        length: int,
        *,
        joints: Joints,
        block: int,
        epochs: int | None,
        vocabulary: int | None,
        index: Path | None,
        held_out: int = 0,
    ) -> None:
        self.sources, self.tokenizer, self.joints = sources, tokenizer, joints
        self.length, self.block, self.epochs = length, block, epochs
        self.vocabulary, self.held_out = vocabulary, held_out
        self.record: dict[str, Any] = {
            "source": "stream",
            "texts": [source.record() for source in sources],
            "tokenizer": tokenizer_fingerprint(tokenizer),
            "joints": asdict(joints),
            "length": length,
            "block": block,
            "held_out": held_out,
        }
        words = json.dumps(self.record, sort_keys=True).encode()
        self.fingerprint = hashlib.sha256(words).hexdigest()
        self.marks = Marks(self.fingerprint, block * length, index)
        self._held: OrderedDict[int, Ids] = OrderedDict()
        self._room = 2
        self._reading: tuple[int, Iterator[tuple[Ids, Mark | None]]] | None = None

    # -- what the training loop asks -------------------------------------------------------------

    def order(self, seed: int) -> BlockShuffled:
        """Block after block, each pass with other permutations within them."""
        return BlockShuffled(self, seed)

    def scored(self, rows: Sequence[int]) -> int:
        """Tokens of these windows whose prediction is scored."""
        return len(rows) * (self.length - 1)

    def batch(self, rows: Sequence[int]) -> Batch:
        """Windows by number."""
        ids = np.empty((len(rows), self.length), np.int64)
        for place, row in enumerate(rows):
            number, within = divmod(row, self.block)
            ids[place] = self.windows(number)[within]
        return Batch(torch.from_numpy(ids))

    # -- blocks ------------------------------------------------------------------------------------

    def windows(self, number: int) -> Ids:
        """(n, L) int32: the windows of a block; fewer than ``block`` only in the last, none after.

        Raises:
            UsageError: a source cannot be read, has changed, or is another model's tokens.
        """
        if number in self._held:
            self._held.move_to_end(number)
            return self._held[number]
        if self.marks.last is not None and number > self.marks.last:
            return np.zeros((0, self.length), np.int32)
        ids = self._read(number)
        count = len(ids) // self.length
        self._held[number] = ids[: count * self.length].reshape(count, self.length)
        while len(self._held) > self._room:
            self._held.popitem(last=False)
        return self._held[number]

    def reserve(self, windows: int) -> None:
        """Keep enough blocks for a batch of so many windows."""
        self._room = max(self._room, windows // self.block + 2)

    @property
    def total(self) -> int | None:
        """Windows to train on in one pass, once its end was met."""
        if self.marks.tokens is None:
            return None
        return max(0, self.marks.tokens // self.length - self.held_out)

    @property
    def held(self) -> Windows | None:
        """The windows set aside, for validation."""
        if not self.held_out:
            return None
        ids = self.batch(range(self.held_out)).ids
        return Windows(ids, None, self.record | {"windows": self.held_out})

    def require(self, tokens: int, progress: Progress = SILENT) -> None:
        """Refuse a budget that the text cannot meet, where counting is cheap.

        Raises:
            UsageError: too little text, saying how much there is.
        """
        if self.epochs is None:
            return
        sizes = [source.size for source in self.sources]
        small = None not in sizes and sum(filter(None, sizes)) <= COUNTED_BYTES
        if not small and tokens > COUNTED_TOKENS:
            return
        wanted = -(-tokens // self.length)  # of the windows after those set aside
        number = 0
        with progress.stage("counting tokens", unit="blocks") as advance:
            while self.total is None and (
                (number * self.block - self.held_out) * self.epochs < wanted
            ):
                self.windows(number)
                number += 1
                advance(1)
        if self.total is not None and self.total * self.epochs < wanted:
            raise self.exhausted(tokens)

    def exhausted(self, tokens: int | None = None) -> UsageError:
        """The error of a budget beyond the text's end."""
        total = (self.total or 0) * self.length
        names = ", ".join(Path(source.name).name for source in self.sources[:3])
        more = f" and {len(self.sources) - 3} more" if len(self.sources) > 3 else ""
        needed = "" if tokens is None or not total else f"epochs={-(-tokens // total)}"
        passes = "" if self.epochs == 1 else f" in each of {self.epochs} passes"
        return UsageError(
            f"{names}{more}: {total:,} tokens{passes}, and no more",
            field="epochs" if tokens is None else "tokens",
            value=self.epochs if tokens is None else tokens,
            fix=f"{needed or 'more epochs'} to go over them again, fewer tokens, or more text",
        )

    def _read(self, number: int) -> Ids:
        """The tokens of a block, going on where the last reading stopped if that serves."""
        if self._reading is None or self._reading[0] != number:
            begin, mark = self.marks.before(number)
            pieces = tokenised(self.sources, self.tokenizer, self.joints, mark)
            self._reading = begin, packed(pieces, mark.skip, self.block * self.length)
        (at, blocks), self._reading = self._reading, None
        for at, (ids, following) in enumerate(blocks, at):  # noqa: B020
            self._check(ids)
            self.marks.note(at, ids, following)
            if at == number:
                if following is not None:
                    self._reading = at + 1, blocks
                return ids
        return np.zeros(0, np.int32)

    def _check(self, ids: Ids) -> None:
        if self.vocabulary is None or not len(ids) or int(ids.max()) < self.vocabulary:
            return
        raise UsageError(
            f"there is the token id {int(ids.max())}, "
            f"but the model's vocabulary has {self.vocabulary} entries",
            field="tokenizer",
            value=self.record["tokenizer"],
            fix="this is another model's tokenizer: give the one that belongs to the model",
        )


class BlockShuffled:
    """The order of a stream's windows: block after block, within each a permutation."""

    def __init__(self, stream: TokenStream, seed: int = 0) -> None:
        self.stream, self.seed = stream, seed
        self._last: tuple[tuple[int, int], list[int]] | None = None

    def rows(self, start: int, count: int) -> list[int]:
        """Numbers of the windows at positions ``start`` ... ``start + count - 1``.

        Raises:
            UsageError: the stream ends before, and no further pass is allowed.
        """
        self.stream.reserve(count)
        return [self._row(position) for position in range(start, start + count)]

    def _row(self, position: int) -> int:
        stream = self.stream
        total = stream.total
        while total is None or position < total:
            # Before the end was met, a position in a full block lies in the first pass.
            number, within = divmod(position + stream.held_out, stream.block)
            windows = len(stream.windows(number))
            if within < windows:
                return self._drawn(0, number, windows)[within]
            total = stream.total
        if total == 0:
            raise stream.exhausted()
        turn, offset = divmod(position, total)
        if stream.epochs is not None and turn >= stream.epochs:
            raise stream.exhausted()
        number, within = divmod(offset + stream.held_out, stream.block)
        windows = min(stream.block, total + stream.held_out - number * stream.block)
        return self._drawn(turn, number, windows)[within]

    def _drawn(self, turn: int, number: int, windows: int) -> list[int]:
        """The windows of a block in their order; those set aside stay where they are."""
        key = (turn, number)
        if self._last is None or self._last[0] != key:
            first = number * self.stream.block
            aside = min(windows, max(0, self.stream.held_out - first))
            order = list(range(first + aside, first + windows))
            random.Random(f"{self.seed}/{turn}/{number}").shuffle(order)
            self._last = key, [*range(first, first + aside), *order]
        return self._last[1]
