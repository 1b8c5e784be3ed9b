"""Any text by one word: a file's path or a corpus's name, whole or one part of it."""

from __future__ import annotations

import difflib
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast, get_args

from secateur.data.corpora import CORPORA, corpus_documents, split_documents
from secateur.data.documents import decoded, open_file, readable
from secateur.errors import UsageError
from secateur.progress import SILENT, Progress

Split = Literal["train", "valid", "test", "all"]
TEST_SHARE = 0.1
"""Share of a text without published parts that is its test part."""


@dataclass(frozen=True)
class Text:
    """Documents with what must be known to trust a figure measured on them.

    Attributes:
        name: the file's name or the corpus's.
        sha256: of the documents themselves, of this part only.
        licence: of a corpus; ``as given`` for a user's file.
    """

    name: str
    documents: list[str]
    sha256: str
    split: Split
    licence: str
    source: str

    @classmethod
    def of(cls, documents: list[str], name: str = "text", split: Split = "all") -> Text:
        """Documents that are in memory already."""
        return cls(name, documents, fingerprint(documents), split, "as given", "memory")

    @property
    def characters(self) -> int:
        """Length of all documents."""
        return sum(map(len, self.documents))

    def record(self) -> dict[str, object]:
        """What a report says about it."""
        return {
            "name": self.name,
            "split": self.split,
            "sha256": self.sha256,
            "documents": len(self.documents),
            "characters": self.characters,
            "licence": self.licence,
            "source": self.source,
        }


def fingerprint(documents: list[str]) -> str:
    """SHA-256 over documents; where one ends and the next begins counts too."""
    whole = hashlib.sha256()
    for document in documents:
        raw = document.encode("utf-8", errors="surrogatepass")
        whole.update(len(raw).to_bytes(8, "little"))
        whole.update(raw)
    return whole.hexdigest()


def load_text(spec: str | Path, split: Split = "all", progress: Progress = SILENT) -> Text:
    """The documents that ``spec`` names.

    Args:
        spec: a path to a ``.txt`` file (documents separated by ``<|endoftext|>`` lines), a
            ``.jsonl`` or ``.parquet`` file with a column ``text``, or a corpus name; after
            either, ``:train``, ``:valid`` or ``:test`` chooses a part and overrides ``split``.
        split: the part. A text without published parts gives its first 90 % of characters as
            ``train`` and the rest as ``test``, cut where a paragraph ends.

    Raises:
        UsageError: no such file or corpus, no such part, no text in it, or not readable as text.
    """
    name, part = _parsed(str(spec), split)
    path = Path(name).expanduser()
    if name in CORPORA and not path.is_file():
        corpus = CORPORA[name]
        licence, source = corpus.licence, corpus.source
        published = part in corpus.parts
        if corpus.parts and not published and part != "all":
            raise _no_part(name, part, tuple(corpus.parts))
        documents = corpus_documents(corpus, part if published else "all", progress)
    else:
        documents, published = read_documents(path, str(spec)), False
        name, licence, source = path.name, "as given", "a file"
    if part != "all" and not published:
        if part == "valid":
            raise _no_part(name, part, ("train", "test"))
        documents = head_and_tail(documents)[part == "test"]
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise UsageError("there is no text in it", field="text", value=str(spec))
    return Text(name, documents, fingerprint(documents), part, licence, source)


def read_documents(path: Path, spec: str = "") -> list[str]:
    """The documents of a ``.txt``, ``.jsonl`` or ``.parquet`` file.

    Raises:
        UsageError: see ``load_text``.
    """
    if path.is_dir() or not path.exists():
        raise _missing(path, spec or str(path))
    if path.suffix.lower() in (".jsonl", ".ndjson", ".parquet"):
        return [document for _, document in open_file(path).documents()]
    with readable(path):
        raw = path.read_bytes()
    return split_documents(decoded(raw, 0, path))


def head_and_tail(documents: list[str], share: float = TEST_SHARE) -> tuple[list[str], list[str]]:
    """Split by characters: (first ``1 - share``, last ``share``), cut at a paragraph's end.

    The cut falls at the nearest blank line, else line end, else space after the exact place;
    both sides get text whenever there are two words.

    >>> head_and_tail(["one two three four five six", "seven eight"], share=0.3)
    (['one two three four five six'], ['seven eight'])
    """
    place = round(sum(map(len, documents)) * (1 - share))
    for index, document in enumerate(documents):
        if place > len(document) or (place == len(document) and index + 1 < len(documents)):
            place -= len(document)
            continue
        cut = _boundary(document, place)
        before, after = document[:cut].rstrip(), document[cut:].lstrip()
        head = documents[:index] + ([before] if before else [])
        tail = ([after] if after else []) + documents[index + 1 :]
        return head, tail
    return documents, []


def _boundary(document: str, place: int) -> int:
    """Where to cut at or after ``place``, looking no further than a tenth of the document."""
    limit = place + len(document) // 10 + 1
    for mark in ("\n\n", "\n", " "):
        for found in (document.find(mark, place, limit), document.rfind(mark, 0, place)):
            if found > 0 and document[found:].strip():
                return found
    return place


def _parsed(spec: str, split: Split) -> tuple[str, Split]:
    name, colon, part = spec.rpartition(":")
    if not colon or Path(spec).exists():
        return spec, _known_split(split)
    if part in get_args(Split):
        return name, cast(Split, part)
    if name in CORPORA or Path(name).is_file():
        return name, _known_split(part)
    return spec, _known_split(split)


def _known_split(split: str) -> Split:
    if split not in get_args(Split):
        raise UsageError(
            "no such part of a text", field="split", value=split, fix="train, valid, test or all"
        )
    return cast(Split, split)


def _no_part(name: str, part: str, known: tuple[str, ...]) -> UsageError:
    return UsageError(
        f"'{name}' has no part '{part}'",
        field="split",
        value=part,
        fix=f"one of {', '.join(known)}",
    )


def _missing(path: Path, spec: str) -> UsageError:
    if path.is_dir():
        return UsageError(
            "a folder, not a text", field="text", value=spec, fix="name one file in it"
        )
    siblings = [p.name for p in path.parent.glob("*")] if path.parent.is_dir() else []
    near = difflib.get_close_matches(spec.partition(":")[0], CORPORA, n=1, cutoff=0.5)
    near += [
        str(path.with_name(name))
        for name in difflib.get_close_matches(path.name, siblings, n=1, cutoff=0.7)
    ]
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    return UsageError(
        "neither a file nor a known corpus",
        field="text",
        value=spec,
        fix=f"{hint}corpora: {', '.join(CORPORA)}",
    )
