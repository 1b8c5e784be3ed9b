"""Re-opening what was written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from secateur.errors import VerificationError
from secateur.export import export_bitmask, reference_logits, verify_folder
from secateur.export.huggingface import compare_logits

Make = Callable[..., tuple[Path, Any, dict[str, torch.Tensor]]]
IDS = torch.arange(32).reshape(2, 16)


def test_a_good_folder_passes(make_folder: Make, tmp_path: Path) -> None:
    folder, model, masks = make_folder()
    logits = reference_logits(model, IDS)
    record = verify_folder(folder, IDS, logits)
    assert record["masked"] == sum(int(m.sum()) for m in masks.values())
    assert record["max_difference"] == 0
    assert record["top1_agreement"] == 1
    export_bitmask(folder, tmp_path / "out")
    assert verify_folder(tmp_path / "out", IDS, logits) == record


def test_sharded_folders_are_counted(make_folder: Make, tmp_path: Path) -> None:
    _, model, masks = make_folder()
    model.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    record = verify_folder(tmp_path / "shards", masks=masks)
    assert record["masked"] == sum(int(m.sum()) for m in masks.values())


def test_other_weights_are_noticed(make_folder: Make) -> None:
    folder, model, _ = make_folder()
    logits = reference_logits(model, IDS)
    state = load_file(folder / "model.safetensors")
    state["model.norm.weight"] *= 1.5
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(VerificationError, match="differs"):
        verify_folder(folder, IDS, logits)


def test_revived_weights_are_noticed(make_folder: Make) -> None:
    folder, _, masks = make_folder()
    name = next(iter(masks))
    state = load_file(folder / "model.safetensors")
    state[f"{name}.weight"][tuple(masks[name].nonzero()[0])] = 1e-6
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(VerificationError, match=r"1 of .* pruned weights are not zero"):
        verify_folder(folder)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float16, 1e-2), (torch.bfloat16, 5e-2)]
)
def test_tolerance_follows_the_type(
    make_folder: Make, dtype: torch.dtype, tolerance: float
) -> None:
    folder, model, _ = make_folder()
    logits = reference_logits(model.to(dtype), IDS)
    gap = torch.zeros_like(logits)
    gap[0, 0, 0] = logits.abs().max()  # of a share of which the difference is made
    for share in (0.5, 2.0):
        expected = logits + share * tolerance * gap * logits[0, 0, 0].sign()
        if share < 1:
            record = verify_folder(folder, IDS, expected, dtype=dtype, device="cpu")
            assert record["relative"] == pytest.approx(share * tolerance, rel=0.1)
        else:
            with pytest.raises(VerificationError, match="differs"):
                verify_folder(folder, IDS, expected, dtype=dtype)


def test_nan_is_a_difference(make_folder: Make) -> None:
    folder, model, _ = make_folder()
    with pytest.raises(VerificationError):
        verify_folder(folder, IDS, reference_logits(model, IDS) * float("nan"))


def test_reference_leaves_the_mode_alone(make_folder: Make) -> None:
    _, model, _ = make_folder()
    model.train()
    reference_logits(model, IDS)
    assert model.training


def test_compare_refuses_other_shapes() -> None:
    with pytest.raises(VerificationError, match="shape"):
        compare_logits(torch.zeros(2, 3), torch.zeros(3, 2))
