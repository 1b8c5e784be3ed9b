"""Small random models of every family, and a tokenizer for them; nothing is downloaded.

For tests, for trying a method out, and for measuring memory: a model of any depth can be
written to disk without ever being held in memory.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from secateur.errors import UsageError
from secateur.files import write_json
from secateur.models.shards import write_index, write_shard

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

VOCABULARY = 264  # 256 bytes, 4 special tokens, and 4 more to make it divisible by 8
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
_H = {"vocab_size": VOCABULARY, "hidden_size": 48, "n_layer": 2, "n_head": 4}
_MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 32, "num_experts": 4}

# name -> (model_type, what differs from _COMMON: None takes a key out, "=" replaces it all)
_TABLE: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "smollm3": ("smollm3", {}),
    "mistral": ("mistral", {"sliding_window": 16}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "gemma": ("gemma", {"head_dim": 16}),
    "gemma2": ("gemma2", {"head_dim": 16, "query_pre_attn_scalar": 16}),
    "gemma3": ("gemma3_text", {"head_dim": 16, "query_pre_attn_scalar": 16}),
    "opt": ("opt", {"ffn_dim": 96, "word_embed_proj_dim": 48, "num_key_value_heads": None}),
    "gpt2": ("gpt2", {"=": {"vocab_size": VOCABULARY, "n_embd": 48, "n_layer": 2, "n_head": 4}}),
    "gpt_neox": ("gpt_neox", {"rotary_pct": 0.25, "num_key_value_heads": None}),
    "bloom": ("bloom", {"=": _H}),
    "falcon": ("falcon", {"multi_query": True, "num_key_value_heads": None}),
    "falcon_gqa": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "phi3": ("phi3", {}),
    "phi": ("phi", {}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": ("qwen3_moe", {"head_dim": 16, **_MOE}),
    "qwen2_moe": ("qwen2_moe", {"shared_expert_intermediate_size": 64, **_MOE}),
}

FAMILIES: tuple[str, ...] = tuple(_TABLE)


def tiny_config(family: str, **changes: Any) -> Any:
    """The config of a two-block model of ``family`` (see ``FAMILIES``), with ``changes``."""
    from transformers import AutoConfig

    if family not in _TABLE:
        raise UsageError(
            "no such family", field="family", value=family, fix=f"one of {', '.join(FAMILIES)}"
        )
    kind, differences = _TABLE[family]
    base = differences.get("=") or {**_COMMON, **differences}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    values = {**base, **tokens, **changes}
    return AutoConfig.for_model(kind, **{k: v for k, v in values.items() if v is not None})


def tiny_model(family: str, seed: int = 0, **changes: Any) -> Any:
    """A random float32 model of ``family`` in evaluation mode, the same for the same seed.

    Matrices are drawn with variance 1 / d_in, norms near 1 and biases small, so that every
    parameter matters to the output (the usual initialisation leaves biases at zero).
    """
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = AutoModelForCausalLM.from_config(tiny_config(family, **changes))
        randomise(model, seed)
    return model.float().eval()


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> None:
    """Draw every parameter anew, each from its own generator keyed by seed and order."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() > 1:
            parameter.copy_(noise / parameter.shape[-1] ** 0.5)
        else:
            parameter.add_(0.1 * noise)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer: any text, one token a byte, and ``SPECIAL`` as tokens 0 to 3."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    pad, bos, eos, unk = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, bos_token=bos, eos_token=eos, unk_token=unk
    )


def synthetic_llama(
    folder: Path | str,
    blocks: int,
    width: int = 256,
    *,
    mlp: int | None = None,
    heads: int = 4,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    tied: bool = True,
) -> Path:
    """Write a random Llama of any depth, one shard a block, holding one tensor set at a time.

    Args:
        mlp: width inside the MLP; default four times ``width``.

    Returns:
        The folder, which loads with ``AutoModelForCausalLM`` and has a tokenizer.
    """
    from transformers import LlamaConfig

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    inner = mlp or 4 * width
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=2048,
        tie_word_embeddings=tied,
        architectures=["LlamaForCausalLM"],
        dtype=str(dtype).removeprefix("torch."),
        pad_token_id=0,
    )
    write_json(folder / "config.json", config.to_dict())
    tiny_tokenizer().save_pretrained(folder)
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        noise = torch.randn(shape, generator=generator)
        return (noise / shape[-1] ** 0.5 if len(shape) > 1 else 1 + 0.1 * noise).to(dtype)

    square, wide = (width, width), (inner, width)
    shapes = {f"self_attn.{p}_proj.weight": square for p in "qkvo"}
    shapes |= {"mlp.gate_proj.weight": wide, "mlp.up_proj.weight": wide}
    shapes |= {"mlp.down_proj.weight": (width, inner)}
    places: dict[str, str] = {}
    total = 0
    for index in range(-1, blocks):
        if index < 0:
            tensors = {
                "model.embed_tokens.weight": draw(VOCABULARY, width),
                "model.norm.weight": draw(width),
            }
            if not tied:
                tensors["lm_head.weight"] = draw(VOCABULARY, width)
        else:
            stem = f"model.layers.{index}"
            tensors = {f"{stem}.{name}": draw(*shape) for name, shape in shapes.items()}
            for norm in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"{stem}.{norm}.weight"] = draw(width)
        file = f"model-{index + 2:05d}-of-{blocks + 1:05d}.safetensors"
        write_shard(folder / file, tensors)
        places |= dict.fromkeys(tensors, file)
        total += sum(t.nbytes for t in tensors.values())
    write_index(folder, places, total)
    return folder
