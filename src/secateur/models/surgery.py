"""Taking structure out of a model: first as zeros (``apply_mask``), then for real (``shrink``).

Both compute the same function. ``shrink`` keeps every parameter object, so ties, optimizers
and references stay what they were; gradients and optimizer state are cut along. It may be
called again and again: masks always speak in the original model's numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping
from copy import deepcopy
from typing import Any, cast

import torch
from torch import Tensor, nn

from secateur.errors import UsageError
from secateur.masks.structured import StructuredMask, remember, structure_of
from secateur.models.anatomy import text_config
from secateur.models.attention_cut import cut_attention, set_head_counts
from secateur.models.cuts import Cuts, cut_tensors, drop
from secateur.models.norms import compact_norm, mask_norms, unmask_norms
from secateur.models.position_bias import bias_cuts, follow_biases
from secateur.models.unit_search import layout_of
from secateur.models.units import Group, parameters_of, units_of

_ORIGINAL = "original_config"


def all_groups(model: nn.Module, keys: Iterable[str]) -> dict[str, Group]:
    """The groups that a mask with ``keys`` speaks of; heads as single query heads.

    Groups of blocks that are gone as a whole are left out.

    Raises:
        UsageError: a key the model has no group for.
    """
    layout = layout_of(model)
    keys = {key for key in keys if not _in_gone_block(model, key)}
    kinds: list[str] = ["stem"] if "stem" in keys else []
    if keys & set(layout.lists):
        kinds.append("layer")
    if keys & {a.key for a in layout.attentions}:
        kinds.append("head")
    if keys & {m.key for m in layout.mlps}:
        kinds.append("ffn")
    found = {g.key: g for g in units_of(model, kinds, "duplicate")} if kinds else {}
    unknown = sorted(keys - set(found))
    if unknown:
        near = next(iter([*(a.key for a in layout.attentions), *found]), "none")
        raise UsageError(
            f"the model has no group of that name ({len(unknown)} such)",
            field="mask",
            value=unknown[0],
            fix=f"take the mask of this very model; one of its groups is '{near}'",
        )
    return {key: found[key] for key in sorted(keys)}


@torch.no_grad()
def apply_mask(model: nn.Module, mask: StructuredMask) -> None:
    """Zero everything that belongs to the units gone; shapes stay.

    Residual channels also leave the norms: a LayerNorm then looks only at those that stay (the
    module is replaced by one that does), an RMSNorm already does, since the channels are zero.

    Raises:
        UsageError: the mask speaks of groups the model does not have, or in other sizes.
    """
    parameters = parameters_of(model)
    for key, group in all_groups(model, mask.gone).items():
        gone = gone_now(group, mask)
        if not gone.any():
            continue
        if group.kind == "layer":
            _silence(model, key, gone)
            continue
        for part in group.slices:
            tensor = parameters[part.parameter]
            positions = part.index[gone].reshape(-1).to(tensor.device)
            tensor.index_fill_(part.dim, positions, 0.0)
        if group.kind == "stem":
            mask_norms(model, group, ~gone)


@torch.no_grad()
def shrink(
    model: nn.Module,
    mask: StructuredMask,
    *,
    optimizers: Iterable[torch.optim.Optimizer] = (),
    also: Iterable[MutableMapping[str, Tensor]] = (),
) -> StructuredMask:
    """Cut out what ``mask`` names: new shapes, the same function as ``apply_mask``.

    Args:
        model: cut in place; parameters stay the same objects.
        mask: cumulative or not: what is gone already is gone.
        optimizers: their state is cut like the parameters it belongs to.
        also: more tensors by parameter name and of the parameter's shape (averages,
            accumulators, gradient scores); replaced in the mapping.

    Returns:
        Everything gone from the original model, which ``structure_of(model)`` also gives.

    Raises:
        UsageError: a group would be emptied; uneven query heads without ``duplicated``.
        SecateurError: optimizer state of a shape that says not how to cut it.
    """
    keep_original_config(model)
    before = structure_of(model) or StructuredMask()
    groups = all_groups(model, mask.gone)
    layout = layout_of(model)
    parameters = parameters_of(model)
    after = before.union(mask)
    _refuse_empty(groups, after)
    cuts: Cuts = {}
    attentions = {a.key: a for a in layout.attentions}
    counts: dict[str, tuple[int, int]] = {}
    for key, group in groups.items():
        gone = gone_now(group, mask)
        if group.kind == "layer" or not gone.any():
            continue
        if key in attentions:
            may_copy = key in mask.duplicated
            heads, kv_heads = cut_attention(attentions[key], layout.linears, gone, may_copy, cuts)
            counts[key] = (heads, kv_heads)
        else:
            for part in group.slices:
                size = parameters[part.parameter].shape[part.dim]
                drop(cuts, part.parameter, part.dim, size, part.index[gone].reshape(-1))
            if group.kind == "stem":
                for part in group.slices:
                    if part.role == "norm" and part.parameter.endswith(".weight"):
                        norm = model.get_submodule(part.parameter.rpartition(".")[0])
                        compact_norm(norm, group.n_units, int((~gone).sum()))
                unmask_norms(model)
    bias_cuts(model, layout, after, cuts)
    cut_tensors(parameters, cuts, list(optimizers), list(also))
    for key, (heads, kv_heads) in counts.items():
        set_head_counts(model, attentions[key], heads, kv_heads)
    for module in model.modules():
        _sync_sizes(module)
    follow_biases(model, layout, after)
    for key, group in groups.items():
        if group.kind == "layer":
            _drop_layers(model, key, gone_now(group, mask))
    remember(model, after)
    return after


def keep_original_config(model: nn.Module) -> None:
    """Remember the config as it is, if the model was never cut."""
    if _ORIGINAL not in model.__dict__:
        model.__dict__[_ORIGINAL] = deepcopy(getattr(model, "config", None))


def original_config(model: nn.Module) -> Any:
    """The config the model had before it was first cut (its own, if it never was)."""
    return model.__dict__.get(_ORIGINAL, getattr(model, "config", None))


def gone_now(group: Group, mask: StructuredMask) -> Tensor:
    """Which of the group's present units the mask names: bool (n_units,).

    Raises:
        UsageError: the mask counts other units than the original model has.
    """
    gone = mask.gone[group.key]
    if len(gone) != group.total:
        raise UsageError(
            f"the mask counts {len(gone)} units in it, the original model has {group.total}",
            field="mask",
            value=group.key,
            fix="take the mask of this very model",
        )
    return gone[group.original].all(1)


def _in_gone_block(model: nn.Module, key: str) -> bool:
    before = structure_of(model)
    for path, gone in (before.gone if before else {}).items():
        rest = key.removeprefix(f"{path}.")
        number = rest.partition(".")[0]
        if rest != key and number.isdigit() and int(number) < len(gone) and gone[int(number)]:
            return True
    return False


def _refuse_empty(groups: Mapping[str, Group], mask: StructuredMask) -> None:
    for key, group in groups.items():
        if len(mask.gone[key]) == group.total and bool(mask.gone[key].all()):
            raise UsageError(
                f"all {group.total} units of '{key}' would go",
                field="mask",
                value=key,
                fix="keep at least one, or remove the layer as a whole",
            )


def _silence(model: nn.Module, path: str, gone: Tensor) -> None:
    """Make the blocks of a list write nothing to the residual stream."""
    from secateur.models.unit_search import OUTWARD

    layout = layout_of(model)
    for name, (role, module) in layout.linears.items():
        number = name.removeprefix(f"{path}.").partition(".")[0]
        if role in OUTWARD and name.startswith(f"{path}.") and bool(gone[int(number)]):
            for value in module._parameters.values():
                if value is not None:
                    value.zero_()
    for number in torch.nonzero(gone).reshape(-1).tolist():
        for module in model.get_submodule(f"{path}.{number}").modules():
            for value in module._parameters.values():
                if value is not None and value.dim() == 3:  # experts
                    value.zero_()


def _drop_layers(model: nn.Module, path: str, gone: Tensor) -> None:
    """Take blocks out of their list, renumber the rest, and bring the config in line."""
    blocks = cast(nn.ModuleList, model.get_submodule(path))
    keep = [i for i in range(len(blocks)) if not bool(gone[i])]
    left = [blocks[i] for i in keep]
    parent, _, name = path.rpartition(".")
    owner = model.get_submodule(parent)
    setattr(owner, name, nn.ModuleList(left))
    for number, block in enumerate(left):
        for module in block.modules():
            if hasattr(module, "layer_idx"):
                setattr(module, "layer_idx", number)  # noqa: B010 - typed as a module otherwise
    config = text_config(model)
    if config is None:
        return
    for field in ("layer_types", "no_rope_layers", "sliding_window_layers"):
        values = getattr(config, field, None)
        if isinstance(values, list) and len(values) == len(gone):
            setattr(config, field, [values[i] for i in keep])
    config.num_hidden_layers = len(left)


def _sync_sizes(module: nn.Module) -> None:
    """A module's own record of its sizes, from its tensors."""
    weight = module._parameters.get("weight")
    if weight is None:
        return
    shape = tuple(weight.shape)
    sizes: dict[str, Any] = {}
    if isinstance(module, nn.Linear):
        sizes = {"out_features": shape[0], "in_features": shape[1]}
    elif isinstance(module, nn.Embedding):
        sizes = {"embedding_dim": shape[1]}
    elif isinstance(module, nn.LayerNorm):
        sizes = {"normalized_shape": shape}
    elif hasattr(module, "nf"):
        sizes = {"nf": shape[1], "nx": shape[0]}
    for name, value in sizes.items():
        if getattr(module, name, None) != value:
            setattr(module, name, value)
