"""Floating-point operations of a model, counted from its shapes as they are."""

from __future__ import annotations

from typing import Any

from torch import nn

from secateur.models.discovery import is_experts, is_linear
from secateur.models.unit_search import layout_of


def count_flops(model: nn.Module, tokens: int, *, decode: bool = False) -> dict[str, float]:
    """FLOPs of reading ``tokens`` at once, or of writing one token after them.

    A multiply and an add count as two. Matrices cost 2 d_in d_out a token; the scores and
    sums of attention 4 heads x head_dim for every token attended to (half of them on average
    while reading, causally). Norms, softmax and embeddings look-ups are left out.

    Returns:
        ``attention`` (its projections), ``scores``, ``ffn``, ``head`` (what lies outside the
        blocks) and ``total``.
    """
    layout = layout_of(model)
    attention = {n for a in layout.attentions for n in a.names.values()}
    ffn = {n for m in layout.mlps for n in m.names.values()}
    count = 1 if decode else tokens
    parts: dict[str, float] = {"attention": 0.0, "scores": 0.0, "ffn": 0.0, "head": 0.0}
    for name, module in model.named_modules():
        if is_linear(module):
            weight: Any = module._parameters["weight"]
            kind = "attention" if name in attention else "ffn" if name in ffn else "head"
            parts[kind] += 2.0 * weight.numel() * count
        elif is_experts(module):
            active = getattr(model.config, "num_experts_per_tok", 1)
            for value in module._parameters.values():
                if value is not None and value.dim() == 3:
                    parts["ffn"] += 2.0 * value[0].numel() * active * count
    for at in layout.attentions:
        causal = at.stack == "decoder" and at.attention == "self"
        seen = (tokens + 1) / 2 if causal and not decode else tokens
        parts["scores"] += 4.0 * at.heads * at.head_dim * seen * count
    return parts | {"total": sum(parts.values())}
