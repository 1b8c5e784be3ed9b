"""Bytes on disk and in memory, and the bytes foretold against those an export really takes."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from secateur.errors import UsageError
from secateur.evaluation.size import memory_bytes, predicted_bytes, weight_bytes
from secateur.export.bitmask import compress
from secateur.masks.target import Target
from secateur.models.tiny import tiny_model


def test_parameters_and_buffers_count_and_tied_ones_once() -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5))
    assert memory_bytes(model) == 4 * (15 + 5 + 5 + 5 + 5 + 5) + 8
    model.append(nn.Linear(3, 5))
    model[2].weight = model[0].weight
    assert memory_bytes(model) == 4 * (15 + 5 + 5 + 5 + 5 + 5 + 5) + 8


def test_a_streamed_model_counts_as_if_it_were_there() -> None:
    with torch.device("meta"):
        model = nn.Linear(7, 11, bias=False)
    assert memory_bytes(model) == 4 * 77


def test_weights_on_disk_without_masks_and_settings(tmp_path: Path) -> None:
    for name, size in {"model.safetensors": 100, "masks.safetensors": 7, "config.json": 3}.items():
        (tmp_path / name).write_bytes(b"x" * size)
    assert weight_bytes(tmp_path) == 100
    assert weight_bytes(tmp_path / "masks.safetensors") == 7


def test_shards_are_those_of_the_index(tmp_path: Path) -> None:
    for name in ("model-1.safetensors", "model-2.safetensors", "stray.safetensors"):
        (tmp_path / name).write_bytes(b"x" * 10)
    places = {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-1.safetensors"}
    index = json.dumps({"weight_map": places})
    (tmp_path / "model.safetensors.index.json").write_text(index)
    assert weight_bytes(tmp_path) == 20


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no weights"):
        weight_bytes(tmp_path)


def test_the_saved_model_has_its_memorys_bytes_and_a_header(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    parameters = sum(
        p.numel() * p.element_size() for p in {id(p): p for p in model.parameters()}.values()
    )
    assert parameters < weight_bytes(tmp_path) < parameters + 10_000


def test_bitmask_bytes_are_those_of_the_export() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(33, 20, bias=False), nn.Linear(20, 6))
    mask = torch.rand(20, 33) < 0.6
    weight = model[0].weight.detach().masked_fill(mask, 0)
    parts = compress(weight, mask)
    stored = sum(t.numel() * t.element_size() for t in parts.values())
    rest = 4 * (20 * 6 + 6)
    foretold = predicted_bytes(model, {"0": mask})["bitmask"]
    assert abs(foretold - rest - stored) <= 32  # the shape, and one more row offset
    assert predicted_bytes(model, {"0": mask})["semi_structured"] is None


def test_half_precision_at_half_the_weights() -> None:
    model = nn.Linear(1024, 256, bias=False).to(torch.bfloat16)
    mask = torch.arange(1024).expand(256, -1) % 2 == 0
    foretold = predicted_bytes(model, {"": mask}, Target.parse("2:4"))
    dense = 2 * 1024 * 256
    assert foretold["bitmask"] / dense == pytest.approx(0.5625, abs=0.003)
    assert foretold["semi_structured"] / dense == pytest.approx(0.5625)
