"""Norms over the residual stream when some of its channels are gone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from secateur.models.units import Group

_EPS = ("variance_epsilon", "eps")


class MaskedLayerNorm(nn.LayerNorm):
    """LayerNorm over the channels that stay; the others come out as zero.

    Shares the parameters of the LayerNorm it stands for.

    Args:
        norm: the LayerNorm.
        alive: (d,) bool.
    """

    alive: Tensor

    def __init__(self, norm: nn.LayerNorm, alive: Tensor) -> None:
        super().__init__(norm.normalized_shape, norm.eps, device="meta")
        self.weight, self.bias = norm.weight, norm.bias
        self.register_buffer("alive", alive.to(norm.weight.device), persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        """(..., d) -> (..., d)."""
        alive = self.alive.to(input.dtype)
        count = alive.sum()
        mean = (input * alive).sum(-1, keepdim=True) / count
        centred = (input - mean) * alive
        variance = centred.square().sum(-1, keepdim=True) / count
        out = centred * torch.rsqrt(variance + self.eps)
        out = out if self.weight is None else out * self.weight
        return out if self.bias is None else out + self.bias * alive


def is_rms(norm: nn.Module) -> bool:
    """True for norms that divide by the root mean square and take no mean away."""
    kind = type(norm).__name__
    return "RMSNorm" in kind or kind in ("T5LayerNorm", "MT5LayerNorm")


def compact_norm(norm: nn.Module, before: int, after: int) -> None:
    """Scale an RMSNorm so that over ``after`` channels it gives what it gave over ``before``.

    With the other channels zero, gain * sqrt(before / after) and eps * before / after do it
    exactly (spec 02, A.3). Gemma's gain is 1 + weight. A LayerNorm stays as it is.
    """
    if not is_rms(norm):
        return
    weight = norm._parameters["weight"]
    assert weight is not None
    factor = (before / after) ** 0.5
    if "Gemma" in type(norm).__name__:
        weight.add_(1.0).mul_(factor).sub_(1.0)
    else:
        weight.mul_(factor)
    for name in _EPS:
        if hasattr(norm, name):
            setattr(norm, name, getattr(norm, name) * before / after)


def mask_norms(model: nn.Module, stem: Group, alive: Tensor) -> None:
    """Let every LayerNorm of the residual stream look only at the channels that stay.

    Args:
        alive: (n_units,) bool.
    """
    for part in stem.slices:
        owner, _, leaf = part.parameter.rpartition(".")
        if part.role != "norm" or leaf != "weight":
            continue
        norm = model.get_submodule(owner)
        if isinstance(norm, nn.LayerNorm):
            here = torch.ones(norm.weight.shape[0], dtype=torch.bool)
            here[part.index.reshape(-1)] = alive.cpu()[:, None].expand(part.index.shape).reshape(-1)
            if isinstance(norm, MaskedLayerNorm):  # another group's channels are gone already
                here &= norm.alive.cpu()
            _replace(model, owner, MaskedLayerNorm(norm, here))


def unmask_norms(model: nn.Module) -> None:
    """Plain LayerNorms again, as they are after the channels are cut out."""
    for name, module in list(model.named_modules()):
        if isinstance(module, MaskedLayerNorm):
            plain = nn.LayerNorm(module.normalized_shape, module.eps, device="meta")
            plain.weight, plain.bias = module.weight, module.bias
            plain.training = module.training
            _replace(model, name, plain)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, module)
