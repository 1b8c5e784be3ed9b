"""What differs from one family of language models to the next, as a table.

A family says where its blocks lie, what each linear in a block is for, and how a fused
query-key-value matrix is laid out. Everything else (shapes, experts, biases) is read from
the modules themselves, so adding a family is adding a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

Layout = Literal["stacked", "grouped"]
"""Rows of a fused qkv matrix: ``stacked`` = all Q, all K, all V; ``grouped`` = for each
key-value head its query heads, then its key, then its value."""

SWIGLU = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"}
QKVO = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o"}
EXPERTS = {"experts.gate_up_proj": "gate_up", "experts.down_proj": "down"}
H_TO_4H = {"mlp.dense_h_to_4h": "fc1", "mlp.dense_4h_to_h": "fc2"}
# Mixtral names its expert matrices after the paper: w1 gates, w3 goes up, w2 comes down.
W123 = {"w1": "gate", "w3": "up", "w2": "down"}

GENERIC_ROLES: Mapping[str, str] = {
    **QKVO,
    **SWIGLU,
    **EXPERTS,
    **H_TO_4H,
    "out_proj": "o",
    "qkv_proj": "qkv",
    "query_key_value": "qkv",
    "c_attn": "qkv",
    "gate_up_proj": "gate_up",
    "fc1": "fc1",
    "fc2": "fc2",
    "c_fc": "fc1",
    "mlp.c_proj": "fc2",
    "attn.c_proj": "o",
    "query": "q",
    "key": "k",
    "value": "v",
}


@dataclass(frozen=True)
class Attention:
    """Heads of one attention layer; ``n_kv_heads`` < ``n_heads`` is grouped-query attention."""

    n_heads: int
    n_kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class Family:
    """One row of the table.

    Attributes:
        name: as shown to the user.
        model_types: ``config.model_type`` values it covers.
        blocks: dotted paths at which its list of blocks may lie, first match wins.
        roles: end of a module's name -> q k v qkv o gate up gate_up down fc1 fc2.
        routers: ends of names that choose experts; never pruned.
        qkv: row layout of the fused qkv matrix, if it has one.
        grouped_query: key-value heads may be fewer than query heads.
    """

    name: str
    model_types: tuple[str, ...]
    blocks: tuple[str, ...] = ("model.layers", "model.language_model.layers")
    roles: Mapping[str, str] = field(default_factory=lambda: {**QKVO, **SWIGLU})
    routers: tuple[str, ...] = ()
    qkv: Layout | None = None
    grouped_query: bool = True

    def attention(self, config: Any) -> Attention:
        """Head counts from the model's (text) config."""
        heads = int(config.num_attention_heads)
        if self.name == "falcon":
            if config.new_decoder_architecture:
                kv_heads = int(config.num_kv_heads)
            else:
                kv_heads = 1 if config.multi_query else heads
        elif self.grouped_query:
            kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
        else:
            kv_heads = heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        return Attention(heads, kv_heads, int(head_dim))


