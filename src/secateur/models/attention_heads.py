"""Multi-head attention that computes with as many heads and channels as its weights have.

``nn.MultiheadAttention`` ties the width inside to the width outside, and so does the attention most
vision transformers carry along (``qkv`` and ``proj``, as in timm), so a cut one has no place in it.
These stand in for them: the same parameters under the same names, the same call.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from secateur.errors import UsageError


class HeadAttention(nn.Module):
    """``nn.MultiheadAttention`` whose inside may be narrower than its outside.

    Args:
        whole: the attention it takes parameters and settings from.
    """

    in_proj_weight: Tensor | None
    in_proj_bias: Tensor | None
    out_proj: nn.Linear
    # Asked for by nn.TransformerEncoderLayer; False keeps it off its fused path.
    _qkv_same_embed_dim = False

    def __init__(self, whole: nn.MultiheadAttention) -> None:
        super().__init__()
        if whole.bias_k is not None or whole.add_zero_attn:
            raise UsageError("an attention with added keys cannot lose heads", field="model")
        self.num_heads, self.head_dim = whole.num_heads, whole.head_dim
        self.batch_first, self.dropout = whole.batch_first, whole.dropout
        for name in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
            self.register_parameter(name, getattr(whole, name))
        self.register_parameter("in_proj_bias", whole.in_proj_bias)
        self.out_proj = whole.out_proj
        self.train(whole.training)

    def _split(self, x: Tensor) -> Tensor:
        """(B, L, h d) -> (B, h, L, d)."""
        return x.reshape(x.shape[0], x.shape[1], self.num_heads, -1).transpose(1, 2)

    def _project(self, *inputs: Tensor, same: bool) -> Any:
        """Query, key and value of what comes in, (B, L, h d) each."""
        packed, bias = self.in_proj_weight, self.in_proj_bias
        if packed is not None and same:
            return F.linear(inputs[0], packed, bias).chunk(3, -1)
        weights: Any = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        weights = weights if packed is None else packed.chunk(3)
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        return [F.linear(x, w, b) for x, w, b in zip(inputs, weights, biases, strict=True)]

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """See ``nn.MultiheadAttention``; weights of attention are not given out.

        ``need_weights`` is taken and gives None: what asks for them gets an error where it uses it.
        """
        single = query.dim() == 2
        inputs = [x.unsqueeze(0) if single else x for x in (query, key, value)]
        if not single and not self.batch_first:
            inputs = [x.transpose(0, 1) for x in inputs]
        q, k, v = (self._split(x) for x in self._project(*inputs, same=query is key is value))
        mask = self._mask(attn_mask, key_padding_mask, q)
        context = F.scaled_dot_product_attention(
            q, k, v, mask, self.dropout if self.training else 0.0, is_causal and mask is None
        )
        out: Tensor = self.out_proj(context.transpose(1, 2).flatten(2))
        if not single and not self.batch_first:
            out = out.transpose(0, 1)
        return (out[0] if single else out), None

    def _mask(self, mask: Tensor | None, padding: Tensor | None, q: Tensor) -> Tensor | None:
        """Both masks as one that is added, (B or 1, 1 or h, L, S)."""
        total: Tensor | None = None
        for part in (mask, padding):
            if part is None:
                continue
            if part.dtype.is_floating_point:
                added = part.to(q.dtype)
            else:
                added = q.new_zeros(part.shape).masked_fill(part, float("-inf"))
            if part is padding:
                added = added.reshape(-1, 1, 1, added.shape[-1])
            elif added.dim() == 3:
                added = added.reshape(q.shape[0], -1, *added.shape[1:])
            total = added if total is None else total + added
        return total


class QkvAttention(nn.Module):
    """Self-attention with one ``qkv`` layer, whose inside may be narrower than its outside.

    Args:
        whole: what ``is_qkv`` says is one; its layers become this one's.
    """

    def __init__(self, whole: Any) -> None:
        super().__init__()
        self.num_heads = int(whole.num_heads)
        width = whole.qkv.out_features // 3
        self.scale = float(getattr(whole, "scale", (width // self.num_heads) ** -0.5))
        for name in ("qkv", "proj", "q_norm", "k_norm", "norm", "attn_drop", "proj_drop"):
            part = getattr(whole, name, None)
            if isinstance(part, nn.Module):
                self.add_module(name, part)
        self.train(whole.training)

    def _then(self, name: str, x: Tensor) -> Tensor:
        """``x`` through a layer, if there is one of that name."""
        part = self._modules.get(name)
        out: Tensor = x if part is None else part(x)
        return out

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """(B, L, d) -> the same; a mask as of ``scaled_dot_product_attention``."""
        count, length = x.shape[:2]
        qkv = self._then("qkv", x).reshape(count, length, 3, self.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self._then("q_norm", q), self._then("k_norm", k)
        drop = self._modules.get("attn_drop")
        share = float(getattr(drop, "p", 0.0)) if self.training else 0.0
        context = F.scaled_dot_product_attention(
            q, k, v, attn_mask, share, is_causal, scale=self.scale
        )
        context = context.transpose(1, 2).reshape(count, length, -1)
        return self._then("proj_drop", self._then("proj", self._then("norm", context)))


def is_qkv(module: nn.Module) -> bool:
    """Whether a module looks like what ``QkvAttention`` can stand in for."""
    parts = [getattr(module, name, None) for name in ("qkv", "proj")]
    heads = getattr(module, "num_heads", None)
    return (
        not isinstance(module, QkvAttention)
        and all(isinstance(part, nn.Linear) for part in parts)
        and isinstance(heads, int)
        and parts[0].out_features % (3 * heads) == 0  # type: ignore[union-attr]
    )


def narrow_qkv(model: nn.Module, names: Iterable[str]) -> None:
    """Let ``QkvAttention`` stand in for these modules."""
    for name in names:
        module = model.get_submodule(name)
        if not isinstance(module, QkvAttention):
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, QkvAttention(module))


def narrow_attention(model: nn.Module, names: set[str]) -> None:
    """Let ``HeadAttention`` stand in for these ``nn.MultiheadAttention`` modules."""
    for name in names:
        module = model.get_submodule(name)
        if isinstance(module, nn.MultiheadAttention):
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, HeadAttention(module))
