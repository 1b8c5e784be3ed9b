"""Documents of files of any size, piece by piece, from any place in them.

A ``Source`` is read forward in pieces of at most about ``STRETCH`` characters, so that neither
a file nor a document has to fit into memory. Every piece says where it begins (``at``, JSON-able),
and reading may start at any such place again. Formats: plain text, JSON lines, Parquet.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from secateur.data.corpora import SEPARATOR
from secateur.errors import MissingExtra, UsageError

STRETCH = 65_536
"""Characters of a piece, about: what is tokenised at once."""
HASHED_WHOLE = 256 * 2**20
"""Larger files are hashed in parts: their size, and ``PARTS`` evenly spaced MiB."""
PARTS = 64
FIELD = "text"


@dataclass(frozen=True)
class Piece:
    """A stretch of a document: whether one begins or ends with it, and where it lies."""

    text: str
    first: bool
    last: bool
    at: Any


class Source:
    """Documents in order.

    Attributes:
        name: for messages and records.
        size: bytes on disk; None where it is not known.
    """

    name: str
    size: int | None = None

    def documents(self, at: Any = None) -> Iterator[tuple[Any, str]]:
        """(place, document) from a place on; blank ones are left out.

        Raises:
            UsageError: not readable as what it should be.
        """
        raise NotImplementedError(f"{type(self).__name__} must say this itself")

    def pieces(self, at: Any = None) -> Iterator[Piece]:
        """Pieces from a place on, which is some piece's ``at``; None: from the start."""
        place, start = at or (None, 0)
        for here, document in self.documents(place):
            for begin, end in stretches(document, start):
                last = end == len(document)
                yield Piece(document[begin:end], begin == 0, last, [here, begin])
            start = 0

    def check(self) -> None:
        """Refuse a source that cannot be read, without reading all of it."""
        next(self.pieces(), None)

    def record(self) -> dict[str, Any]:
        """What a run's record says about it; the same text gives the same record."""
        raise NotImplementedError(f"{type(self).__name__} must say this itself")


