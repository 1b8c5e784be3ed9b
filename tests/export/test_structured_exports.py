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


@pytest.mark.parametrize("kind", ["encoder", pytest.param("pair", marks=pytest.mark.slow)])
def test_onnx_of_other_kinds_of_model(kind: str, tmp_path: Path) -> None:
    """An encoder with its mask; an encoder-decoder whose layers pick their own position biases."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    import transformers

    from secateur.export.onnx import export_onnx

    if kind == "encoder":
        bert = transformers.BertConfig(
            hidden_size=48, num_attention_heads=4, num_hidden_layers=1, intermediate_size=64,
            vocab_size=264, max_position_embeddings=64,
        )  # fmt: skip
        transformers.BertModel(bert).save_pretrained(tmp_path / "a")
    else:
        t5 = transformers.T5Config(
            d_model=48, d_kv=12, num_heads=4, num_layers=2, d_ff=64, vocab_size=264,
            decoder_start_token_id=0, pad_token_id=0,
        )  # fmt: skip
        model = transformers.T5ForConditionalGeneration(t5).eval()
        pairs = [{"input_ids": IDS, "labels": IDS[:, :9]}]
        secateur.prune_heads(model, pairs, share=0.4)
        secateur.save_pruned(model, tmp_path / "a")
    assert export_onnx(tmp_path / "a", tmp_path / "m.onnx")["relative"] < 1e-4


def test_folders_transformers_cannot_open_are_named(tmp_path: Path) -> None:
    tiny_model("gpt2").save_pretrained(tmp_path / "a")
    pruned(tmp_path / "b", ranking="global")
    with pytest.raises(UsageError, match="dtype"):
        secateur.load_pruned(tmp_path / "b", dtype="float99")
    config = tmp_path / "a" / "config.json"
    config.write_text(config.read_text().replace('"n_embd": 48', '"n_embd": 60'))
    with pytest.raises(secateur.SecateurError, match=r"belong together|does not hold"):
        secateur.load_pruned(tmp_path / "a")
