"""One prunable weight, whatever the layer that holds it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from secateur.errors import NumericsError


@dataclass(eq=False)
class Matrix:
    """One prunable weight, seen as (d_out, d_in).

    Attributes:
        name: ``model.layers.0.self_attn.q_proj``; an expert's slice ends in its number,
            ``model.layers.0.mlp.experts.gate_up_proj.3``.
        module: the module that owns the parameter.
        parameter: the parameter's name in the module.
        index: the expert, if the parameter is 3-D.
        transposed: the layer stores (d_in, d_out).
        role: q k v qkv o gate up gate_up down fc1 fc2, or "" if not known.
    """

    name: str
    module: nn.Module
    parameter: str = "weight"
    index: int | None = None
    transposed: bool = False
    role: str = ""

    @property
    def key(self) -> str:
        """The parameter's key in the model's state dict."""
        return (
            f"{self.name}.{self.parameter}" if self.index is None else self.name.rpartition(".")[0]
        )

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        rows, columns = self.stored.shape[-2:]
        return (columns, rows) if self.transposed else (rows, columns)

    @property
    def stored(self) -> nn.Parameter:
        """The parameter as the module stores it."""
        return self.module._parameters[self.parameter]  # type: ignore[return-value]

    def tensor(self) -> Tensor:
        """The weight as a (d_out, d_in) view, detached; writing to it writes to the model."""
        weight = self.stored.detach()
        if self.index is not None:
            weight = weight[self.index]
        return weight.T if self.transposed else weight

    @torch.no_grad()
    def write(self, weight: Tensor) -> None:
        """Replace the weight in place, cast to the model's dtype and device.

        Raises:
            ValueError: another shape.
            NumericsError: NaN or infinity, also one made by the cast.
        """
        if tuple(weight.shape) != self.shape:
            raise ValueError(f"'{self.name}' is {self.shape}, not {tuple(weight.shape)}")
        cast = weight.to(self.stored.device, self.stored.dtype)
        if not torch.isfinite(cast).all():
            raise NumericsError(
                f"the new weight of '{self.name}' is not finite in {self.stored.dtype}",
                fix="load the model in float32 (--dtype float32)",
            )
        self.tensor().copy_(cast)
