"""Reading tensors off disk: exact, lean, and never surprised by a damaged file."""

from __future__ import annotations

import errno
import json
import resource
import struct
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from secateur.errors import SecateurError, UsageError
from secateur.models.shards import (
    INDEX,
    SafetensorsFolder,
    Shard,
    write_index,
    write_shard,
)
from secateur.tensorfile import TensorWriter

KINDS = [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]


def _tensors() -> dict[str, torch.Tensor]:
    base = torch.arange(24).reshape(2, 3, 4)
    out = {f"t{i}": base.to(kind) for i, kind in enumerate(KINDS)}
    return {**out, "empty": torch.zeros(0, 5), "scalar": torch.tensor(2.5)}


def test_reads_what_the_reference_library_wrote(tmp_path: Path) -> None:
    save_file(_tensors(), tmp_path / "model.safetensors")
    folder = SafetensorsFolder(tmp_path)
    assert folder.names() == sorted(_tensors())
    for name, tensor in _tensors().items():
        assert folder.shape(name) == tuple(tensor.shape)
        assert folder.dtype(name) == tensor.dtype
        assert torch.equal(folder.read(name), tensor)
    assert folder.nbytes == sum(t.nbytes for t in _tensors().values())


def test_the_reference_library_reads_what_we_wrote_and_bytes_repeat(tmp_path: Path) -> None:
    one, two = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    write_shard(one, _tensors())
    write_shard(two, dict(reversed(_tensors().items())))
    assert one.read_bytes() == two.read_bytes()
    back = load_file(one)
    assert all(torch.equal(back[name], t) for name, t in _tensors().items())


def test_shards_and_their_index(tmp_path: Path) -> None:
    write_shard(tmp_path / "s1.safetensors", {"a": torch.ones(2)})
    write_shard(tmp_path / "s2.safetensors", {"b": torch.zeros(3)})
    write_index(tmp_path, {"b": "s2.safetensors", "a": "s1.safetensors"}, 20)
    folder = SafetensorsFolder(tmp_path)
    assert folder.names() == ["a", "b"]
    assert torch.equal(folder.read("b"), torch.zeros(3))
    (tmp_path / "s2.safetensors").unlink()
    with pytest.raises(UsageError, match=r"'s2.safetensors' named by .* is missing"):
        SafetensorsFolder(tmp_path)


def test_an_index_that_lies_is_found_out(tmp_path: Path) -> None:
    write_shard(tmp_path / "s1.safetensors", {"a": torch.ones(2)})
    write_index(tmp_path, {"a": "s1.safetensors", "b": "s1.safetensors"}, 8)
    with pytest.raises(SecateurError, match=r"places 'b' in 's1.safetensors'"):
        SafetensorsFolder(tmp_path)
    write_index(tmp_path, {"a": "../s1.safetensors"}, 8)
    with pytest.raises(UsageError, match="missing"):
        SafetensorsFolder(tmp_path)
    (tmp_path / INDEX).write_text("[]")
    with pytest.raises(SecateurError, match="not an index"):
        SafetensorsFolder(tmp_path)


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_any_truncation_is_an_error_that_names_the_file(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "cut.safetensors"
    write_shard(path, {"a": torch.ones(3, 5), "b": torch.arange(7)})
    whole = path.read_bytes()
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(SecateurError, match=r"cut\.safetensors"):
        Shard(path)


@given(header=st.binary(max_size=60), tail=st.binary(max_size=20))
@settings(max_examples=150, deadline=None)
def test_garbage_is_an_error_not_a_crash(
    header: bytes, tail: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "garbage.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + tail)
    empty = header.strip() == b"{}" and not tail
    outcome = nullcontext() if empty else pytest.raises(SecateurError, match=r"garbage\.safe")
    with outcome:
        assert not Shard(path).specs


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [4], "data_offsets": [0, 8]},
        {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]},
        {"dtype": "F32", "shape": "x", "data_offsets": [0, 8]},
        {"shape": [2]},
        7,
    ],
)
def test_impossible_entries_are_refused(entry: Any, tmp_path: Path) -> None:
    header = json.dumps({"w": entry}).encode()
    path = tmp_path / "bad.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(SecateurError, match="'w'"):
        Shard(path)


def test_a_file_cut_after_it_was_opened_is_noticed(tmp_path: Path) -> None:
    write_shard(tmp_path / "model.safetensors", {"a": torch.ones(1000)})
    folder = SafetensorsFolder(tmp_path)
    with open(tmp_path / "model.safetensors", "r+b") as file:
        file.truncate(2000)
    with pytest.raises(SecateurError, match="truncated inside 'a'"):
        folder.read("a")


def test_pickles_are_not_opened(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(UsageError, match=r"pickles, which can run any code.*\n.*save_pretrained"):
        SafetensorsFolder(tmp_path)


def test_an_empty_folder_says_what_is_wanted(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no safetensors"):
        SafetensorsFolder(tmp_path)


def test_a_write_refused_by_the_system_leaves_the_old_file(tmp_path: Path) -> None:
    """A real refusal: the process may not write files beyond 4 kB."""
    path = tmp_path / "model.safetensors"
    write_shard(path, {"a": torch.ones(4)})
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        with pytest.raises(SecateurError, match=r"cannot write.*\n.*ulimit"):
            write_shard(path, {"a": torch.ones(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: TensorWriter, name: str, tensor: torch.Tensor) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(TensorWriter, "write", full)
    with pytest.raises(SecateurError, match="No space left") as caught:
        write_shard(tmp_path / "x.safetensors", {"a": torch.ones(2)})
    assert caught.value.exit_code == 1
    assert list(tmp_path.iterdir()) == []
