"""Cutting parameters, and all that has a parameter's shape, along their dimensions."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence

import torch
from torch import Tensor

from secateur.errors import SecateurError

Cuts = dict[str, dict[int, Tensor]]
"""Parameter name -> dimension -> positions that stay, in their new order (one may come twice)."""


def drop(cuts: Cuts, name: str, dim: int, size: int, positions: Tensor) -> None:
    """Let ``positions`` of a dimension of ``size`` go, besides those that go already."""
    keep = cuts.setdefault(name, {}).get(dim, torch.arange(size))
    gone = torch.zeros(size, dtype=torch.bool)
    gone[positions] = True
    cuts[name][dim] = keep[~gone[keep]]


def take(cuts: Cuts, name: str, dim: int, positions: Tensor) -> None:
    """Let exactly ``positions`` of a dimension stay, in that order."""
    cuts.setdefault(name, {})[dim] = positions


def cut_tensors(
    parameters: Mapping[str, Tensor],
    cuts: Cuts,
    optimizers: Sequence[torch.optim.Optimizer] = (),
    also: Sequence[MutableMapping[str, Tensor]] = (),
) -> None:
    """Cut parameters in place (the objects stay), their gradients and optimizer state.

    Args:
        parameters: by every name (buffers too); tied ones are cut once.
        also: other tensors of a parameter's shape, by its name; replaced in the mapping.

    Raises:
        SecateurError: optimizer state that has neither the parameter's shape nor that of
            its factored moments.
    """
    done: set[int] = set()
    for name, dims in cuts.items():
        parameter = parameters[name]
        shape = parameter.shape
        for tensors in also:
            if name in tensors:
                tensors[name] = _cut(tensors[name], dims)
        if id(parameter) in done:
            continue
        done.add(id(parameter))
        states = [(o, _state(o, parameter, name, dims)) for o in optimizers]
        gradient = None if parameter.grad is None else _cut(parameter.grad, dims)
        parameter.grad = None
        parameter.data = _cut(parameter.data, dims)
        parameter.grad = gradient
        assert len(parameter.shape) == len(shape)
        for optimizer, state in states:
            if state:
                optimizer.state[parameter].update(state)


def _cut(tensor: Tensor, dims: Mapping[int, Tensor]) -> Tensor:
    for dim, positions in dims.items():
        tensor = tensor.index_select(dim, positions.to(tensor.device))
    return tensor.contiguous()


def _state(
    optimizer: torch.optim.Optimizer,
    parameter: Tensor,
    name: str,
    dims: Mapping[int, Tensor],
) -> dict[str, Tensor]:
    """The optimizer's tensors for ``parameter``, cut."""
    shape = parameter.shape
    last = len(shape) - 1
    out: dict[str, Tensor] = {}
    for key, value in optimizer.state.get(parameter, {}).items():
        if not isinstance(value, Tensor) or value.numel() == 1:
            continue
        alike = len(value.shape) == len(shape)
        if alike and all(v in (1, s) for v, s in zip(value.shape, shape, strict=True)):
            own = {d: p for d, p in dims.items() if value.shape[d] == shape[d]}
        elif len(shape) > 1 and value.shape == shape[:-1]:  # means of rows
            own = {d: p for d, p in dims.items() if d != last}
        elif len(shape) > 1 and value.shape == (*shape[:-2], shape[-1]):  # means of columns
            own = {(last - 1 if d == last else d): p for d, p in dims.items() if d != last - 1}
        else:
            raise SecateurError(
                f"the optimizer's '{key}' of '{name}' is {tuple(value.shape)}, the parameter "
                f"{tuple(shape)}: how to cut it is not known",
                fix="use an optimizer whose state has the parameters' shapes, or make a new one",
            )
        out[key] = _cut(value, own)
    return out
