"""Taking channels out of a vision network: first as zeros, then for real; the function is the same.

The language models' surgery (``surgery.py``) knows families; this one knows the groups of
``channel_graph``. Cutting of parameters, gradients and optimizer state is shared (``cuts.py``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping

import torch
from torch import Tensor, nn

from secateur.errors import UsageError
from secateur.masks.structured import StructuredMask, remember, structure_of
from secateur.models.attention_heads import narrow_attention, narrow_qkv
from secateur.models.channel_graph import ChannelGroup, ChannelGroups
from secateur.models.channel_products import WHOLE, whole_groups
from secateur.models.channel_sizes import follow_cut
from secateur.models.cuts import Cuts, cut_tensors, drop
from secateur.models.norm_masks import keep_among, see_all_again

Gone = Mapping[str, Tensor] | StructuredMask
"""Group key -> bool (n_units,), True where the unit goes; or a mask in original numbers."""


@torch.no_grad()
def mask_channels(model: nn.Module, groups: ChannelGroups, gone: Gone) -> None:
    """Zero everything that belongs to the units gone; shapes stay.

    A norm over channels they go through is replaced by one that looks only at those that stay. Running
    statistics of batch norms stay as they are.

    Raises:
        UsageError: a group that is not there, cannot be pruned, or would be emptied.
    """
    tensors = _tensors(model)
    for group, units in _chosen(groups, gone):
        for part in group.slices:
            tensor = tensors[part.parameter]
            if isinstance(tensor, nn.Parameter):
                positions = part.index[units].reshape(-1).to(tensor.device)
                tensor.index_fill_(part.dim, positions, 0.0)
        if group.kind == "stem":
            keep_among(model, group, ~units)
            # PyTorch's fused encoder layer would take the norms' weights and leave the norms out.
            narrow_attention(model, set(group.consumers))
    _forget(model)


@torch.no_grad()
def shrink_channels(
    model: nn.Module,
    groups: ChannelGroups,
    gone: Gone,
    optimizers: Iterable[torch.optim.Optimizer] = (),
    also: Iterable[MutableMapping[str, Tensor]] = (),
) -> StructuredMask:
    """Cut units out: new shapes, the same function as ``mask_channels``.

    Args:
        model: cut in place; parameters and buffers stay the same objects.
        groups: of the model as it is; afterwards they are stale, ``channel_groups`` makes new ones.
        gone: what goes.
        optimizers: their state is cut along.
        also: more tensors by parameter name and of the parameter's shape.

    Returns:
        Everything gone from the original model, which ``structure_of(model)`` also gives.

    Raises:
        UsageError: a group that is not there, cannot be pruned, or would be emptied.
    """
    chosen = _chosen(groups, gone)
    tensors = _tensors(model)
    cuts: Cuts = {}
    after = structure_of(model) or StructuredMask()
    after = StructuredMask(dict(after.gone), set(after.duplicated))
    for group, units in chosen:
        after.remove(group, units)
        for part in group.slices:
            size = tensors[part.parameter].shape[part.dim]
            drop(cuts, part.parameter, part.dim, size, part.index[units].reshape(-1))
    touched = {name.rpartition(".")[0] for name in cuts}
    see_all_again(model)
    narrow_qkv(model, {name for group, _ in chosen for name in group.rewritten})
    narrow_attention(model, touched | {t.removesuffix(".out_proj") for t in touched})
    cut_tensors(tensors, cuts, list(optimizers), list(also))
    for group, units in chosen:
        for name, attribute in group.counts:
            module = model.get_submodule(name)
            setattr(module, attribute, getattr(module, attribute) - int(units.sum()))
        follow_cut(model, group.sized, units)
    for name in touched:
        _sync(model.get_submodule(name))
    _forget(model)
    remember(model, after)
    return after


def _forget(model: nn.Module) -> None:
    """Let modules drop what they keep between calls (tables of positions): ``train`` is where."""
    modes = {module: module.training for module in model.modules()}
    model.train()
    for module, mode in modes.items():
        module.training = mode


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


def _chosen(groups: ChannelGroups, gone: Gone) -> list[tuple[ChannelGroup, Tensor]]:
    """The groups that lose something, each with its units, checked."""
    found = []
    mapping = gone.gone if isinstance(gone, StructuredMask) else gone
    for key, units in mapping.items():
        group = groups[key]
        if isinstance(gone, StructuredMask):
            if len(units) != group.total:
                raise UsageError(
                    f"the mask counts {len(units)} units in it, the original model has {group.total}",
                    field="mask",
                    value=key,
                    fix="take the mask of this very model",
                )
            units = gone.of(group)
        units = units.cpu()
        if units.shape != (group.n_units,) or units.dtype != torch.bool:
            raise UsageError(
                f"has {group.n_units} units, the mask is {units.dtype} of shape {tuple(units.shape)}",
                field="mask",
                value=key,
                fix="one bool for each unit, True where it goes",
            )
        if not units.any():
            continue
        if not group.prunable:
            raise UsageError(f"cannot lose channels: {group.reason}", field="mask", value=key)
        if units.all():
            raise UsageError(
                f"all {group.n_units} units would go", field="mask", value=key, fix="keep one"
            )
        found.append((group, units))
    return found


def _sync(module: nn.Module) -> None:
    """A module's own record of its sizes, from its tensors."""
    weight = module._parameters.get("weight")
    if isinstance(module, nn.modules.conv._ConvNd):
        assert weight is not None
        _sync_convolution(module, weight)
    elif isinstance(module, nn.Linear):
        assert weight is not None
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, nn.GroupNorm):
        each = module.num_channels // module.num_groups
        module.num_channels = len(module.weight)
        if module.num_groups > 1:
            module.num_groups = module.num_channels // each
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        line = weight if weight is not None else module.running_mean
        assert line is not None
        module.num_features = len(line)
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(module.weight)
    elif hasattr(module, "normalized_shape") and weight is not None:  # layer norm, RMS norm
        module.__dict__["normalized_shape"] = tuple(weight.shape)


def _sync_convolution(module: nn.modules.conv._ConvNd, weight: Tensor) -> None:
    first, second = weight.shape[:2]
    groups, inputs, outputs = module.groups, module.in_channels, module.out_channels
    if groups > 1 and whole_groups(groups, inputs // groups, module):
        module.__dict__[WHOLE] = True
        each = (inputs if module.transposed else outputs) // groups
        module.groups = first // each
    elif groups > 1:
        module.__dict__[WHOLE] = False
    if module.transposed:
        module.in_channels, module.out_channels = first, second * module.groups
    else:
        module.in_channels, module.out_channels = second * module.groups, first
