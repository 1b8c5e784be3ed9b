"""``open_stream``: training windows of texts of any size, from whatever names them."""

from __future__ import annotations

import glob
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from secateur.data.corpora import CORPORA
from secateur.data.documents import FIELD, File, InMemory, Source, open_file
from secateur.data.hub import PREFIX, Hub, open_hub
from secateur.data.packing import Joints
from secateur.data.texts import Text, load_text
from secateur.data.token_stream import TokenStream
from secateur.errors import UsageError
from secateur.progress import SILENT, Progress

__all__ = ["TokenStream", "names_texts", "open_stream"]

LONGEST = 250
"""Characters that a name of a text may have; the operating system refuses longer ones."""
SUFFIXES = (".txt", ".jsonl", ".ndjson", ".parquet")


def open_stream(
    sources: Any,
    tokenizer: Any,
    length: int = 512,
    *,
    field: str = FIELD,
    tokens: int | None = None,
    epochs: int | None = 1,
    block: int = 1024,
    seed: int = 0,
    separator: str | None = None,
    vocabulary: int | None = None,
    context: int | None = None,
    index: Path | None = None,
    held_out: int = 0,
    progress: Progress = SILENT,
) -> TokenStream:
    """Training windows of texts of any size.

    Args:
        sources: one or several of: a file's path (``.txt``, ``.jsonl``, ``.parquet``), a pattern
            of such (``shards/*.jsonl``), a corpus's name or any other word ``load_text`` knows,
            ``hf:NAME[@REVISION][,CONFIG][:SPLIT]``, a ``Text`` (``Text.of`` makes one of
            documents in memory), a data set of ``datasets``.
        length: tokens in a window.
        field: where JSON lines, Parquet files and data sets have their texts.
        tokens: what the training will see; refused at once if there is less, where counting is
            cheap (``COUNTED_TOKENS``, ``COUNTED_BYTES``), and where the text ends if not.
        epochs: passes over the text that are allowed; None: as many as it takes.
        block: windows shuffled together. Raise it for sorted data; a block is held in memory.
        seed: of the order of several files.
        separator: text between documents instead of the tokenizer's EOS.
        vocabulary: the model's; the ids are checked against it.
        context: positions the model has.
        index: a file for the places where blocks begin, so that a resumed training finds its
            place without tokenising what came before. Without it, it does that.
        held_out: the stream's first so many windows are set aside for validation (``held``).

    Raises:
        UsageError: no such file, an empty one, no such field, not UTF-8, no EOS, windows longer
            than the model's context, too little text.
    """
    for name, value in (
        ("length", length - 1), ("block", block), ("epochs", epochs), ("held_out", held_out + 1),
    ):  # fmt: skip
        if value is not None and value < 1:
            given, least = {"length": (length, 2), "held_out": (held_out, 0)}.get(name, (value, 1))
            raise UsageError(f"must be at least {least}", field=name, value=given)
    if context is not None and length > context:
        raise UsageError(
            f"the model has {context} positions",
            field="length",
            value=length,
            fix=f"at most {context}",
        )
    if tokenizer is None:
        raise UsageError("a text needs a tokenizer", field="tokenizer", value=None)
    joints = Joints.of(tokenizer, separator)
    opened = _opened(sources, field)
    random.Random(seed).shuffle(opened)
    for source in opened:
        source.check()
    stream = TokenStream(
        opened, tokenizer, length,
        joints=joints, block=block, epochs=epochs, vocabulary=vocabulary, index=index,
        held_out=held_out,
    )  # fmt: skip
    number = 0
    while stream.total is None and number * block <= held_out:
        stream.windows(number)
        number += 1
    if stream.total == 0:
        aside = f" after the {held_out} set aside" if held_out else ""
        raise UsageError(
            f"there are {stream.marks.tokens:,} tokens, less than one window of {length}{aside}",
            field="length",
            value=length,
            fix="a shorter window, or more text",
        )
    if tokens is not None:
        stream.require(tokens, progress)
    return stream


def _opened(sources: Any, field: str) -> list[Source]:
    """Each source that was named, in the order of naming."""
    several = sources if isinstance(sources, list | tuple) else [sources]
    opened: list[Source] = []
    for one in several:
        if isinstance(one, Text):
            opened.append(InMemory(one.documents, dict(one.record())))
        elif isinstance(one, str | Path):
            opened += _named(str(one), field)
        else:
            name = getattr(getattr(one, "info", None), "dataset_name", None)
            opened.append(Hub(one, str(name or type(one).__name__), field))
    if not opened:
        raise UsageError("no text is given", field="text", value=sources)
    paths = [str(s.path.resolve()) for s in opened if isinstance(s, File)]
    if len(set(paths)) < len(paths):
        twice = next(path for path in paths if paths.count(path) > 1)
        raise UsageError(
            "named twice", field="text", value=twice, fix="once; epochs=2 goes over it again"
        )
    return opened


def names_texts(words: Sequence[str | Path]) -> bool:
    """Whether strings name texts, rather than being texts.

    Raises:
        UsageError: some do and some do not.
    """
    those = [isinstance(word, Path) or _is_name(word) for word in words]
    if any(those) and not all(those):
        raise UsageError(
            "some of these name a text and some do not",
            field="text",
            value=str(words[those.index(False)])[:60],
            fix="names of files and corpora alone, or documents alone",
        )
    return bool(those) and all(those)


def _is_name(word: str) -> bool:
    if len(word) > LONGEST or "\n" in word:
        return False
    corpus = word.rpartition(":")[0] if ":" in word else word
    path = Path(word).expanduser()
    looks = path.suffix.lower() in SUFFIXES and not any(map(str.isspace, word))
    matches = glob.has_magic(word) and next(glob.iglob(str(path), recursive=True), None)
    there = looks or corpus in CORPORA or word.startswith(PREFIX) or Path(corpus).is_file()
    return bool(there or path.exists() or matches)


def _named(spec: str, field: str) -> list[Source]:
    if spec.startswith(PREFIX):
        return [open_hub(spec, field)]
    if len(spec) > LONGEST or "\n" in spec:
        raise UsageError(
            "too long to name a file or a corpus",
            field="text",
            value=spec[:60],
            fix="a document itself goes into a list: [text]",
        )
    path = Path(spec).expanduser()
    if path.is_file():
        return [open_file(path, field)]
    if path.is_dir():
        raise UsageError(
            "a folder, not a text",
            field="text",
            value=spec,
            fix=f"name the files in it: {spec.rstrip('/')}/*.jsonl",
        )
    if glob.has_magic(spec):
        found = [p for p in map(Path, sorted(glob.glob(str(path), recursive=True))) if p.is_file()]
        if not found:
            raise UsageError("no file matches", field="text", value=spec)
        return [open_file(p, field) for p in found]
    text = load_text(spec, "train")
    return [InMemory(text.documents, dict(text.record()))]
