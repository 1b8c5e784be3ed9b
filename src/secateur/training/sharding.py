"""Weights, gradients and optimizer state shared out over processes: PyTorch's fully_shard (FSDP2).

What is sharded is a twin of the model: its modules are copies, its parameters are slices of
the model's own. The model itself is not touched while the twin is trained (on a GPU its
weights wait in main memory) and takes over what was trained in the end, so nothing of FSDP
stays behind in it.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from secateur.errors import UsageError
from secateur.training.settings import TrainSettings


def processes() -> int:
    """How many processes there are, or will be once they have met."""
    if torch.distributed.is_initialized():
        return torch.distributed.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))


def refuse_unshardable(settings: TrainSettings, validates: bool, prefix: str = "") -> None:
    """Settings of a sharded training that cannot be, before anything is done.

    Args:
        prefix: of the settings' names, as the user wrote them.

    Raises:
        UsageError: a batch that the processes do not divide, early stopping, float16, moments
            in 8 bits.
    """
    world = processes()
    if settings.batch % world:
        raise UsageError(
            f"sharded, every one of {world} processes takes the same number of windows",
            field=f"{prefix}batch",
            value=settings.batch,
            fix=f"a multiple of {world}",
        )
    if validates:
        raise UsageError(
            "a sharded training does not stop early",
            field=f"{prefix}shard",
            value=True,
            fix="patience: null",
        )
    if settings.optimizer == "adamw8bit":
        raise UsageError(
            "moments in 8 bits are not sharded",
            field=f"{prefix}optimizer",
            value=settings.optimizer,
            fix="adamw",
        )
    if settings.precision == "fp16":
        raise UsageError(
            "gradients that are sharded are not scaled",
            field=f"{prefix}precision",
            value="fp16",
            fix="bf16, or no",
        )


def shard(model: nn.Module, blocks: Sequence[str]) -> nn.Module:
    """The sharded twin of ``model``; every process must call it.

    Args:
        blocks: names of the modules that are gathered one at a time.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    device = next(model.parameters()).device
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    # Parameters are shared with the twin at first, and only its own are replaced by slices.
    twin = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    for name in blocks:
        fully_shard(twin.get_submodule(name), mesh=mesh)
    fully_shard(twin, mesh=mesh)
    if device.type != "cpu":
        for parameter in model.parameters():
            parameter.data = parameter.data.cpu()
    return twin


@torch.no_grad()
def take_over(model: nn.Module, twin: nn.Module, device: torch.device) -> None:
    """Give ``model`` the twin's trained parameters, and its place on ``device`` back."""
    trained = {n: p for n, p in twin.named_parameters() if p.requires_grad}
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(device)
        if name in trained:
            parameter.copy_(whole(trained[name]))


def whole(tensor: Tensor) -> Tensor:
    """A tensor's full value on every process; every process must call it."""
    if isinstance(tensor, DTensor):
        return tensor.full_tensor().detach()
    return tensor.detach()


def alike(value: Tensor, like: Tensor) -> Tensor:
    """``value`` where and as ``like`` is: on its device, this process's slice if it is sharded."""
    if isinstance(like, DTensor):
        return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
    return value.to(like.device)


def wholes(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """``whole`` of each."""
    return {name: whole(tensor) for name, tensor in tensors.items()}
