"""Low-rank adapters that respect a mask, as functions on tensors.

W (d_out, d_in) is the pruned weight, zero where it is gone; K its uint8 mask of what is kept
(None: all of it); B (d_out, r), A (r, d_in) and s = alpha / r the adapter. The weight a layer
computes with is

    lora, lora-prune   W + s BA
    mask-lora          W + s K ⊙ BA
    scale-lora         W ⊙ BA
    spp                W + s W ⊙ BA

and the weight it is merged to is the same, except that lora-prune drops what would fill the
zeros: W + s K ⊙ BA. The masked products need the whole product BA before the mask is
applied, so they run as one autograd function that builds the effective weight in a single
buffer, forgets it, and builds it again in backward: beyond what a frozen layer holds it
keeps only the layer's input, as plain LoRA does.

Source: Zimmer, Andoni, Spiegel and Pokutta, PERP: Rethinking the Prune-Retrain Paradigm in
the Era of LLMs, 2023 (MaskLoRA, ScaleLoRA, LoRA-Prune); Hu et al., LoRA, ICLR 2022; Lu et
al., SPP: Sparsity-Preserved Parameter-Efficient Fine-Tuning, ICML 2024.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from secateur.kernels.masking import keep_only

Kind = Literal["lora", "lora-prune", "mask-lora", "scale-lora", "spp"]
Init = Literal["broken", "ones"]

KINDS: tuple[Kind, ...] = get_args(Kind)
MASKED: tuple[Kind, ...] = ("mask-lora", "scale-lora", "spp")
"""Those whose effective weight has the zeros of the weight itself."""


@dataclass(frozen=True)
class Drop:
    """Dropout on the entries of BA in one forward and its backward."""

    rate: float
    seed: int


def start(
    kind: Kind, shape: tuple[int, int], rank: int, generator: torch.Generator, init: Init = "broken"
) -> tuple[Tensor, Tensor]:
    """Initial A (r, d_in) and B (d_out, r), float32, with which the layer is what it was.

    LoRA's kinds: A Kaiming-uniform with a = √5, B = 0. ``scale-lora`` starts with BA all ones.
    As published (``ones``) both are 1/√r everywhere; their rows and columns then get equal
    gradients for ever, and BA stays of rank one. ``broken`` has the same product without the
    symmetry: B's first column and A's first row are ones, the rest of B is zero and the
    rest of A drawn as in LoRA.
    """
    rows, columns = shape
    bound = 1 / math.sqrt(columns)
    a = torch.empty(rank, columns).uniform_(-bound, bound, generator=generator)
    b = torch.zeros(rows, rank)
    if kind == "scale-lora":
        if init == "ones":
            a.fill_(rank**-0.5)
            b.fill_(rank**-0.5)
        else:
            a[0] = 1.0
            b[:, 0] = 1.0
    return a, b


def dropped(shape: torch.Size, drop: Drop, device: torch.device) -> Tensor:
    """Which entries of BA take part this time, uint8; the same for the same seed."""
    generator = torch.Generator(device).manual_seed(drop.seed)
    out = torch.empty(shape, dtype=torch.uint8, device=device)
    return out.bernoulli_(1 - drop.rate, generator=generator)


def effective(
    kind: Kind,
    weight: Tensor,
    keep: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
    drop: Drop | None = None,
) -> Tensor:
    """The weight a layer computes with, (d_out, d_in), in the type of ``weight``; a new tensor.

    Exactly zero where ``weight`` is gone for the kinds in ``MASKED``. With ``drop``
    entries of BA are left out at random: they add nothing (and the others are enlarged, as
    dropout does); in ScaleLoRA they multiply by one.
    """
    a, b = a.to(weight.dtype), b.to(weight.dtype)
    if drop is not None:
        part = dropped(weight.shape, drop, weight.device)
        if kind == "scale-lora":
            return keep_only((b @ a).sub_(1.0), part).add_(1.0).mul_(weight)
        update = keep_only((b @ a).mul_(scale / (1 - drop.rate)), part)
        if kind == "spp":
            return update.add_(1.0).mul_(weight)
        return keep_only(update, keep).add_(weight)
    if kind == "scale-lora":
        return (b @ a).mul_(weight)
    if kind == "spp":
        return (b @ a).mul_(scale).add_(1.0).mul_(weight)
    # The weight is zero where it is gone, so masking the sum masks the product.
    whole = torch.addmm(weight, b, a, alpha=scale)
    return keep_only(whole, keep) if kind == "mask-lora" else whole


def merged(
    kind: Kind, weight: Tensor, keep: Tensor | None, a: Tensor, b: Tensor, scale: float
) -> Tensor:
    """What the weight becomes, float32 (d_out, d_in); zero where it is gone, for every kind.

    ``lora-prune`` loses here what its adapter put on weights that are gone, so that the merged
    layer differs from the trained one; the other kinds lose nothing.
    """
    folded: Kind = "mask-lora" if kind in ("lora", "lora-prune") else kind
    out = effective(folded, weight.float(), keep, a.float(), b.float(), scale)
    return out.add_(0.0)  # no negative zeros


class _Masked(torch.autograd.Function):
    """y = x Eᵀ + bias with E = ``effective(...)``, of which only one exists at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        keep: Tensor | None,
        a: Tensor,
        b: Tensor,
        bias: Tensor | None,
        scale: float,
        kind: Kind,
        drop: Drop | None,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, keep, a, b)
        ctx.how = (kind, scale, drop)
        ctx.bias_type = None if bias is None else bias.dtype
        shifted = None if bias is None else bias.to(x.dtype)
        return F.linear(x, effective(kind, weight.to(x.dtype), keep, a, b, scale, drop), shifted)

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> tuple[Tensor | None, ...]:
        g = upstream[0]
        x, weight, keep, a, b = ctx.saved_tensors
        kind, scale, drop = ctx.how
        weight = weight.to(x.dtype)
        da = db = dx = dbias = None
        rows = g.reshape(-1, g.shape[-1])
        if ctx.needs_input_grad[3] or ctx.needs_input_grad[4]:
            dense = rows.T @ x.reshape(-1, x.shape[-1])  # dL/dE
            factor = scale
            if kind == "mask-lora":
                keep_only(dense, keep)
            else:
                dense.mul_(weight)
            if drop is not None and kind != "scale-lora":
                factor = scale / (1 - drop.rate)
            if drop is not None:
                keep_only(dense, dropped(dense.shape, drop, dense.device))
            db = (dense @ a.to(x.dtype).T).to(b.dtype).mul_(factor)
            da = (b.to(x.dtype).T @ dense).to(a.dtype).mul_(factor)
            del dense
        if ctx.needs_input_grad[5]:
            dbias = rows.sum(0).to(ctx.bias_type)
        if ctx.needs_input_grad[0]:
            dx = g @ effective(kind, weight, keep, a, b, scale, drop)
        return dx, None, None, da, db, dbias, None, None, None


