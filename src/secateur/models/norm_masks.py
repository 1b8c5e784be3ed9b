"""Norms over channels of a vision network when some of the channels are gone.

A norm over channels (layer norm, RMS norm, group norm of one group) normalises those that stay
among themselves. Until the others are cut, ``AliveNorm`` stands in for it and lets the norm's own
code run, whatever it does around the call of torch: subclasses that permute, cast or scale.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from secateur.models.units import Group


class AliveNorm(nn.Module):
    """A norm that looks only at the channels that stay; the others come out as zero.

    Args:
        whole: the norm, whose parameters these are.
        alive: (d,) bool.
    """

    alive: Tensor

    def __init__(self, whole: nn.Module, alive: Tensor) -> None:
        super().__init__()
        self.__dict__["whole"] = whole  # no child: parameters keep their names
        self._parameters = whole._parameters
        self.register_buffer("alive", alive, persistent=False)
        self.training = whole.training

    def __getattr__(self, name: str) -> Any:
        """What others ask a norm for, ``eps`` for one."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["whole"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the norm's."""
        with _Among(self.alive, self.__dict__["whole"]):
            return self.__dict__["whole"].forward(*args, **kwargs)


class _Among(TorchFunctionMode):
    """Computes a module's norm over channels from the channels that are alive."""

    def __init__(self, alive: Tensor, whole: nn.Module) -> None:
        super().__init__()
        self.alive, self.whole = alive, whole

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        names = {
            F.layer_norm: ("normalized_shape", "weight", "bias", "eps"),
            F.rms_norm: ("normalized_shape", "weight", "eps"),
            F.group_norm: ("num_groups", "weight", "bias", "eps"),
        }.get(func)
        if names is None:
            return func(*args, **(kwargs or {}))
        given = dict(zip(("input", *names), args, strict=False)) | (kwargs or {})
        own = given.get("weight") is self.whole.weight or not self.whole._modules
        if not own or given.get("num_groups", 1) != 1:
            return func(*args, **(kwargs or {}))
        return self._norm(func, **given)

    def _norm(
        self,
        func: Any,
        input: Tensor,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float | None = None,
        **sizes: Any,
    ) -> Tensor:
        grouped = func is F.group_norm  # of one group: over positions too
        dims = list(range(1, input.dim())) if grouped else [-1]
        line = [1] * input.dim()
        line[1 if grouped else -1] = len(self.alive)
        alive = self.alive.to(input).view(line)
        count = alive.sum() * (input[0, 0].numel() if grouped else 1)
        kept = input * alive
        if func is not F.rms_norm:
            kept = (input - kept.sum(dims, keepdim=True) / count) * alive
        if eps is None:
            eps = torch.finfo(input.dtype).eps if func is F.rms_norm else 1e-5
        out = kept * torch.rsqrt(kept.square().sum(dims, keepdim=True) / count + eps)
        out = out if weight is None else out * weight.view(line)
        return out if bias is None else out + bias.view(line) * alive


def keep_among(model: nn.Module, group: Group, alive: Tensor) -> None:
    """Let the norms of a group's channels look only at those that stay.

    Args:
        alive: (n_units,) bool.
    """
    for part in group.slices:
        owner = part.parameter.rpartition(".")[0]
        if part.role != "norm" or part.parameter != f"{owner}.weight":
            continue
        norm = model.get_submodule(owner)
        if isinstance(norm, nn.modules.batchnorm._NormBase):
            continue
        weight = norm._parameters["weight"]
        assert weight is not None
        here = torch.ones(len(weight), dtype=torch.bool)
        here[part.index[~alive.cpu()].reshape(-1)] = False
        if isinstance(norm, AliveNorm):  # another group's channels are gone already
            here &= norm.alive.cpu()
            norm = norm.__dict__["whole"]
        _put(model, owner, AliveNorm(norm, here.to(weight.device)))


def see_all_again(model: nn.Module) -> None:
    """The norms themselves again, once the channels are cut out."""
    for name, module in list(model.named_modules()):
        if isinstance(module, AliveNorm):
            whole = module.__dict__["whole"]
            whole.train(module.training)
            _put(model, name, whole)


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, module)
