"""Small models of every family, and random masks for them."""

from __future__ import annotations

from typing import Any

import torch

from secateur.masks.structured import StructuredMask
from secateur.models.tiny import FAMILIES, VOCABULARY, randomise, tiny_model
from secateur.models.units import units_of

DECODERS = FAMILIES
OTHERS = ("bert", "bert_decoder", "roberta", "t5", "t5_gated", "bart")
MOE = ("mixtral", "qwen3_moe", "qwen2_moe")


def other_model(name: str, attn: str = "sdpa", seed: int = 0) -> Any:
    """A random encoder or encoder-decoder."""
    from transformers import (
        BartConfig,
        BartForConditionalGeneration,
        BertConfig,
        BertLMHeadModel,
        BertModel,
        RobertaConfig,
        RobertaModel,
        T5Config,
        T5ForConditionalGeneration,
    )

    bert = {
        "vocab_size": VOCABULARY,
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 96,
        "max_position_embeddings": 64,
        "attn_implementation": attn,
        "pad_token_id": 0,
    }
    tokens = {"pad_token_id": 0, "decoder_start_token_id": 0, "eos_token_id": 2}
    t5 = {
        "vocab_size": VOCABULARY,
        "d_model": 48,
        "d_kv": 8,
        "d_ff": 96,
        "num_layers": 3,
        "num_heads": 4,
        "attn_implementation": "eager" if attn == "eager" else attn,
        **tokens,
    }
    bart = {
        "vocab_size": VOCABULARY,
        "d_model": 48,
        "encoder_layers": 2,
        "decoder_layers": 3,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 96,
        "max_position_embeddings": 64,
        "attn_implementation": attn,
        "bos_token_id": 1,
        "forced_eos_token_id": None,
        **tokens,
    }
    torch.manual_seed(seed)
    build = {
        "bert": lambda: BertModel(BertConfig(**bert), add_pooling_layer=False),
        "bert_decoder": lambda: BertLMHeadModel(BertConfig(**bert, is_decoder=True)),
        "roberta": lambda: RobertaModel(RobertaConfig(**bert), add_pooling_layer=False),
        "t5": lambda: T5ForConditionalGeneration(T5Config(**t5)),
        "t5_gated": lambda: T5ForConditionalGeneration(
            T5Config(**t5, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
        ),
        "bart": lambda: BartForConditionalGeneration(BartConfig(**bart)),
    }
    model: Any = build[name]()
    randomise(model, seed)
    return model.float().eval()


def model_of(name: str, attn: str = "sdpa", **changes: Any) -> Any:
    """Any of them."""
    if name in DECODERS:
        return tiny_model(name, attn_implementation=attn, **changes)
    return other_model(name, attn)


def random_mask(model: Any, kinds: Any, gqa: str = "groups", seed: int = 0) -> StructuredMask:
    """A random third to half of every group, different in every layer."""
    generator = torch.Generator().manual_seed(seed)
    mask = StructuredMask()
    for number, group in enumerate(units_of(model, kinds, gqa)):  # type: ignore[arg-type]
        n = group.n_units // group.even
        count = max(1, min(n - 1, n // 2 - number % 2)) if n > 1 else 0
        gone = torch.zeros(group.even, n, dtype=torch.bool)
        for run in gone:
            run[torch.randperm(n, generator=generator)[:count]] = True
        mask.remove(group, gone.reshape(-1))
        if gqa == "duplicate" and group.kind == "head":
            mask.duplicated.add(group.key)
    return mask


def inputs_of(model: Any, padded: bool = True, seed: int = 1) -> dict[str, Any]:
    """Two windows of tokens, one left-padded."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, VOCABULARY, (2, 12), generator=generator)
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :4] = 0
        ids[1, :4] = 0
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = torch.randint(4, VOCABULARY, (2, 7), generator=generator)
    return inputs


@torch.no_grad()
def outputs(model: Any, **inputs: Any) -> torch.Tensor:
    """Logits (or last hidden states) at real positions."""
    found = model(**inputs)
    out: torch.Tensor = found.logits if hasattr(found, "logits") else found.last_hidden_state
    if "decoder_input_ids" not in inputs:
        out = out[inputs["attention_mask"].bool()]
    return out
