"""LLM-Pruner and head pruning as runs: defaults of the method, published sizes, bad input."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import secateur
from secateur.allocation.structured import structured_counts
from secateur.errors import UsageError
from secateur.masks.structured import StructuredMask
from secateur.models.surgery import shrink
from secateur.models.tiny import tiny_model, tiny_tokenizer
from secateur.models.units import units_of

transformers = pytest.importorskip("transformers")

FEW = {"samples": 4, "length": 32}


def runs(method: str, sparsity: float, **settings: Any) -> Any:
    model = tiny_model("llama", num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4)
    return secateur.prune(
        model, tiny_tokenizer(), method=method, sparsity=sparsity, **FEW, **settings
    )


def gone(result: Any) -> dict[str, int]:
    return {key: int(mask.sum()) for key, mask in result.masks.items()}


def test_heads_cuts_heads_over_all_layers_by_default() -> None:
    result = runs("heads", 0.5)
    assert all(key.endswith("self_attn") for key in result.masks)
    assert sum(gone(result).values()) == 16  # 8 of 16 groups of two heads
    assert all(count < 8 for count in gone(result).values())
    ids = torch.arange(4, 20)[None]
    assert torch.isfinite(result.model(ids).logits).all()


def test_uniform_heads_are_ranked_within_their_layer() -> None:
    result = runs("heads", 0.5, structure={"uniform": True})
    assert set(gone(result).values()) == {4}


def test_protected_blocks_keep_their_heads_when_all_layers_compete() -> None:
    result = runs("heads", 0.5, structure={"protect": [0, -1]}, options={"ranking": "random"})
    cut = {key for key, count in gone(result).items() if count}
    assert cut
    assert all(".1." in key or ".2." in key for key in cut)


@pytest.mark.parametrize("kinds", [["head", "ffn"], ["ffn"], ["stem"], ["layer"]])
def test_llm_pruner_delivers_every_kind(kinds: list[str]) -> None:
    result = runs("llm-pruner", 0.25, structure={"kinds": kinds}, options={"steps": 2})
    assert result.report["totals"]["delivered"] == pytest.approx(0.25, abs=0.01)
    ids = torch.arange(4, 20)[None]
    assert torch.isfinite(result.model(ids).logits).all()


@pytest.mark.parametrize(
    ("sizes", "protect", "expected"),
    [
        ((32000, 4096, 32, 32, 32, 11008), (4, 2), 5_422_977_024),  # LLaMA-7B, 26 layers
        ((128256, 4096, 32, 32, 8, 14336), (4, 2), 6_612_586_496),  # Llama 3 8B
        ((32000, 2048, 22, 32, 4, 5632), (4, 4), 945_907_712),  # TinyLlama, 14 layers
    ],
)
def test_published_parameter_counts(
    sizes: tuple[int, ...], protect: tuple[int, int], expected: int
) -> None:
    vocabulary, width, layers, heads, kv, ffn = sizes
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        intermediate_size=ffn,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    with torch.device("cpu"):
        groups = list(units_of(model, ("head", "ffn")))
    first, last = protect
    kept = frozenset({*range(first), *range(layers - last, layers)})
    cuts = structured_counts(groups, 0.25, uniform=True, protect=kept)
    removed = sum(cuts[g.key].removed * g.parameters for g in groups)
    assert sum(p.numel() for p in model.parameters()) - removed == expected
    assert all(
        cuts[g.key].removed == (0 if g.block in kept else math.ceil(g.n_units / 4)) for g in groups
    )


@pytest.mark.parametrize(
    ("method", "settings", "word"),
    [
        ("heads", {"structure": {"kinds": ["ffn"]}}, "does not cut ffn"),
        ("heads", {"options": {"ranking": "best"}}, "ranking"),
        ("llm-pruner", {"options": {"criterion": "element3"}}, "criterion"),
        ("llm-pruner", {"sparsity": "2:4"}, "N:M"),
        ("heads", {"structure": {"at_least": 9}, "sparsity": 0.5}, "sparsity|at_least"),
    ],
)
def test_bad_input_is_named(method: str, settings: dict[str, Any], word: str) -> None:
    sparsity = settings.pop("sparsity", 0.25)
    with pytest.raises(UsageError, match=word):
        runs(method, sparsity, **settings)


@pytest.mark.parametrize("method", ["slimgpt", "llm-pruner", "heads"])
def test_encoders_are_cut_like_decoders(method: str) -> None:
    config = transformers.BertConfig(
        hidden_size=48, num_attention_heads=4, num_hidden_layers=2, intermediate_size=64,
        vocab_size=264, max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.BertForMaskedLM(config).eval()
    result = secateur.prune(model, tiny_tokenizer(), method=method, sparsity=0.5, **FEW)
    assert result.report["totals"]["delivered"] == pytest.approx(0.5, abs=0.01)
    assert torch.isfinite(result.model(torch.arange(4, 20)[None]).logits).all()


@pytest.mark.parametrize("method", ["slimgpt", "llm-pruner", "heads"])
def test_blocks_are_found_by_their_present_place(method: str) -> None:
    """Groups keep the number of the block they had; the blocks that are left move up."""
    model = tiny_model("llama", num_hidden_layers=4)
    mask = StructuredMask({"model.layers": torch.tensor([False, True, False, False])})
    shrink(model, mask)
    result = secateur.prune(model, tiny_tokenizer(), method=method, sparsity=0.5, **FEW)
    cut = {key: count for key, count in gone(result).items() if count}
    assert {key.split(".")[2] for key in cut} == {"0", "2", "3"}
    assert result.report["totals"]["delivered"] == pytest.approx(0.5, abs=0.01)
