"""The mask store: exact round trips, equal bytes, and failures that name their cause."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from secateur.errors import SecateurError, UsageError, VerificationError
from secateur.masks.store import (
    check_masks,
    load_masks,
    merge_masks,
    pack,
    popcount,
    save_masks,
    unpack,
)
from secateur.tensorfile import TensorSpec, TensorWriter


def some_mask(*shape: int, seed: int = 0, density: float = 0.5) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < density


shapes = st.lists(st.integers(0, 19), min_size=1, max_size=3)


@settings(max_examples=80, deadline=None)
@given(shapes, st.integers(0, 2**31))
def test_packing_round_trips_and_counts(shape: list[int], seed: int) -> None:
    mask = some_mask(*shape, seed=seed)
    packed = pack(mask)
    assert packed.shape[:-1] == mask.shape[:-1]
    assert packed.shape[-1] == -(-mask.shape[-1] // 8)
    assert torch.equal(unpack(packed, mask.shape), mask)
    assert popcount(packed) == int(mask.sum())


def test_bit_order_is_least_significant_first() -> None:
    mask = torch.zeros(1, 16, dtype=torch.bool)
    mask[0, 0] = mask[0, 9] = True
    assert pack(mask).tolist() == [[1, 2]]


def test_file_round_trip_with_metadata(tmp_path: Path) -> None:
    masks = {"b.0.q": some_mask(5, 13), "a": some_mask(3, 8, seed=1), "empty": some_mask(0, 4)}
    save_masks(tmp_path / "masks.safetensors", masks, {"method": "wanda", "target": "0.5"})
    store = load_masks(tmp_path)
    assert list(store) == sorted(masks)
    assert store.metadata == {"method": "wanda", "target": "0.5"}
    assert all(torch.equal(store[name], mask) for name, mask in masks.items())
    assert store.counts() == {name: int(mask.sum()) for name, mask in masks.items()}
    with pytest.raises(KeyError):
        store["c"]


def test_one_bit_per_weight(tmp_path: Path) -> None:
    save_masks(tmp_path / "m", {"w": some_mask(512, 512)})
    assert (tmp_path / "m").stat().st_size < 512 * 512 / 8 + 1000


def test_equal_masks_give_equal_bytes(tmp_path: Path) -> None:
    masks = {name: some_mask(4, 9, seed=i) for i, name in enumerate("cab")}
    words = {"method": "wanda", "target": "2:4", "scope": "row"}
    save_masks(tmp_path / "1", masks, words)
    save_masks(tmp_path / "2", dict(reversed(masks.items())), dict(reversed(words.items())))
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


def test_readable_as_plain_safetensors(tmp_path: Path) -> None:
    mask = some_mask(6, 11)
    save_masks(tmp_path / "m", {"w": mask})
    assert torch.equal(load_file(tmp_path / "m")["w"], pack(mask))


def test_merged_shards_equal_one_file(tmp_path: Path) -> None:
    masks = {f"layers.{i}.w": some_mask(4, 10, seed=i) for i in range(5)}
    words = {"method": "wanda"}
    for i, (name, mask) in enumerate(masks.items()):
        save_masks(tmp_path / f"{i}", {name: mask}, words | {"transposed": [name]})
    merge_masks([tmp_path / f"{i}" for i in range(5)], tmp_path / "all")
    save_masks(tmp_path / "direct", masks, words | {"transposed": sorted(masks)})
    assert (tmp_path / "all").read_bytes() == (tmp_path / "direct").read_bytes()


def test_merge_refuses_overlap_and_keeps_common_words(tmp_path: Path) -> None:
    save_masks(tmp_path / "1", {"w": some_mask(2, 2)}, {"method": "wanda", "block": 0})
    save_masks(tmp_path / "2", {"w": some_mask(2, 2)}, {"method": "wanda", "block": 1})
    save_masks(tmp_path / "3", {"v": some_mask(2, 2)}, {"method": "wanda", "block": 1})
    with pytest.raises(SecateurError, match="'w' is both in"):
        merge_masks([tmp_path / "1", tmp_path / "2"], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    merge_masks([tmp_path / "1", tmp_path / "3"], tmp_path / "out", {"target": "0.5"})
    assert load_masks(tmp_path / "out").metadata == {"method": "wanda", "target": "0.5"}


def test_check_accepts_kept_zeros_and_counts() -> None:
    mask = some_mask(8, 8)
    weight = torch.randn(8, 8).masked_fill(mask, 0)
    weight[(~mask).nonzero()[0].unbind()] = 0.0
    assert check_masks({"m": mask}, {"m.weight": weight}) == {"m": int(mask.sum())}


@pytest.mark.parametrize("value", [1e-30, float("nan")])
def test_check_names_matrix_and_count(value: float) -> None:
    mask = torch.tensor([[True, True, False]])
    with pytest.raises(VerificationError, match=r"'m': 1 of 2 pruned weights are not zero"):
        check_masks({"m": mask}, {"m": torch.tensor([[0.0, value, 2.0]])})


def test_check_names_missing_weights_and_shapes() -> None:
    mask = some_mask(2, 3)
    with pytest.raises(VerificationError, match="no such weight"):
        check_masks({"m": mask}, {})
    with pytest.raises(VerificationError, match=r"\(2, 3\), its weight \(3, 2\)"):
        check_masks({"m": mask}, {"m": torch.zeros(3, 2)})


def test_transposed_checkpoint_tensors(tmp_path: Path) -> None:
    mask = some_mask(6, 6)
    save_masks(tmp_path / "m", {"c_attn": mask}, {"transposed": ["c_attn"]})
    store = load_masks(tmp_path / "m")
    weight = torch.ones(6, 6).masked_fill(mask, 0)
    check_masks(store, {"c_attn.weight": weight.T})
    with pytest.raises(VerificationError):
        check_masks(store, {"c_attn.weight": weight})


def test_not_a_mask() -> None:
    with pytest.raises(UsageError, match="bool"):
        pack(torch.ones(2, 2))


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        load_masks(tmp_path)
    (tmp_path / "junk").write_bytes(b"junk" * 10)
    with pytest.raises(SecateurError, match="damaged"):
        load_masks(tmp_path / "junk")
    save_file({"w": torch.zeros(2)}, tmp_path / "other")
    with pytest.raises(UsageError, match="not a mask file"):
        load_masks(tmp_path / "other")
    save_masks(tmp_path / "m", {"w": some_mask(64, 64)})
    (tmp_path / "m").write_bytes((tmp_path / "m").read_bytes()[:-5])
    with pytest.raises(SecateurError, match="damaged"):
        load_masks(tmp_path / "m")


def test_bits_beyond_the_last_column_are_noticed(tmp_path: Path) -> None:
    header = {"format": "secateur.masks.1", "metadata": "{}", "shapes": json.dumps({"w": [1, 3]})}
    save_file({"w": torch.tensor([[255]], dtype=torch.uint8)}, tmp_path / "m", metadata=header)
    with pytest.raises(SecateurError, match=r"'w'.*beyond its last column"):
        load_masks(tmp_path / "m")["w"]


def test_unwritten_tensors_leave_nothing(tmp_path: Path) -> None:
    spec = TensorSpec(torch.uint8, (2,))
    path, zeros = tmp_path / "f", torch.zeros(2, dtype=torch.uint8)
    with (
        pytest.raises(ValueError, match="never written: b"),
        TensorWriter(path, {"a": spec, "b": spec}) as writer,
    ):
        writer.write("a", zeros)
    with pytest.raises(ValueError, match="announced"), TensorWriter(path, {"a": spec}) as writer:
        writer.write("a", torch.zeros(3, dtype=torch.uint8))
    assert list(tmp_path.iterdir()) == []


def test_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        save_masks(tmp_path / "m", {"w": some_mask(2, 2), "x": torch.ones(2, 2)})
    assert list(tmp_path.iterdir()) == []
