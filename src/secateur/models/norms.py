"""Norms over the residual stream when some of its channels are gone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from secateur.models.units import Group

_EPS = ("variance_epsilon", "eps")
_ALIVE = "alive_channels"


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
    exactly. Gemma's gain is 1 + weight. A LayerNorm stays as it is.
    """
    if not is_rms(norm):
        return
    scale_gain(norm, alive_of(norm, before), after)
    see_all(norm)
    for name in _EPS:
        if hasattr(norm, name):
            setattr(norm, name, getattr(norm, name) * before / after)


def scale_gain(norm: nn.Module, before: int, after: int) -> None:
    """Multiply an RMSNorm's gain by sqrt(before / after)."""
    weight = norm._parameters["weight"]
    assert weight is not None
    factor = (before / after) ** 0.5
    if "Gemma" in type(norm).__name__:
        weight.add_(1.0).mul_(factor).sub_(1.0)
    else:
        weight.mul_(factor)


# An RMSNorm whose channels are partly zero, in the parameters it will have once they are cut:
# its output times sqrt(alive / width) is the compact norm's, eps being scaled by the same token.


def alive_of(norm: nn.Module, width: int) -> int:
    """Channels the norm's gain is made for: ``width``, unless ``see_only`` said otherwise."""
    known = norm.__dict__.get(_ALIVE)
    return width if known is None else int(known[0])


def see_only(norm: nn.Module, alive: int, width: int) -> None:
    """Let an RMSNorm over ``width`` channels, all but ``alive`` of them zero, be the one over those."""
    see_all(norm)
    share = (alive / width) ** 0.5
    handle = norm.register_forward_hook(lambda module, args, out: out * share)
    norm.__dict__[_ALIVE] = (alive, handle)


def see_all(norm: nn.Module) -> None:
    """Take back what ``see_only`` did."""
    known = norm.__dict__.pop(_ALIVE, None)
    if known is not None:
        known[1].remove()


def stem_norms(model: nn.Module, stem: Group) -> dict[str, nn.Module]:
    """The norms of the residual stream, by name."""
    names = [s.parameter for s in stem.slices if s.role == "norm"]
    owners = [n.rpartition(".")[0] for n in names if n.endswith(".weight")]
    return {owner: model.get_submodule(owner) for owner in owners}


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
