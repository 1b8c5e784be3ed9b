"""Attention biases that one place computes for all heads of all layers: T5's, and ALiBi.

When layers keep different heads, each must pick its own out of the shared bias. Hooks do
that, so no forward is replaced and a copied or exported model keeps them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from secateur.masks.structured import StructuredMask, structure_of
from secateur.models.anatomy import text_config
from secateur.models.cuts import Cuts, take
from secateur.models.unit_search import AttentionLayout, Layout

_TABLE = "relative_attention_bias"


class _Kept:
    """Positions of a layer's heads in the bias that all layers share."""

    def __init__(self, positions: list[int], total: int) -> None:
        self.positions = positions
        self.total = total
        self.whole: Tensor | None = None


class AlibiOfKeptHeads(_Kept):
    """Before an attention's forward: its own heads' slopes out of all."""

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Cut ``alibi`` (B * H, 1, L) or (B, H, 1, L), and a mask that already contains it."""
        alibi = kwargs.get("alibi")
        if alibi is None:
            return args, kwargs
        kept = torch.tensor(self.positions, device=alibi.device)
        if alibi.dim() == 3:
            whole = alibi.view(-1, self.total, *alibi.shape[1:])
            own = whole.index_select(1, kept).flatten(0, 1)
        else:
            own = alibi.index_select(1, kept)
        kwargs = {**kwargs, "alibi": own}
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[1] == self.total > 1:
            kwargs["attention_mask"] = mask.index_select(1, kept)
        return args, kwargs


class BiasOfKeptHeads(_Kept):
    """Before a T5 self-attention's forward: its own heads' bias; after it: everybody's again."""

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Cut ``position_bias`` (1, H, L, L), computing it first in the layer that owns it."""
        whole = kwargs.get("position_bias")
        if whole is None:
            whole = _compute(module, args[0] if args else kwargs["hidden_states"], kwargs)
        self.whole = whole
        kept = torch.tensor(self.positions, device=whole.device)
        return args, {**kwargs, "position_bias": whole.index_select(1, kept)}

    def after(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Hand the whole bias on to the next layer."""
        whole, self.whole = self.whole, None
        return (output[0], whole, *output[2:])


class NoSharedBias(_Kept):
    """Cross-attention has no bias, only zeros for its own heads: each layer makes its own."""

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Drop another layer's zeros."""
        return args, {**kwargs, "position_bias": None}


def _compute(module: Any, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
    cache = kwargs.get("cache", kwargs.get("past_key_values"))
    cache = getattr(cache, "self_attention_cache", cache)
    queries = hidden.shape[1]
    past, keys = 0, queries
    if cache is not None:
        past = cache.get_seq_length(module.layer_idx)
        keys, _ = cache.get_mask_sizes(queries, module.layer_idx)
    bias: Tensor = module.compute_bias(queries, keys, device=hidden.device, past_seen_tokens=past)
    return bias


def bias_cuts(model: nn.Module, layout: Layout, after: StructuredMask, cuts: Cuts) -> None:
    """Add to ``cuts`` the T5 bias columns that no layer of their stack needs any more."""
    for owner, members in _bias_stacks(model, layout).items():
        now, then = _union(members, structure_of(model)), _union(members, after)
        if now != then:
            columns = torch.tensor([now.index(head) for head in then])
            take(cuts, f"{owner}.{_TABLE}.weight", 1, columns)


def follow_biases(model: nn.Module, layout: Layout, after: StructuredMask) -> None:
    """Let every attention pick its heads' bias, by hooks where layers differ."""
    for at in layout.attentions:
        owner = model.get_submodule(at.owner)
        for hooks in (owner._forward_pre_hooks, owner._forward_hooks):
            for number, hook in list(hooks.items()):
                if isinstance(getattr(hook, "__self__", hook), _Kept):
                    del hooks[number]
                    owner._forward_pre_hooks_with_kwargs.pop(number, None)
                    owner._forward_hooks_with_kwargs.pop(number, None)
    for members in _bias_stacks(model, layout).values():
        union = _union(members, after)
        for at in members:
            kept = _kept(at, after)
            if any(_kept(other, after) != union for other in members):
                owner = model.get_submodule(at.owner)
                hook = BiasOfKeptHeads([union.index(h) for h in kept], len(union))
                owner.register_forward_pre_hook(hook, with_kwargs=True)
                owner.register_forward_hook(hook.after)
    crosses = [a for a in layout.attentions if a.attention == "cross" and _is_t5(model, a)]
    if len({tuple(_kept(a, after)) for a in crosses}) > 1:
        for at in crosses:
            owner = model.get_submodule(at.owner)
            owner.register_forward_pre_hook(NoSharedBias([], 0), with_kwargs=True)
    if uses_alibi(model):
        for at in layout.attentions:
            kept = _kept(at, after)
            total = len(after.gone[at.key]) if at.key in after.gone else len(kept)
            if len(kept) < total:
                hook_ = AlibiOfKeptHeads(kept, total)
                model.get_submodule(at.owner).register_forward_pre_hook(hook_, with_kwargs=True)


def uses_alibi(model: nn.Module) -> bool:
    """True for models whose attention is biased by slopes computed from the number of heads."""
    config = text_config(model)
    return getattr(config, "model_type", "") == "bloom" or bool(getattr(config, "alibi", False))


def has_own_biases(model: nn.Module) -> bool:
    """True if layers pick their bias by hooks, which no stock checkpoint can say."""
    return any(
        isinstance(hook, _Kept)
        for module in model.modules()
        for hook in module._forward_pre_hooks.values()
    )


def _is_t5(model: nn.Module, at: AttentionLayout) -> bool:
    return hasattr(model.get_submodule(at.owner), "has_relative_attention_bias")


def _bias_stacks(model: nn.Module, layout: Layout) -> dict[str, list[AttentionLayout]]:
    """Owner of each T5 bias table -> the self-attentions of its stack."""
    stacks: dict[str, list[AttentionLayout]] = {}
    for at in layout.attentions:
        if at.attention == "self" and _is_t5(model, at):
            stacks.setdefault(at.stack, []).append(at)
    return {
        next(a.owner for a in members if hasattr(model.get_submodule(a.owner), _TABLE)): members
        for members in stacks.values()
    }


def _kept(at: AttentionLayout, mask: StructuredMask | None) -> list[int]:
    if mask is None or at.key not in mask.gone:
        return list(range(at.heads))
    return mask.kept(at.key)


def _union(members: list[AttentionLayout], mask: StructuredMask | None) -> list[int]:
    return sorted({head for at in members for head in _kept(at, mask)})