def stretches(document: str, start: int = 0) -> Iterator[tuple[int, int]]:
    """Where to cut a document into pieces: before a blank, where the second half has one.

    >>> [("a b " * 40_000)[i:j][:2] for i, j in stretches("a b " * 40_000)]
    ['a ', ' a', ' b']
    """
    while start < len(document):
        end = start + STRETCH
        if end < len(document):
            # Tokenizers keep a blank with the word after it.
            marks = (document.rfind(mark, start + STRETCH // 2, end) for mark in (" ", "\n"))
            end = next((at for at in marks if at > start), end)
        end = min(end, len(document))
        yield start, end
        start = end


class File(Source):
    """A file on disk."""

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, str(path)
        with readable(path):
            self.size = path.stat().st_size
        if self.size == 0:
            raise UsageError("the file is empty", field="text", value=str(path))

    def record(self) -> dict[str, Any]:
        """See ``Source.record``."""
        assert self.size is not None
        whole = hashlib.sha256(str(self.size).encode())
        with readable(self.path), self.path.open("rb") as file:
            if self.size <= HASHED_WHOLE:
                while chunk := file.read(2**20):
                    whole.update(chunk)
            else:
                for part in range(PARTS):
                    file.seek((self.size - 2**20) * part // (PARTS - 1))
                    whole.update(file.read(2**20))
        kind = "whole" if self.size <= HASHED_WHOLE else "parts"
        name, digest = self.path.name, whole.hexdigest()
        return {"name": name, "bytes": self.size, "sha256": digest, "hashed": kind}


class PlainText(File):
    """UTF-8 text; lines that are just ``<|endoftext|>`` separate documents.

    What a document begins and ends with of blanks and blank lines is not part of it.
    """

    def pieces(self, at: Any = None) -> Iterator[Piece]:
        """See ``Source.pieces``; a place is [byte, whether a document is under way there]."""
        offset, inside = at or (0, False)
        held: list[str] = []
        begin, length = offset, 0
        for here, line, fresh in self._lines(offset):
            if fresh and line.strip("\n") == SEPARATOR:
                if held:
                    yield Piece("".join(held).rstrip(), not inside, True, [begin, inside])
                held, inside, length = [], False, 0
                continue
            blank = not line.strip()
            if blank and not held:
                continue
            # Cut only before a line with something on it: then the document is not over yet.
            if length >= STRETCH and not blank:
                yield Piece("".join(held), not inside, False, [begin, inside])
                held, inside, length = [], True, 0
            if not held:
                begin = here
                line = line if inside else line.lstrip()
            held.append(line)
            length += len(line)
        if held:
            yield Piece("".join(held).rstrip(), not inside, True, [begin, inside])

    def _lines(self, offset: int) -> Iterator[tuple[int, str, bool]]:
        """(byte, line or part of a very long one, whether it starts a line) from a byte on."""
        with readable(self.path), self.path.open("rb") as file:
            file.seek(max(0, offset - 1))
            fresh = offset == 0 or file.read(1) == b"\n"
            while raw := file.readline(STRETCH):
                if not raw.endswith(b"\n") and len(raw) == STRETCH:
                    tail = _unfinished(raw)
                    if tail:
                        raw = raw[:-tail]
                        file.seek(-tail, 1)
                text = decoded(raw, offset, self.path)
                yield offset, text.replace("\r\n", "\n"), fresh
                offset += len(raw)
                fresh = raw.endswith(b"\n")


class JsonLines(File):
    """One JSON object a line, the document in one of its fields."""

    def __init__(self, path: Path, field: str = FIELD) -> None:
        super().__init__(path)
        self.field = field

    def documents(self, at: Any = None) -> Iterator[tuple[Any, str]]:
        """See ``Source.documents``; a place is [byte, lines before it]."""
        offset, number = at or (0, 0)
        with readable(self.path), self.path.open("rb") as file:
            file.seek(offset)
            for raw in file:
                place, offset, number = [offset, number], offset + len(raw), number + 1
                line = decoded(raw, place[0], self.path)
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise UsageError(
                        f"line {number} is not JSON: {error.msg}",
                        field="text",
                        value=str(self.path),
                    ) from None
                text = text_of(row, number, self.path, self.field)
                if text.strip():
                    yield place, text


class Parquet(File):
    """One document a row, in one column."""

    def __init__(self, path: Path, field: str = FIELD) -> None:
        super().__init__(path)
        self.field = field

    def documents(self, at: Any = None) -> Iterator[tuple[Any, str]]:
        """See ``Source.documents``; a place is the row's number. A row group at a time is read."""
        wanted, first = at or 0, 0
        with _parquet(self.path) as file:
            self._refuse_other_columns(file)
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if first + rows > wanted:
                    row = first
                    for batch in file.iter_batches(256, [group], [self.field]):
                        skip = min(max(0, wanted - row), len(batch))
                        column = batch.column(0).slice(skip).to_pylist()
                        for number, value in enumerate(column, row + skip):
                            text = text_of({self.field: value}, number + 1, self.path, self.field)
                            if text.strip():
                                yield number, text
                        row += len(batch)
                first += rows

    def check(self) -> None:
        """See ``Source.check``: the columns are enough."""
        with _parquet(self.path) as file:
            self._refuse_other_columns(file)

    def _refuse_other_columns(self, file: Any) -> None:
        names = file.schema_arrow.names
        if self.field not in names:
            text_of(dict.fromkeys(names), 1, self.path, self.field)


class InMemory(Source):
    """Documents that are there already."""

    def __init__(self, documents: Sequence[str], record: dict[str, Any]) -> None:
        self.name = str(record.get("name", "documents"))
        self._documents, self._record = documents, record
        self.size = sum(len(d.encode("utf-8", "surrogatepass")) for d in documents)

    def documents(self, at: Any = None) -> Iterator[tuple[Any, str]]:
        """See ``Source.documents``; a place is the document's number."""
        for number in range(at or 0, len(self._documents)):
            if self._documents[number].strip():
                yield number, self._documents[number]

    def record(self) -> dict[str, Any]:
        """See ``Source.record``."""
        return self._record


def open_file(path: Path, field: str = FIELD) -> Source:
    """The source of a file, by what its name ends with."""
    suffix = path.suffix.lower()
    if suffix in (".jsonl", ".ndjson"):
        return JsonLines(path, field)
    return Parquet(path, field) if suffix == ".parquet" else PlainText(path)


def text_of(row: Any, number: int, name: object, field: str = FIELD) -> str:
    """The document of a row.

    Raises:
        UsageError: it has no such field, or not a string in it.
    """
    if not isinstance(row, dict) or not isinstance(row.get(field), str):
        fields = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise UsageError(
            f"row {number} has no string field '{field}' (it has: {fields})",
            field="text",
            value=str(name),
            fix=f"name the column of the texts '{field}', or the field where it can be chosen",
        )
    text = cast(str, row[field])
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(
            f"row {number} has half a surrogate pair in '{field}' (character {error.start})",
            field="text",
            value=str(name),
            fix="write the text anew, e.g. with errors='replace'",
        ) from None
    return text


def decoded(raw: bytes, offset: int, path: Path) -> str:
    """UTF-8 bytes that lie at ``offset`` of a file; a byte order mark at its start is dropped."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"not UTF-8 text (byte {offset + error.start})",
            field="text",
            value=str(path),
            fix="convert it to UTF-8; only .txt, .jsonl and .parquet files are read",
        ) from None
    return text.removeprefix("\ufeff") if offset == 0 else text


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn the operating system's refusal to read into a message."""
    try:
        yield
    except OSError as error:
        raise UsageError(
            f"cannot be read: {error.strerror or error}", field="text", value=str(path)
        ) from None


@contextmanager
def _parquet(path: Path) -> Iterator[Any]:
    """The open Parquet file."""
    try:
        import pyarrow as arrow
        from pyarrow import parquet
    except ImportError:
        raise MissingExtra("pyarrow", "data", "reading a .parquet file") from None
    try:
        with readable(path), parquet.ParquetFile(path) as file:
            yield file
    except arrow.ArrowInvalid as error:
        raise UsageError(f"not a Parquet file: {error}", field="text", value=str(path)) from None


def _unfinished(raw: bytes) -> int:
    """Bytes at the end that begin a character without ending it (at most 3)."""
    for back in range(1, min(4, len(raw) + 1)):
        byte = raw[-back]
        if byte & 0xC0 != 0x80:  # not a continuation byte: the last character begins here
            long = 4 if byte >= 0xF0 else 3 if byte >= 0xE0 else 2 if byte >= 0xC0 else 1
            return back if long > back else 0
    return 0
