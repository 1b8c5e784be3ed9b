"""What products are computed in; float16, whose gradients underflow, has its loss scaled.

The trained parameters themselves are float32 throughout. With ``fp16`` the loss is multiplied by a
large number before backward and the gradients are divided by it afterwards; where one overflowed
nevertheless the step is left out and the number halved (Micikevicius et al., Mixed Precision
Training, ICLR 2018). bfloat16 has float32's range and needs none of this.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from secateur.errors import MissingExtra, UsageError
from secateur.training.settings import TrainSettings


def accelerator_for(model: nn.Module, settings: TrainSettings) -> Any:
    """Accelerate's accelerator for where ``model`` is.

    Raises:
        UsageError: float16 on a CPU.
        MissingExtra: accelerate is not there.
    """
    try:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
    except ImportError as error:
        raise MissingExtra("accelerate", "hf", "training") from error
    refuse_unfit(model, settings)
    device, half = next(model.parameters()).device, chosen(model, settings.precision)
    AcceleratorState._reset_state(reset_partial_state=True)  # an earlier training's choices
    return Accelerator(mixed_precision=half, cpu=device.type == "cpu", device_placement=False)


def refuse_unfit(model: nn.Module, settings: TrainSettings, prefix: str = "") -> None:
    """Raise if what ``model`` lies on does not train in the precision asked for.

    Raises:
        UsageError: float16 on a CPU.
    """
    if settings.precision == "fp16" and next(model.parameters()).device.type == "cpu":
        raise UsageError(
            "a CPU does not train in float16",
            field=f"{prefix}precision",
            value="fp16",
            fix="no, or bf16",
        )


def chosen(model: nn.Module, precision: str) -> str:
    """``auto`` made concrete: bf16 on a GPU that has it; else fp16 for weights stored so."""
    if precision != "auto":
        return precision
    device = next(model.parameters()).device
    if device.type != "cuda":
        return "no"
    if torch.cuda.is_bf16_supported():
        return "bf16"
    return "fp16" if any(p.dtype is torch.float16 for p in model.parameters()) else "no"


class Scaling:
    """The scale of the loss, where there is one; without, everything passes through.

    Args:
        scaler: torch's ``GradScaler``, or None.
    """

    def __init__(self, scaler: Any) -> None:
        self.scaler = scaler

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the gradients, once they are complete."""
        if self.scaler is not None:
            self.scaler.unscale_(optimizer)

    @property
    def gives(self) -> bool:
        """Whether an overflow may be due to the scale, which can still fall."""
        return self.scaler is not None and self.scaler.get_scale() > 1.0

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """The optimizer's step, left out where a gradient overflowed; the scale is adapted."""
        if self.scaler is None:
            optimizer.step()
            return
        self.scaler.step(optimizer)
        self.scaler.update()

    def state(self) -> dict[str, Any] | None:
        """For a checkpoint."""
        return None if self.scaler is None else dict(self.scaler.state_dict())

    def restore(self, state: dict[str, Any] | None) -> None:
        """Put ``state`` back."""
        if self.scaler is not None and state is not None:
            self.scaler.load_state_dict(state)