def masked_linear(
    x: Tensor,
    weight: Tensor,
    keep: Tensor | None,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    scale: float,
    kind: Kind,
    drop: Drop | None = None,
) -> Tensor:
    """A layer with one of the kinds in ``MASKED``: x (..., d_in) -> (..., d_out), x's type.

    Differentiable in x, A, B and the bias; the weight is frozen. Gradients, with G = dL/dE:
    MaskLoRA dB = s (K ⊙ G) Aᵀ, dA = s Bᵀ (K ⊙ G); ScaleLoRA dB = (W ⊙ G) Aᵀ, dA = Bᵀ (W ⊙ G);
    SPP s times that.

    Args:
        weight: (d_out, d_in), zero where it is gone.
        keep: uint8 (d_out, d_in), 1 where the weight stays; None for all.
        a: (r, d_in), usually float32.
        b: (d_out, r).
        scale: alpha / r; ScaleLoRA has none.
        drop: see ``effective``.
    """
    factor = 1.0 if kind == "scale-lora" else scale
    out: Tensor = _Masked.apply(x, weight, keep, a, b, bias, factor, kind, drop)
    return out


def added_linear(x: Tensor, base: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """A frozen layer's output ``base`` (..., d_out) plus s (x Aᵀ) Bᵀ: LoRA, without BA."""
    inner = F.linear(x, a.to(x.dtype))
    inner, flat = (t.reshape(-1, t.shape[-1]) for t in (inner, base))
    return torch.addmm(flat, inner, b.to(x.dtype).T, alpha=scale).view_as(base)
