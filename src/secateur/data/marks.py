"""Where the blocks of a stream begin, and what was in them: kept, so that any is found again."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from secateur.data.packing import Ids, Mark
from secateur.errors import UsageError
from secateur.files import told_plainly, write_text

_FORMAT = "secateur.stream.1"


class Marks:
    """Block after block: the place each begins at, and a hash of its tokens.

    Attributes:
        tokens: of one pass; None until its end was met.
        last: number of the last block then.

    Args:
        fingerprint: of the stream they belong to; a file of another is written anew.
        size: tokens in a block.
        path: JSON lines, one a block; written by the process of rank 0, read by all.
    """

    def __init__(self, fingerprint: str, size: int, path: Path | None = None) -> None:
        self.size, self.path = size, path
        self.tokens: int | None = None
        self._places = [Mark()]
        self._hashes: list[str] = []
        self._head = {"format": _FORMAT, "fingerprint": fingerprint}
        self._whole = False  # the file holds exactly what is known here
        if path is not None and path.exists():
            self._load(path)

    @property
    def last(self) -> int | None:
        """Number of the last block, once the end was met."""
        return None if self.tokens is None else len(self._hashes) - 1

    def before(self, number: int) -> tuple[int, Mark]:
        """The last block up to ``number`` whose beginning is known, and that."""
        known = min(number, len(self._places) - 1)
        return known, self._places[known]

    def note(self, number: int, ids: Ids, following: Mark | None) -> None:
        """A block was read; ``following`` is where the next begins, None after the last.

        Raises:
            UsageError: it was another one when it was read before.
        """
        found = hashlib.sha256(ids.tobytes()).hexdigest()[:16]
        if number < len(self._hashes):
            if self._hashes[number] != found:
                raise UsageError(
                    f"block {number} of the text is not what it was when training began",
                    field="text",
                    value=None if self.path is None else str(self.path),
                    fix="put the text back as it was, or begin anew (--fresh)",
                )
            return
        self._hashes.append(found)
        if following is None:
            self.tokens = number * self.size + len(ids)
        else:
            self._places.append(following)
        self._write(self._line(number))

    def _line(self, number: int) -> dict[str, Any]:
        ends = number + 1 == len(self._places)
        place = {"tokens": self.tokens} if ends else asdict(self._places[number + 1])
        return {"sha256": self._hashes[number], **place}

    def _write(self, line: dict[str, Any]) -> None:
        if self.path is None or int(os.environ.get("RANK", "0")) != 0:
            return
        if self._whole:
            with told_plainly(self.path), open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            return
        lines = [self._head, *map(self._line, range(len(self._hashes)))]
        write_text(self.path, "".join(json.dumps(one) + "\n" for one in lines))
        self._whole = True

    def _load(self, path: Path) -> None:
        """Take over the whole lines of the stream's own file."""
        lines = path.read_text("utf-8", errors="replace").split("\n")
        try:
            if json.loads(lines[0]) != self._head:
                return
            for line in filter(None, lines[1:]):
                row = json.loads(line)
                known = row["sha256"]
                if "tokens" in row:
                    self.tokens = int(row["tokens"])
                else:
                    self._places.append(Mark(row["source"], row["at"], row["skip"]))
                self._hashes.append(known)
        except (ValueError, KeyError, TypeError):  # cut off while it was written
            return
        self._whole = lines[-1] == ""
