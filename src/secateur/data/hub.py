"""Documents of data sets of Hugging Face's ``datasets``: streamed, or on disk already."""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Iterator
from typing import Any

from secateur.data.documents import FIELD, Source, text_of
from secateur.errors import MissingExtra, SecateurError, UsageError

PREFIX = "hf:"
_SPEC = re.compile(r"([^,:@]+)(?:@([^,:]+))?(?:,([^:]+))?(?::([^:@,]+))?")


class Hub(Source):
    """A data set's rows, in its order.

    A place is [row, the data set's own state there]: with the state a stream goes on without
    reading what came before.
    """

    def __init__(self, dataset: Any, name: str, field: str = FIELD, words: Any = None) -> None:
        self.dataset, self.name, self.field = dataset, name, field
        self.words = words or {}
        self._streams = hasattr(dataset, "state_dict") and hasattr(dataset, "load_state_dict")
        if self._streams and _shuffles(dataset):
            raise UsageError(
                "a stream shuffled in a buffer cannot be read again from a place in it",
                field="text",
                value=name,
                fix="leave .shuffle out: windows are shuffled in blocks anyway (block)",
            )
        if not self._streams and not hasattr(dataset, "__getitem__"):
            raise UsageError(
                "nothing that can be read from any place in it",
                field="text",
                value=type(dataset).__name__,
                fix="a Dataset or IterableDataset of the package datasets, one split of it",
            )

    def documents(self, at: Any = None) -> Iterator[tuple[Any, str]]:
        """See ``Source.documents``."""
        number, state = at or (0, None)
        rows = self._streamed(number, state) if self._streams else self._stored(number)
        while True:
            try:
                place, row = next(rows)
            except StopIteration:
                return
            except Exception as error:  # whatever a network and a dozen formats can raise
                raise SecateurError(
                    f"cannot be read on ({type(error).__name__}: {error})",
                    field="text",
                    value=self.name,
                    fix="run the same command again: it goes on from its checkpoint",
                ) from error
            text = text_of(row, place[0] + 1, self.name, self.field)
            if text.strip():
                yield place, text

    def record(self) -> dict[str, Any]:
        """See ``Source.record``: the content of a stream cannot be hashed ahead, what it is can."""
        own = getattr(self.dataset, "_fingerprint", None)
        known = "" if self._streams or own is None else str(own)
        features = sorted(map(str, getattr(self.dataset, "features", None) or {}))
        digest = hashlib.sha256(repr((self.name, self.words, features, known)).encode())
        return {"name": self.name, **self.words, "sha256": digest.hexdigest(), "hashed": "name"}

    def _stored(self, number: int) -> Iterator[tuple[Any, Any]]:
        for row in range(number, len(self.dataset)):
            yield [row, None], self.dataset[row]

    def _streamed(self, number: int, state: Any) -> Iterator[tuple[Any, Any]]:
        dataset = copy.deepcopy(self.dataset)  # its state is its own: readings do not meet
        if state is not None:
            dataset.load_state_dict(state)
        rows = iter(dataset)
        while True:
            place = [number, copy.deepcopy(dataset.state_dict())]
            try:
                row = next(rows)
            except StopIteration:
                return
            yield place, row
            number += 1


def _shuffles(dataset: Any) -> bool:
    """Whether an ``IterableDataset`` draws its rows from a buffer, whose content no state holds."""
    part = getattr(dataset, "_ex_iterable", None)
    while part is not None:
        if type(part).__name__ == "BufferShuffledExamplesIterable":
            return True
        part = getattr(part, "ex_iterable", None)
    return False


def open_hub(spec: str, field: str = FIELD) -> Hub:
    """The data set that ``hf:NAME[@REVISION][,CONFIG][:SPLIT]`` names, streamed.

    Raises:
        UsageError: not such a spec.
        MissingExtra: the package ``datasets`` is not there.
        SecateurError: it cannot be opened.
    """
    match = _SPEC.fullmatch(spec.removeprefix(PREFIX))
    if match is None:
        raise UsageError(
            "not the name of a data set",
            field="text",
            value=spec,
            fix="hf:NAME[@REVISION][,CONFIG][:SPLIT], e.g. hf:HuggingFaceFW/fineweb-edu:train",
        )
    name, revision, config, split = match.groups()
    try:
        from datasets import load_dataset
    except ImportError:
        raise MissingExtra("datasets", "data", f"the data set {name}") from None
    words = {"revision": revision, "config": config, "split": split or "train"}
    try:
        dataset = load_dataset(
            name, config, split=words["split"], revision=revision, streaming=True
        )
    except Exception as error:
        raise SecateurError(
            f"'datasets' could not open it: {error}", field="text", value=spec
        ) from error
    return Hub(dataset, spec, field, words)
