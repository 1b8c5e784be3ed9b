"""ONNX and GGUF of pruned and dense models, read back by other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import secateur
from secateur.errors import UsageError
from secateur.export.gguf import export_gguf
from secateur.models.tiny import tiny_model, tiny_tokenizer

IDS = torch.randint(4, 200, (6, 24), generator=torch.Generator().manual_seed(0))


def pruned(folder: Path, family: str = "llama", **structure: Any) -> Any:
    return secateur.prune(
        tiny_model(family),
        tiny_tokenizer(),
        method="unit-magnitude",
        sparsity=0.5,
        calibration=IDS,
        structure=structure,
        out=folder,
    ).model


def test_gguf_of_a_uniform_cut_is_read_back(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    from transformers import AutoModelForCausalLM

    model = pruned(tmp_path / "a", uniform=True)
    record = export_gguf(tmp_path / "a", tmp_path / "m.gguf", "f32")
    assert record["verified"]
    again = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(
            again(input_ids=IDS).logits, model(input_ids=IDS).logits, rtol=1e-4, atol=1e-5
        )


def test_uneven_shapes_are_no_gguf(tmp_path: Path) -> None:
    pruned(tmp_path / "a", ranking="global")
    with pytest.raises(UsageError, match="no stock model"):
        export_gguf(tmp_path / "a", tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()


@pytest.mark.parametrize(
    "structure",
    [
        pytest.param(None, marks=pytest.mark.slow),
        {"kinds": ["head", "ffn"], "ranking": "global"},
    ],
)
def test_onnx_gives_the_same_logits(structure: Any, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from secateur.export.onnx import export_onnx

    folder = tmp_path / "a"
    if structure is None:
        tiny_model("gpt2").save_pretrained(folder)
    else:
        pruned(folder, "bloom", **structure)
    record = export_onnx(folder, tmp_path / "m.onnx")
    assert record["relative"] < 1e-4
    assert (tmp_path / "m.onnx").stat().st_size <= record["bytes"]
    with pytest.raises(UsageError, match="a folder is in the way"):
        export_onnx(folder, tmp_path)