FAMILIES: tuple[Family, ...] = (
    Family("llama", ("llama", "smollm3")),
    Family("mistral", ("mistral", "ministral", "ministral3")),
    Family("qwen2", ("qwen2",)),
    Family("qwen3", ("qwen3",)),
    Family("gemma", ("gemma", "gemma2", "gemma3_text", "gemma3")),
    Family(
        "opt",
        ("opt",),
        ("model.decoder.layers",),
        {"q_proj": "q", "k_proj": "k", "v_proj": "v", "out_proj": "o", "fc1": "fc1", "fc2": "fc2"},
        grouped_query=False,
    ),
    Family(
        "gpt2",
        ("gpt2",),
        ("transformer.h",),
        {"attn.c_attn": "qkv", "attn.c_proj": "o", "mlp.c_fc": "fc1", "mlp.c_proj": "fc2"},
        qkv="stacked",
        grouped_query=False,
    ),
    Family(
        "gpt_neox",
        ("gpt_neox",),
        ("gpt_neox.layers",),
        {"attention.query_key_value": "qkv", "attention.dense": "o", **H_TO_4H},
        qkv="grouped",
        grouped_query=False,
    ),
    Family(
        "bloom",
        ("bloom",),
        ("transformer.h",),
        {"query_key_value": "qkv", "self_attention.dense": "o", **H_TO_4H},
        qkv="grouped",
        grouped_query=False,
    ),
    Family(
        "falcon",
        ("falcon",),
        ("transformer.h",),
        {"query_key_value": "qkv", "self_attention.dense": "o", **H_TO_4H},
        qkv="grouped",
    ),
    Family(
        "phi3",
        ("phi3", "phi4"),
        roles={"qkv_proj": "qkv", "o_proj": "o", "gate_up_proj": "gate_up", "down_proj": "down"},
        qkv="stacked",
    ),
    Family(
        "phi",
        ("phi",),
        roles={
            "q_proj": "q",
            "k_proj": "k",
            "v_proj": "v",
            "self_attn.dense": "o",
            "fc1": "fc1",
            "fc2": "fc2",
        },
    ),
    Family(
        "bert",
        ("bert", "roberta", "xlm-roberta", "electra"),
        ("bert.encoder.layer", "roberta.encoder.layer", "electra.encoder.layer", "encoder.layer"),
        {
            "self.query": "q",
            "self.key": "k",
            "self.value": "v",
            "attention.output.dense": "o",
            "crossattention.output.dense": "o",
            "intermediate.dense": "fc1",
            "output.dense": "fc2",
        },
        grouped_query=False,
    ),
    Family(
        "t5",
        ("t5", "mt5"),
        (),
        {
            **{f"{a}Attention.{m}": m for a in ("Self", "EncDec") for m in "qkvo"},
            "DenseReluDense.wi": "fc1",
            "DenseReluDense.wi_0": "gate",
            "DenseReluDense.wi_1": "up",
            "DenseReluDense.wo": "down",
        },
        grouped_query=False,
    ),
    Family(
        "bart",
        ("bart", "mbart", "marian", "pegasus", "m2m_100"),
        (),
        {"q_proj": "q", "k_proj": "k", "v_proj": "v", "out_proj": "o", "fc1": "fc1", "fc2": "fc2"},
        grouped_query=False,
    ),
    Family(
        "mixtral",
        ("mixtral",),
        roles={**QKVO, **EXPERTS, **W123},
        routers=("mlp.gate", "block_sparse_moe.gate"),
    ),
    Family(
        "qwen_moe",
        ("qwen3_moe", "qwen2_moe"),
        roles={**QKVO, **SWIGLU, **EXPERTS},
        routers=("mlp.gate", "mlp.shared_expert_gate"),
    ),
)

GENERIC_ROUTERS = ("router", "mlp.gate", "block_sparse_moe.gate", "shared_expert_gate")

UNSUPPORTED: Mapping[str, str] = {
    "albert": "ALBERT runs one block many times with the same weights; blocks cannot be cut apart",
}


def family_of(model_type: str | None) -> Family | None:
    """The row covering ``config.model_type``, or None."""
    return next((f for f in FAMILIES if model_type in f.model_types), None)


def ends_with(name: str, suffix: str) -> bool:
    """True if ``suffix`` is ``name`` or a whole dotted tail of it.

    >>> ends_with("mlp.gate", "gate"), ends_with("mlp.investigate", "gate")
    (True, False)
    """
    return name == suffix or name.endswith("." + suffix)


def role_of(name: str, family: Family | None) -> str:
    """The role of the linear ``name``: longest matching suffix of the family's table, or ""."""
    roles = family.roles if family else GENERIC_ROLES
    matches = [suffix for suffix in roles if ends_with(name, suffix)]
    return roles[max(matches, key=len)] if matches else ""


def is_router(name: str, family: Family | None) -> bool:
    """True if ``name`` is a linear that chooses experts."""
    routers = family.routers if family else GENERIC_ROUTERS
    return any(ends_with(name, suffix) for suffix in routers)


def qkv_rows(layout: Layout, attention: Attention) -> dict[str, Tensor]:
    """Which rows of a fused qkv matrix belong to which head.

    Returns:
        ``q`` (n_heads, head_dim), ``k`` and ``v`` (n_kv_heads, head_dim) of row numbers.
    """
    heads, kv, dim = attention.n_heads, attention.n_kv_heads, attention.head_dim
    rows = torch.arange((heads + 2 * kv) * dim)
    if layout == "stacked":
        q, k, v = rows.split([heads * dim, kv * dim, kv * dim])
        return {"q": q.view(heads, dim), "k": k.view(kv, dim), "v": v.view(kv, dim)}
    per_group = heads // kv
    grouped = rows.view(kv, per_group + 2, dim)
    return {
        "q": grouped[:, :per_group].reshape(heads, dim),
        "k": grouped[:, per_group],
        "v": grouped[:, per_group + 1],
    }
