"""Cutting heads out of one attention, whichever way its projections are laid out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import UsageError
from secateur.models.cuts import Cuts, take
from secateur.models.discovery import is_conv1d
from secateur.models.unit_search import AttentionLayout

_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads")
_WIDTHS = ("all_head_size", "inner_dim", "split_size")


def cut_attention(
    at: AttentionLayout,
    linears: Mapping[str, tuple[str, nn.Module]],
    gone: Tensor,
    may_copy: bool,
    cuts: Cuts,
) -> tuple[int, int]:
    """Add to ``cuts`` what goes with the query heads ``gone``.

    A key-value head goes when all its query heads do. If the groups that stay keep unequal
    numbers of query heads, each survivor gets its own copy of its keys and values, if
    ``may_copy``.

    Args:
        at: the attention as it is now.
        linears: the model's linears by name (``Layout.linears``).
        gone: (heads,) bool.

    Returns:
        Query heads and key-value heads afterwards.

    Raises:
        UsageError: uneven groups and no leave to copy.
    """
    keep = torch.nonzero(~gone).reshape(-1)
    group = torch.arange(at.heads) // at.shared
    left = torch.bincount(group[keep], minlength=at.kv_heads)
    alive = torch.nonzero(left).reshape(-1)
    if len(set(left[alive].tolist())) <= 1:
        copied, per_group = alive, len(keep) // max(1, len(alive))
    elif may_copy:
        copied, per_group = group[keep], 1
    else:
        raise UsageError(
            f"its key-value groups would keep {left.tolist()} query heads, and a model's "
            "attention wants the same number in each",
            field="mask",
            value=at.key,
            fix="gqa: groups or even; or gqa: duplicate, which copies keys and values",
        )
    rows = at.rows()
    q = rows["q"][1][keep]
    k, v = rows["k"][1][copied], rows["v"][1][copied]
    chosen: dict[str, Tensor]
    if not at.fused:
        chosen = {at.names["q"]: q, at.names["k"]: k, at.names["v"]: v}
    elif at.fused == "stacked":
        chosen = {at.names["qkv"]: torch.cat([q.reshape(-1), k.reshape(-1), v.reshape(-1)])}
    else:
        per = q.view(len(copied), per_group, at.head_dim)
        chosen = {at.names["qkv"]: torch.cat([per, k[:, None], v[:, None]], 1)}
    for name, positions in chosen.items():
        module = linears[name][1]
        take(cuts, f"{name}.weight", int(is_conv1d(module)), positions.reshape(-1))
        if module._parameters.get("bias") is not None:
            take(cuts, f"{name}.bias", 0, positions.reshape(-1))
    out = at.names["o"]
    inputs = 1 - int(is_conv1d(linears[out][1]))
    take(cuts, f"{out}.weight", inputs, at.columns()[keep].reshape(-1))
    return len(keep), len(copied)


def set_head_counts(model: nn.Module, at: AttentionLayout, heads: int, kv_heads: int) -> None:
    """Tell the attention's forward how many heads it has now."""
    owner: Any = model.get_submodule(at.owner)
    for names, value in (
        (_HEADS, heads),
        (_KV_HEADS, kv_heads),
        (_WIDTHS, heads * at.head_dim),
        (("num_key_value_groups",), heads // kv_heads),
    ):
        for name in names:
            if isinstance(owner.__dict__.get(name), int):
                setattr(owner, name, value)
    if at.fused == "stacked" and not hasattr(owner, "split_size"):
        # Phi-3 takes the offsets inside its fused projection from the config all layers share.
        owner.config = LayerConfig(owner.config, num_attention_heads=heads)


class LayerConfig:
    """A config shared by all layers, but for a few values that are this layer's own."""

    def __init__(self, shared: Any, **own: Any) -> None:
        self.__dict__["shared"] = shared.shared if isinstance(shared, LayerConfig) else shared
        self.__dict__.update(own)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "shared":  # while it is being copied
            raise AttributeError(name)
        return getattr(self.shared, name)
