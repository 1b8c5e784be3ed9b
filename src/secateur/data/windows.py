"""Windows of tokens: drawn from a text for calibration, cut from it in order for evaluation."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from secateur.data.batches import Batch, Shuffled
from secateur.data.corpora import CORPORA
from secateur.data.sequences import sequences, single_stream
from secateur.data.texts import Split, Text, load_text
from secateur.errors import UsageError

Source = Text | str | Path | Tensor | Iterable[Any]
STRETCH = 65_536
"""Longer documents are drawn from in stretches of so many characters: a text of any size
costs no more than what is taken from it."""
SURPLUS = 4
"""A calibration text is read until it holds so many times the tokens asked for."""


@dataclass(frozen=True)
class Windows:
    """Token windows of equal length.

    Attributes:
        ids: (N, L) int64.
        mask: (N, L) bool, True for real tokens; None when there is no padding.
        record: where they come from, JSON-able.
    """

    ids: Tensor
    mask: Tensor | None = None
    record: dict[str, Any] = field(default_factory=dict)
    unit: ClassVar[str] = "tokens"

    def __len__(self) -> int:
        return int(self.ids.shape[0])

    def batch(self, rows: Sequence[int]) -> Batch:
        """These windows."""
        chosen = list(rows)
        return Batch(self.ids[chosen], None if self.mask is None else self.mask[chosen])

    def scored(self, rows: Sequence[int]) -> int:
        """Tokens of these windows whose prediction is scored."""
        return self.batch(rows).predicted

    def order(self, seed: int) -> Shuffled:
        """Endless, each pass a permutation of its own."""
        return Shuffled(self, seed)

    @property
    def length(self) -> int:
        """Tokens in a window."""
        return int(self.ids.shape[1])

    @property
    def tokens(self) -> int:
        """Real tokens in all."""
        return int(self.ids.numel() if self.mask is None else self.mask.sum())

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the tokens themselves."""
        whole = hashlib.sha256(repr(tuple(self.ids.shape)).encode())
        whole.update(self.ids.contiguous().numpy().tobytes())
        if self.mask is not None:
            whole.update(self.mask.contiguous().numpy().tobytes())
        return whole.hexdigest()

    def batches(self, tokens_per_batch: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """(ids, mask) of as many whole windows as ``tokens_per_batch`` allows, at least one."""
        size = max(1, tokens_per_batch // self.length)
        for start in range(0, len(self), size):
            mask = None if self.mask is None else self.mask[start : start + size]
            yield self.ids[start : start + size], mask

    def check_vocabulary(self, size: int) -> Windows:
        """Itself, if every id lies in a vocabulary of ``size``.

        Raises:
            UsageError: the tokens are another model's.
        """
        lowest, highest = int(self.ids.min()), int(self.ids.max())
        if lowest < 0 or highest >= size:
            raise UsageError(
                f"there is the token id {highest if highest >= size else lowest}, "
                f"but the model's vocabulary has {size} entries",
                field="tokenizer",
                value=self.record.get("tokenizer"),
                fix="this is another model's tokenizer: give the one that belongs to the model",
            )
        return self


def calibration_windows(
    source: Source,
    tokenizer: Any,
    samples: int = 64,
    length: int = 512,
    seed: int = 0,
    vocabulary: int | None = None,
) -> Windows:
    """Windows to calibrate on.

    Text is packed: documents in an order drawn by ``seed``, each as the tokenizer begins one,
    ended by its EOS token (or a blank line), the whole cut into windows without overlap, of
    which ``samples`` are drawn. Tokens that are given already are taken as they are, at most
    ``samples`` sequences, shorter ones padded on the right.

    Args:
        source: a path or corpus name (of a corpus its train part, unless ``NAME:PART`` says
            otherwise), a ``Text``, a list of documents, ids (N, L) or (T,), or an iterable of
            ids or of mappings with ``input_ids`` and maybe ``attention_mask``.
        tokenizer: a Hugging Face tokenizer; None will do when tokens are given.
        vocabulary: the model's; given, the ids are checked against it.

    Raises:
        UsageError: too little text, nothing at all, no tokenizer, or ids out of range.
    """
    _positive("samples", samples)
    _positive("length", length)
    if (stream := single_stream(source)) is not None:
        windows = _drawn(stream, samples, length, seed, {"source": "tokens"})
    elif _is_text(source):
        text = _as_text(source, "train")
        stream, record = _packed(text, _needed(tokenizer), samples * length, seed)
        windows = _drawn(stream, samples, length, seed, record)
    else:
        windows = _given(source, samples)
    return windows if vocabulary is None else windows.check_vocabulary(vocabulary)


def evaluation_windows(
    source: Source,
    tokenizer: Any,
    length: int = 512,
    limit: int | None = None,
    vocabulary: int | None = None,
) -> Windows:
    """Windows to measure perplexity on: the protocol of the published figures.

    Documents are joined by a blank line, tokenised once (so that BOS stands at the very start
    and only if the tokenizer puts it there), and cut in order without overlap; the remainder
    is dropped.

    Args:
        source: as for ``calibration_windows``; of a named corpus the test part.
        limit: the first so many windows; None: all.

    Raises:
        UsageError: less text than one window, or ids out of range.
    """
    if length < 2:
        raise UsageError(
            "a window needs two tokens to predict one", field="length", value=length, fix="e.g. 512"
        )
    if limit is not None:
        _positive("windows", limit)
    if (stream := single_stream(source)) is not None:
        windows = _in_order(stream, length, limit, {"source": "tokens"})
    elif _is_text(source):
        text = _as_text(source, "test")
        ids = text_ids(_needed(tokenizer), "\n\n".join(text.documents))
        record = {
            "text": text.record(),
            "source": "text",
            "joined_by": "blank line",
            "bos": ids[:1] == [getattr(tokenizer, "bos_token_id", None)],
            "tokenizer": tokenizer_fingerprint(tokenizer),
        }
        windows = _in_order(torch.tensor(ids, dtype=torch.int64), length, limit, record)
    else:
        windows = _given(source, limit)
    return windows if vocabulary is None else windows.check_vocabulary(vocabulary)


def training_windows(
    source: Source,
    tokenizer: Any,
    tokens: int,
    length: int = 512,
    seed: int = 0,
    vocabulary: int | None = None,
) -> Windows:
    """All windows of a text, or those of its first ``tokens`` tokens, to train on.

    Packed as for calibration, but every window is kept, in the order of the packed stream;
    a training draws from them (``order``).

    Args:
        source: as for ``calibration_windows``; of a named corpus the train part.
        tokens: how many the training will see; a longer text is read no further.

    Raises:
        UsageError: less text than one window, no tokenizer, or ids out of range.
    """
    _positive("length", length - 1)
    _positive("tokens", tokens)
    if (stream := single_stream(source)) is not None:
        windows = _in_order(stream, length, None, {"source": "tokens"})
    elif _is_text(source):
        text = _as_text(source, "train")
        stream, record = _packed(text, _needed(tokenizer), -(-tokens // SURPLUS), seed)
        windows = _in_order(stream, length, None, record)
    else:
        windows = _given(source, None)
    return windows if vocabulary is None else windows.check_vocabulary(vocabulary)


def text_ids(tokenizer: Any, text: str, *, special: bool = True) -> list[int]:
    """The token ids of a text of any length, with the tokenizer's special tokens or without."""
    # verbose=False: a text longer than the model's context is no mistake here, it gets cut.
    ids: list[int] = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    return ids


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """A short hash of a tokenizer's pieces and their ids."""
    pieces = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    return hashlib.sha256(repr(pieces).encode()).hexdigest()[:12]


# -- text to tokens -------------------------------------------------------------------------


def _packed(text: Text, tokenizer: Any, wanted: int, seed: int) -> tuple[Tensor, dict[str, Any]]:
    """One stream of at least ``SURPLUS * wanted`` tokens, or all there are."""
    end = getattr(tokenizer, "eos_token_id", None)
    joint = [end] if end is not None else text_ids(tokenizer, "\n\n", special=False)
    begin = opening(tokenizer)
    stretches = [
        (document[at : at + STRETCH], at == 0, at + STRETCH >= len(document))
        for document in text.documents
        for at in range(0, len(document), STRETCH)
    ]
    random.Random(seed).shuffle(stretches)
    stream: list[int] = []
    for stretch, first, last in stretches:
        stream += begin if first else []
        stream += text_ids(tokenizer, stretch, special=False)
        stream += joint if last else []
        if len(stream) >= SURPLUS * wanted:
            break
    record = {
        "text": text.record(),
        "source": "text",
        "joined_by": "EOS" if end is not None else "blank line",
        "bos": bool(begin),
        "tokenizer": tokenizer_fingerprint(tokenizer),
    }
    return torch.tensor(stream, dtype=torch.int64), record


def _drawn(stream: Tensor, samples: int, length: int, seed: int, record: dict[str, Any]) -> Windows:
    """``samples`` of the stream's windows, in the text's order."""
    available = len(stream) // length
    if available < samples:
        name = record.get("text", {}).get("name", "the calibration tokens")
        raise _too_little(name, len(stream), samples, length)
    chosen = sorted(random.Random(seed).sample(range(available), samples))
    ids = stream[: available * length].view(available, length)[chosen].clone()
    shape = {"samples": samples, "length": length, "tokens": ids.numel(), "seed": seed}
    return Windows(ids, None, record | shape)


def _in_order(stream: Tensor, length: int, limit: int | None, record: dict[str, Any]) -> Windows:
    """The stream's first ``limit`` windows, or all of them; the remainder is dropped."""
    available = len(stream) // length
    if available == 0:
        name = record.get("text", {}).get("name", "the evaluation tokens")
        raise _too_little(name, len(stream), 1, length)
    count = available if limit is None else min(limit, available)
    shape = {"windows": count, "available": available, "length": length, "tokens": count * length}
    ids = stream[: count * length].view(count, length).clone()
    return Windows(ids, None, record | shape)


def opening(tokenizer: Any) -> list[int]:
    """What the tokenizer puts in front of a text."""
    plain, whole = text_ids(tokenizer, "a", special=False), text_ids(tokenizer, "a")
    start = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
    return whole[:start]


def _given(source: Any, at_most: int | None) -> Windows:
    """Tokens that are there already, as they are."""
    ids, mask = sequences(source, at_most)
    tokens = ids.numel() if mask is None else int(mask.sum())
    record = {"source": "tokens", "samples": len(ids), "length": ids.shape[1], "tokens": tokens}
    return Windows(ids, mask, record)


# -- small words ------------------------------------------------------------------------------


def _is_text(source: Any) -> bool:
    if isinstance(source, Text | str | Path):
        return True
    return isinstance(source, list | tuple) and bool(source) and isinstance(source[0], str)


def _as_text(source: Any, part: Split) -> Text:
    if isinstance(source, Text):
        return source
    if isinstance(source, list | tuple):
        documents = [str(document) for document in source if str(document).strip()]
        if not documents:
            raise UsageError("there is no text in it", field="text", value="a list")
        return Text.of(documents, "documents")
    return load_text(source, part if str(source) in CORPORA else "all")


def _needed(tokenizer: Any) -> Any:
    if tokenizer is None:
        raise UsageError(
            "a text needs a tokenizer",
            field="tokenizer",
            value=None,
            fix="give the model's tokenizer, or token ids instead of text",
        )
    return tokenizer


def _positive(name: str, value: int) -> None:
    if value < 1:
        raise UsageError("must be at least 1", field=name, value=value)


def _too_little(name: str, tokens: int, samples: int, length: int) -> UsageError:
    available = tokens // length
    fixes = ["a longer text"]
    if tokens // samples >= 2:
        fixes.insert(0, f"length {tokens // samples} or less")
    if available:
        fixes.insert(0, f"{available} window{'s' * (available > 1)}")
    return UsageError(
        f"'{name}' has {tokens:,} tokens: {available} windows of {length}, not {samples}",
        field="samples" if samples > 1 else "length",
        value=samples if samples > 1 else length,
        fix=" or ".join(fixes),
    )
