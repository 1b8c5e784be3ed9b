"""GGUF: read back by gguf's own reader, and by transformers as an independent witness."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from secateur.errors import SecateurError, UsageError
from secateur.export import export_gguf, reference_logits
from secateur.export.gguf import interleave, rope_factors
from secateur.export.gguf_vocabulary import pre_tokenizer

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")
Make = Callable[..., tuple[Path, Any, dict[str, torch.Tensor]]]
IDS = torch.arange(32).reshape(2, 16)


def add_tokenizer(folder: Path, size: int = 320) -> None:
    """A byte-level BPE tokenizer, trained on a few words, with two special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size - 10,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog"] * 20, trainer)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>"
    )
    fast.save_pretrained(folder)


def read(path: Path) -> Any:
    return gguf.GGUFReader(path)


def test_interleave_matches_the_two_rotations() -> None:
    """Rotating halves, then interleaving, is interleaving, then rotating neighbouring pairs."""
    torch.manual_seed(0)
    x, angle = torch.randn(8), torch.rand(4)
    cos, sin = angle.cos(), angle.sin()
    a, b = x[:4], x[4:]
    halves = torch.cat([a * cos - b * sin, b * cos + a * sin])
    pairs = interleave(x, 1).reshape(4, 2)
    u, v = pairs[:, 0], pairs[:, 1]
    rotated = torch.stack([u * cos - v * sin, v * cos + u * sin], 1).reshape(-1)
    assert torch.allclose(interleave(halves, 1), rotated)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_transformers_reads_the_same_model(family: str, make_folder: Make, tmp_path: Path) -> None:
    folder, model, _ = make_folder(family)
    add_tokenizer(folder)
    record = export_gguf(folder, tmp_path / "m.gguf", "f32")
    assert record["verified"]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", dtype=torch.float32
    )
    expected, found = reference_logits(model, IDS), reference_logits(loaded, IDS)
    assert (expected - found).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_types_and_zeros(dtype: str, make_folder: Make, tmp_path: Path) -> None:
    folder, model, masks = make_folder()
    export_gguf(folder, tmp_path / "m.gguf", dtype)
    tensors = {t.name: t for t in read(tmp_path / "m.gguf").tensors}
    gate = tensors["blk.0.ffn_gate.weight"]
    assert gate.tensor_type.name == dtype.upper()
    assert list(gate.shape) == [64, 176]  # GGUF lists the fastest dimension first
    values = torch.from_numpy(gguf.quants.dequantize(gate.data, gate.tensor_type).copy())
    weight = model.model.layers[0].mlp.gate_proj.weight
    mask = masks["model.layers.0.mlp.gate_proj"]
    assert torch.equal(values == 0, mask)
    kind = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[dtype]
    assert torch.equal(values, weight.detach().to(kind).float())
    assert tensors["output_norm.weight"].tensor_type.name == "F32"


def test_vocabulary_round_trip(make_folder: Make, tmp_path: Path) -> None:
    folder, _, _ = make_folder()
    add_tokenizer(folder)
    export_gguf(folder, tmp_path / "m.gguf")
    field = read(tmp_path / "m.gguf").get_field
    assert len(field("tokenizer.ggml.tokens").contents()) == 320
    assert field("tokenizer.ggml.pre").contents() == "gpt-2"
    assert field("tokenizer.ggml.token_type").contents()[0] == int(gguf.TokenType.CONTROL)
    assert field("tokenizer.ggml.bos_token_id").contents() == 0
    ours = transformers.AutoTokenizer.from_pretrained(folder)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    text = "the lazy fox jumps"
    assert theirs(text)["input_ids"] == ours(text)["input_ids"]


def test_without_tokenizer_says_so(make_folder: Make, tmp_path: Path) -> None:
    folder, _, _ = make_folder()
    record = export_gguf(folder, tmp_path / "m.gguf")
    assert "no vocabulary" in record["notes"][0]


def test_llama3_factors_match_transformers() -> None:
    rope = {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    }  # fmt: skip
    config = transformers.LlamaConfig(hidden_size=512, num_attention_heads=4, rope_parameters=rope)
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 5e5 ** -(torch.arange(0, 128, 2) / 128)
    factors = rope_factors(config.to_dict())
    assert factors is not None
    assert torch.allclose(plain / factors, scaled, rtol=1e-5)


def test_known_splitting_rules() -> None:
    digits = {"type": "Sequence", "pretokenizers": [{"type": "Digits"}, {"type": "ByteLevel"}]}
    assert pre_tokenizer({"pre_tokenizer": digits}) == "smollm"
    assert pre_tokenizer({"pre_tokenizer": {"type": "ByteLevel"}}) == "gpt-2"
    assert pre_tokenizer({"pre_tokenizer": {"type": "Whitespace"}}) == "default"
    split = {"type": "Split", "pattern": {"Regex": r"(?i:'s|'t)|\p{N}{1,3}|x"}}
    rule = {"type": "Sequence", "pretokenizers": [split, {"type": "ByteLevel"}]}
    assert pre_tokenizer({"pre_tokenizer": rule}) == "llama-bpe"
    split["pattern"] = {"Regex": r"(?i:'s|'t)|\p{N}|x"}
    assert pre_tokenizer({"pre_tokenizer": rule}) == "qwen2"


def test_refusals_leave_nothing(make_folder: Make, tmp_path: Path) -> None:
    folder, _, _ = make_folder()
    with pytest.raises(UsageError, match="f32, f16, bf16"):
        export_gguf(folder, tmp_path / "m.gguf", "q4_0")
    file = folder / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"model_type": "bloom"}))
    with pytest.raises(UsageError, match="architecture"):
        export_gguf(folder, tmp_path / "m.gguf")
    file.write_text(json.dumps(config | {"rope_parameters": {"rope_type": "yarn"}}))
    with pytest.raises(UsageError, match="RoPE"):
        export_gguf(folder, tmp_path / "m.gguf")
    assert {f.name for f in tmp_path.iterdir()} == {folder.name}


def test_overflow_in_float16_is_refused(make_folder: Make, tmp_path: Path) -> None:
    folder, model, _ = make_folder()
    model.lm_head.weight.data[0, 0] = 1e6
    model.save_pretrained(folder)
    with pytest.raises(SecateurError, match="does not fit"):
        export_gguf(folder, tmp_path / "m.gguf", "f16")
    assert {f.name for f in tmp_path.iterdir()} == {folder.name}
    export_gguf(folder, tmp_path / "m.gguf", "bf16")


def test_where_it_cannot_be_written_is_said(make_folder: Make, tmp_path: Path) -> None:
    folder, _, _ = make_folder()
    with pytest.raises(UsageError, match="name a file"):
        export_gguf(folder, tmp_path)
    with pytest.raises(SecateurError, match="cannot write"):
        export_gguf(folder, folder / "config.json" / "m.gguf")
    assert export_gguf(folder, tmp_path / "new" / "m.gguf")["verified"]
    assert [f.name for f in (tmp_path / "new").iterdir()] == ["m.gguf"]
