"""Tiny pruned Hugging Face folders to export."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from secateur.masks.store import save_masks

transformers = pytest.importorskip("transformers")

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "qwen2": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 128},
    "mistral": {"num_key_value_heads": 4},
}
COMMON = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def tiny_model(family: str = "llama", dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A random causal LM of the family (its rotary tables stay float32, as when loaded)."""
    torch.manual_seed(0)
    settings = COMMON | FAMILIES.get(family, {}) | changes
    config = transformers.AutoConfig.for_model(family, **settings)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def prune(model: Any, sparsity: float = 0.5) -> dict[str, torch.Tensor]:
    """Remove the smallest share of every block linear in place; returns the masks."""
    masks = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and ".layers." in f".{name}":
            weight = module.weight.data
            count = round(sparsity * weight.numel())
            mask = torch.zeros(weight.numel(), dtype=torch.bool)
            mask[weight.abs().flatten().argsort()[:count]] = True
            masks[name] = mask.reshape(weight.shape)
            weight[masks[name]] = 0
    return masks


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[..., tuple[Path, Any, dict[str, torch.Tensor]]]:
    """Build, prune and save a model; returns its folder, itself and its masks."""

    def make(
        family: str = "llama", dtype: torch.dtype = torch.float32, **changes: Any
    ) -> tuple[Path, Any, dict[str, torch.Tensor]]:
        model = tiny_model(family, dtype, **changes)
        masks = prune(model)
        folder = tmp_path / f"pruned-{family}"
        model.save_pretrained(folder)
        save_masks(folder / "masks.safetensors", masks, {"method": "magnitude"})
        return folder, model, masks

    return make
