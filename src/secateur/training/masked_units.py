"""Units that are gone though their places are still there: zeros that training cannot wake up.

Everything a gone unit owns is zero: weights, gradients, the optimizer's moments. Norms over the
residual stream look at the channels that stay, in the very parameters they will have once the
model is cut, so a training goes on as if the units had been cut out, and shapes, buckets and
compiled code stay. ``models.surgery.shrink`` makes it real.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping, Sequence

import torch
from torch import Tensor, nn

from secateur.models.norms import is_rms, mask_norms, scale_gain, see_only, stem_norms
from secateur.models.units import Group, parameters_of


@torch.no_grad()
def mask_units(
    model: nn.Module,
    groups: Sequence[Group],
    units: Mapping[str, Sequence[int]],
    gone: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    also: Iterable[MutableMapping[str, Tensor]] = (),
) -> None:
    """Zero ``units`` (group key -> numbers) beside those that are ``gone`` already.

    Args:
        optimizer: its state of the parameter's shape is zeroed in the same places.
        also: other tensors by parameter name and of the parameter's shape; zeroed too.
    """
    parameters = parameters_of(model)
    for group in groups:
        chosen = units.get(group.key)
        if not chosen:
            continue
        for part in group.slices:
            parameter = parameters[part.parameter]
            state = optimizer.state.get(parameter, {}).values()
            alike = [t for t in state if isinstance(t, Tensor) and t.shape == parameter.shape]
            alike += [tensors[part.parameter] for tensors in also if part.parameter in tensors]
            places = part.index[list(chosen)].reshape(-1)
            for tensor in (parameter, *alike):
                tensor.index_fill_(part.dim, places.to(tensor.device), 0.0)
        if group.kind == "stem":
            before = group.n_units - int(gone[group.key].sum())
            for norm in stem_norms(model, group).values():
                if is_rms(norm):
                    scale_gain(norm, before, before - len(chosen))
            now = gone[group.key].clone()
            now[list(chosen)] = True
            view_masked(model, group, now)


def view_masked(model: nn.Module, stem: Group, gone: Tensor) -> None:
    """Let the norms look only at residual channels that are not ``gone`` (bool (n_units,))."""
    if not gone.any():
        return
    for norm in stem_norms(model, stem).values():
        if is_rms(norm):
            see_only(norm, int((~gone).sum()), stem.n_units)
    mask_norms(model, stem, ~gone)


@torch.no_grad()
def silence_gradients(
    model: nn.Module, groups: Sequence[Group], gone: Mapping[str, Tensor]
) -> None:
    """Zero the gradients of units that are gone.

    Between zero weights they are zero already where the activation function maps zero to zero;
    this does not rely on it.
    """
    parameters = parameters_of(model)
    for group in groups:
        if not gone[group.key].any():
            continue
        for part in group.slices:
            gradient = parameters[part.parameter].grad
            if gradient is not None:
                places = part.index[gone[group.key]].reshape(-1)
                gradient.index_fill_(part.dim, places.to(gradient.device), 0.0)
