"""A figure's protocol: complete, short-named, and never compared with another one."""

from dataclasses import asdict, replace

import pytest
import torch

from secateur.data.windows import Windows, evaluation_windows
from secateur.errors import UsageError
from secateur.evaluation.protocol import Protocol, compare
from secateur.models.tiny import tiny_tokenizer

PROTOCOL = Protocol("pydoc", "0" * 64, "test", 512, 16, 8176, False, "float32", "abc")


def test_it_says_what_the_windows_say() -> None:
    windows = evaluation_windows("pydoc", tiny_tokenizer(), 16, limit=3)
    protocol = Protocol.of(windows, torch.float32, 45)
    text = windows.record["text"]
    assert (protocol.dataset, protocol.split, protocol.sha256) == ("pydoc", "test", text["sha256"])
    assert (protocol.length, protocol.windows, protocol.tokens) == (16, 3, 45)
    assert (protocol.dtype, protocol.bos) == ("float32", False)
    assert protocol.tokenizer == windows.record["tokenizer"]


def test_bare_tokens_are_known_by_their_hash() -> None:
    a, b = (Protocol.of(Windows(torch.arange(n, n + 6).view(2, 3)), "float32", 4) for n in (0, 1))
    assert a.dataset == "tokens"
    assert a.digest != b.digest


def test_the_record_comes_back() -> None:
    assert Protocol.from_record(PROTOCOL.record()) == PROTOCOL
    compare(PROTOCOL, Protocol.from_record(PROTOCOL.record()))


@pytest.mark.parametrize("field", sorted(asdict(PROTOCOL)))
def test_any_difference_changes_the_digest_and_is_refused_by_name(field: str) -> None:
    other = replace(PROTOCOL, **{field: "something else"})
    assert other.digest != PROTOCOL.digest
    with pytest.raises(UsageError, match=f"{field}: .* and something else"):
        compare(PROTOCOL, other)


def test_all_differing_fields_are_named() -> None:
    with pytest.raises(UsageError, match=r"length: 512 and 1024; windows: 16 and 8"):
        compare(PROTOCOL, replace(PROTOCOL, length=1024, windows=8))
