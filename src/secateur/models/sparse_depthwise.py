"""Depth-wise layers that carry their masks, and run on tap lists when no gradient is asked for.

``sparsify`` puts them in place of a network's depth-wise convolutions, ``densify`` takes them out
again; parameters keep their names and stay the same objects, so a state dict of one loads into the
other, but for the masks (``NAME.gone``).

>>> net = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8))
>>> gone = {"0.weight": torch.rand(8, 1, 3, 3) < 0.8}
>>> sparsify(net, gone)
['0']
>>> net[0].taps_left == int((~gone["0.weight"]).sum())
True
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import UsageError
from secateur.kernels.depthwise import Backend, Taps, can_list, depthwise, refuse


class SparseDepthwise(nn.Conv2d):
    """A depth-wise convolution with a mask of the taps that are gone.

    Weights under the mask are zero whatever the parameter holds. Without gradients and on
    float32 CPU tensors it runs on tap lists, on a CUDA device on a Triton kernel if there is one;
    everywhere else, and while training or tracing, it is the masked dense convolution. The lists
    follow weights that are changed in place, but not through ``weight.data``.

    Attributes:
        gone: of the weight's shape, bool; in the state dict.
        low, high: what the output is clamped to.
        backend: of ``kernels.depthwise``.
    """

    COMPUTES_PLAINLY = True  # what nn.Conv2d does, of its own weight
    gone: Tensor

    def __init__(
        self, conv: nn.Conv2d, gone: Tensor, low: float = -math.inf, high: float = math.inf
    ) -> None:
        nn.Module.__init__(self)
        refuse(conv)
        if tuple(gone.shape) != tuple(conv.weight.shape):
            raise UsageError(
                f"the mask is {tuple(gone.shape)}, the weight {tuple(conv.weight.shape)}",
                field="mask",
                value=tuple(gone.shape),
            )
        self.__dict__.update(
            {k: v for k, v in conv.__dict__.items() if k not in ("_parameters", "_buffers")}
        )
        self._parameters, self._buffers = dict(conv._parameters), dict(conv._buffers)
        self.register_buffer("gone", gone.to(conv.weight.device, torch.bool))
        self.low, self.high = low, high
        self.backend: Backend = "auto"
        self._taps: tuple[Any, Taps] | None = None

    @property
    def taps_left(self) -> int:
        """Taps that are not gone."""
        return int((~self.gone).sum())

    @property
    def clamps(self) -> bool:
        """Whether an activation was merged into it."""
        return self.low > -math.inf or self.high < math.inf

    def taps(self) -> Taps:
        """The lists, made again when weight, bias or mask have changed."""
        parts = [x for x in (self.weight, self.bias, self.gone) if x is not None]
        state = tuple((x.data_ptr(), _version(x)) for x in parts), self.low, self.high
        if self._taps is None or self._taps[0] != state:
            self._taps = state, Taps.of(self, self.gone, self.low, self.high)
        return self._taps[1]

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C * multiplier, H', W')."""
        if self._sparse(x):
            if x.device.type == "cuda":
                from secateur.kernels.depthwise_triton import depthwise_cuda

                return depthwise_cuda(x, self.taps())
            return depthwise(x, self.taps(), self.backend)
        out = self._conv_forward(x, self.weight.masked_fill(self.gone, 0), self.bias)
        return out.clamp(self.low, self.high) if self.clamps else out

    def _sparse(self, x: Tensor) -> bool:
        if isinstance(x, torch.fx.Proxy) or x.dim() != 4 or _transformed():
            return False
        if torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad):
            return False
        if x.device.type == "cuda":
            from secateur.kernels.depthwise_triton import available

            return available() and x.dtype in (torch.float32, torch.float16)
        return type(x) is Tensor and x.device.type == "cpu" and x.dtype is torch.float32

    def __getstate__(self) -> dict[str, Any]:
        """Lists are made anew: they know where this layer's weights lie."""
        return {**vars(self), "_taps": None}

    def dense(self) -> nn.Conv2d:
        """A plain convolution with zeros, sharing the parameters.

        Raises:
            UsageError: it clamps, which a convolution cannot.
        """
        if self.clamps:
            raise UsageError(
                "an activation was merged into it", field="module", value=type(self).__name__,
                fix="densify the network it was made of",
            )  # fmt: skip
        plain = nn.Conv2d.__new__(nn.Conv2d)
        nn.Module.__init__(plain)
        own = ("_parameters", "_buffers", "low", "high", "backend", "_taps")
        plain.__dict__.update({k: v for k, v in self.__dict__.items() if k not in own})
        plain._parameters = dict(self._parameters)
        plain._buffers = {k: v for k, v in self._buffers.items() if k != "gone"}
        with torch.no_grad():
            plain.weight.masked_fill_(self.gone, 0)
        return plain

    def extra_repr(self) -> str:
        """See ``nn.Module``."""
        return f"{super().extra_repr()}, taps={self.taps_left}/{self.gone.numel()}"


def sparsify(model: nn.Module, masks: Mapping[str, Tensor]) -> list[str]:
    """Put masked depth-wise layers in place, in ``model``.

    Args:
        masks: weight name -> True where the tap is gone. Other layers' weights are left alone, and
            those of layers that cannot be tap lists (``kernels.depthwise.can_list``). A layer
            that is one already gets the new mask.

    Returns:
        Names of the layers replaced.

    Raises:
        UsageError: a mask that fits no weight.
    """
    found = {}
    modules = dict(model.named_modules())
    for weight, gone in masks.items():
        name = weight.removesuffix(".weight")
        module = modules.get(name)
        if module is None:
            raise UsageError(
                "the model has no such weight",
                field="masks",
                value=weight,
                fix="give the masks of this model",
            )
        if isinstance(module, SparseDepthwise):
            found[name] = SparseDepthwise(module, gone, module.low, module.high)
        elif isinstance(module, nn.Conv2d) and can_list(module):
            found[name] = SparseDepthwise(module, gone)
    for name, module in found.items():
        _put(model, name, module)
    return list(found)


def densify(model: nn.Module) -> dict[str, Tensor]:
    """The inverse, in ``model``: plain convolutions with zeros.

    Returns:
        Masks by weight name, as ``sparsify`` takes them.
    """
    masks = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, SparseDepthwise):
            masks[f"{name}.weight"] = module.gone.clone()
            _put(model, name, module.dense())
    return masks


def sparse_state(model: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """Load a state dict that holds masks, putting the layers in place that it speaks of."""
    suffix = ".gone"
    masks = {k.removesuffix(suffix) + ".weight": v for k, v in state.items() if k.endswith(suffix)}
    names = sparsify(model, masks)
    model.load_state_dict(dict(state))
    return names


def _transformed() -> bool:
    """Whether torch is tracing, compiling, batching or differentiating forward."""
    return (
        torch._C._get_tracing_state() is not None
        or torch.compiler.is_compiling()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
    )


def _version(x: Tensor) -> object:
    """Something that is another when the numbers in ``x`` are."""
    if not x.is_inference():
        return x._version
    return x.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
