"""Depth-wise convolution over the taps that are left: what pruning a depth-wise layer buys.

A depth-wise layer does one multiply-add a tap and output; a tap that is gone costs nothing when
each channel has a list of the taps it still has. That is done here on planes (NCHW), float32, by
C compiled on this machine (``depthwise.c``), or, where there is no compiler, by torch with the
zeros left in. On a GPU ``kernels.depthwise_triton`` does it.

No form makes columns (im2col): on a CPU the copies alone cost 10 to 500 times the native layer.
"""

from __future__ import annotations

import ctypes
import math
import weakref
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.errors import UsageError

Backend = Literal["auto", "c", "torch"]
Pair = tuple[int, int]
_MOST_LAYOUTS = 16  # input sizes a layer remembers


@dataclass(frozen=True, eq=False)
class Taps:
    """A depth-wise convolution as lists of taps, one list an output channel.

    Output channel ``o`` reads input channel ``o // multiplier`` through the taps
    ``tap[start[o]:start[o + 1]]`` (numbers ky * kernel_w + kx, ascending).

    Attributes:
        start: (channels * multiplier + 1,) int32. tap: int32, weight: float32, one each a tap.
        bias: (channels * multiplier,) float32, or None.
        channels: of the input. multiplier: output channels an input channel.
        kernel, stride, dilation: (vertical, horizontal).
        padding: zeros at (top, bottom, left, right).
        low, high: what the output is clamped to (an activation that is a clamp costs nothing).
    """

    start: Tensor
    tap: Tensor
    weight: Tensor
    bias: Tensor | None
    channels: int
    multiplier: int
    kernel: Pair
    stride: Pair
    dilation: Pair
    padding: tuple[int, int, int, int]
    low: float = -math.inf
    high: float = math.inf
    _layouts: dict[Pair, Any] = field(default_factory=dict, repr=False)

    @cached_property
    def pointers(self) -> list[int | None]:
        """Where bias, start, tap and weight lie."""
        lists = (self.bias, self.start, self.tap, self.weight)
        return [None if x is None else x.data_ptr() for x in lists]

    @classmethod
    def of(
        cls,
        conv: nn.Conv2d,
        mask: Tensor | None = None,
        low: float = -math.inf,
        high: float = math.inf,
    ) -> Taps:
        """The taps of a layer.

        Args:
            mask: of the weight's shape, True = gone; None: every tap stays, zero or not.

        Raises:
            UsageError: not depth-wise, padded otherwise than with zeros, not two-dimensional, not
                ``computes_plainly``, or the mask is of another shape.
        """
        refuse(conv)
        weight = conv.weight.detach().float().cpu()
        kept = torch.ones_like(weight, dtype=torch.bool) if mask is None else ~mask.cpu()
        if kept.shape != weight.shape:
            raise UsageError(
                f"the mask is {tuple(kept.shape)}, the weight {tuple(weight.shape)}",
                field="mask",
                value=tuple(kept.shape),
            )
        flat = kept.flatten(1)
        counts = flat.sum(1).cumsum(0)
        return cls(
            start=torch.cat([counts.new_zeros(1), counts]).int(),
            tap=flat.nonzero()[:, 1].int().contiguous(),
            weight=weight.flatten(1)[flat].contiguous(),
            bias=None if conv.bias is None else conv.bias.detach().float().cpu().clone(),
            channels=conv.in_channels,
            multiplier=conv.out_channels // conv.in_channels,
            kernel=_pair(conv.kernel_size),
            stride=_pair(conv.stride),
            dilation=_pair(conv.dilation),
            padding=paddings(conv),
            low=low,
            high=high,
        )

    @cached_property
    def outputs(self) -> int:
        """Output channels."""
        return self.channels * self.multiplier

    def mask(self) -> Tensor:
        """True where a tap is gone: (outputs, 1, kernel_h, kernel_w) bool."""
        gone = torch.ones(self.outputs, math.prod(self.kernel), dtype=torch.bool)
        gone[self._rows(), self.tap.long()] = False
        return gone.view(self.outputs, 1, *self.kernel)

    def dense(self) -> Tensor:
        """The weight with its zeros: (outputs, 1, kernel_h, kernel_w) float32."""
        weight = torch.zeros(self.outputs, math.prod(self.kernel))
        weight[self._rows(), self.tap.long()] = self.weight
        return weight.view(self.outputs, 1, *self.kernel)

    @cached_property
    def _whole(self) -> Tensor:
        return self.dense()

    def counts(self) -> Tensor:
        """Taps left in each output channel, int32."""
        return self.start[1:] - self.start[:-1]

    def size(self, height: int, width: int) -> Pair:
        """Height and width of the output.

        Raises:
            UsageError: the kernel does not fit into the padded input.
        """
        top, bottom, left, right = self.padding
        out = []
        for n, k, s, d, pad in zip(
            (height, width), self.kernel, self.stride, self.dilation, (top + bottom, left + right),
            strict=True,
        ):  # fmt: skip
            room = n + pad - d * (k - 1) - 1
            if room < 0:
                raise UsageError(
                    f"a kernel that reaches over {d * (k - 1) + 1} does not fit into {n} and "
                    f"{pad} of padding",
                    field="x",
                    value=(height, width),
                )
            out.append(room // s + 1)
        return out[0], out[1]

    def __getstate__(self) -> dict[str, Any]:
        """Without what points into this object's own memory: a copy makes it anew."""
        return {
            **{k: v for k, v in vars(self).items() if k in self.__annotations__},
            "_layouts": {},
        }

    def _rows(self) -> Tensor:
        return torch.repeat_interleave(torch.arange(self.outputs), self.counts().long())


def is_depthwise(module: nn.Module) -> bool:
    """A 2-d convolution whose every output channel reads one input channel of several."""
    return (
        isinstance(module, nn.Conv2d)
        and module.groups == module.in_channels > 1
        and not module.transposed
    )


def computes_plainly(module: nn.Module) -> bool:
    """Whether a convolution is what its attributes say, of a weight that it holds itself.

    Not where a subclass has a ``forward`` of its own (padding that depends on the input,
    standardised weights), nor where the weight is computed (``parametrize``, ``weight_norm``).
    """
    kind: Any = type(module)
    plain = kind.forward is nn.Conv2d.forward and kind._conv_forward is nn.Conv2d._conv_forward
    return (plain or kind.__dict__.get("COMPUTES_PLAINLY", False)) and (
        module._parameters.get("weight") is not None
    )


def can_list(module: nn.Module) -> bool:
    """Whether ``Taps.of`` takes a module."""
    try:
        refuse(module)
    except UsageError:
        return False
    return True


def refuse(conv: nn.Module) -> None:
    """Say what keeps ``conv`` from being a list of taps.

    Raises:
        UsageError: see ``Taps.of``.
    """
    if not isinstance(conv, nn.Conv2d) or not is_depthwise(conv):
        raise UsageError(
            "not a depth-wise 2-d convolution (groups == in_channels > 1)",
            field="module",
            value=str(conv),
        )
    if not computes_plainly(conv):
        raise UsageError(
            "computes its convolution in a way of its own, or from a weight that is computed",
            field="module",
            value=type(conv).__name__,
            fix="leave the zeros in it and run it as it is",
        )
    if conv.padding_mode != "zeros":
        raise UsageError(
            "only zero padding is known", field="padding_mode", value=conv.padding_mode
        )


def paddings(conv: nn.Conv2d) -> tuple[int, int, int, int]:
    """Zeros at top, bottom, left and right of a convolution's input."""
    if conv.padding == "valid":
        return 0, 0, 0, 0
    if conv.padding == "same":
        reach = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        return reach[0] // 2, reach[0] - reach[0] // 2, reach[1] // 2, reach[1] - reach[1] // 2
    high, wide = _pair(conv.padding)
    return high, high, wide, wide


def backends() -> list[str]:
    """What this machine can do, best first."""
    from secateur.kernels.compiled import library

    return [*(["c"] if library("depthwise") is not None else []), "torch"]


def depthwise(x: Tensor, taps: Taps, backend: Backend = "auto") -> Tensor:
    """The convolution, of its clamp.

    Args:
        x: (images, channels, height, width), float32 on the CPU; copied if not contiguous.
        backend: ``c`` or ``torch``; ``auto``: the first there is.

    Returns:
        (images, outputs, out_height, out_width) float32, without a gradient.

    Raises:
        UsageError: another shape or type; a backend that is not there.
    """
    if backend not in ("auto", "c", "torch"):
        raise UsageError("there is no such backend", field="backend", value=backend)
    if x.dim() != 4 or x.shape[1] != taps.channels or x.dtype is not torch.float32:
        raise UsageError(
            f"needs float32 images of {taps.channels} channels",
            field="x",
            value=f"{x.dtype} {tuple(x.shape)}",
        )
    x = x.detach()
    if backend in ("auto", "c") and (loaded := _compiled()) is not None:
        return _run_c(loaded, x.contiguous(), taps)
    if backend in ("auto", "torch"):
        return dense_form(x, taps)
    from secateur.kernels.compiled import why_not

    raise UsageError(
        "this backend is not there",
        field="backend",
        value=backend,
        fix=why_not("depthwise"),
    )


def dense_form(x: Tensor, taps: Taps) -> Tensor:
    """The same by torch, zeros left in."""
    top, bottom, left, right = taps.padding
    if (top, left) != (bottom, right):
        x, pad = F.pad(x, (left, right, top, bottom)), (0, 0)
    else:
        pad = (top, left)
    out = F.conv2d(x, taps._whole, taps.bias, taps.stride, pad, taps.dilation, groups=taps.channels)
    bounded = taps.low > -math.inf or taps.high < math.inf
    return out.clamp_(taps.low, taps.high) if bounded else out


class _Shape(ctypes.Structure):
    """``shape`` of depthwise.c."""

    _fields_ = [
        *(
            (name, ctypes.c_int64)
            for name in (
                "images", "channels", "multiplier", "height", "width", "out_height", "out_width",
                "kernel_h", "kernel_w", "stride_h", "stride_w", "dilation_h", "dilation_w",
                "top", "left",
            )
        ),
        ("low", ctypes.c_float),
        ("high", ctypes.c_float),
    ]  # fmt: skip


@lru_cache(maxsize=1)
def _compiled() -> Any:
    from secateur.kernels.compiled import library

    loaded = library("depthwise")
    if loaded is None:
        return None
    loaded.secateur_depthwise.argtypes = [ctypes.c_void_p] * 7 + [ctypes.c_int64, ctypes.c_int]
    loaded.secateur_depthwise_make.argtypes = [ctypes.c_void_p]
    loaded.secateur_depthwise_make.restype = ctypes.c_void_p
    loaded.secateur_depthwise_free.argtypes = [ctypes.c_void_p]
    loaded.secateur_depthwise_free.restype = None
    return loaded


class _Layout:
    """What the C code prepares once a shape, freed with this object."""

    def __init__(self, loaded: Any, taps: Taps, height: int, width: int) -> None:
        self.size = taps.size(height, width)
        shape = _Shape(
            0, taps.channels, taps.multiplier, height, width, *self.size,
            *taps.kernel, *taps.stride, *taps.dilation, taps.padding[0], taps.padding[2],
            taps.low, taps.high,
        )  # fmt: skip
        self.at = loaded.secateur_depthwise_make(ctypes.byref(shape))
        if not self.at:  # no memory, or a kernel of more rows than it has bits for
            return
        weakref.finalize(self, loaded.secateur_depthwise_free, self.at)


def _run_c(loaded: Any, x: Tensor, taps: Taps) -> Tensor:
    images, _, height, width = x.shape
    layout = taps._layouts.get((height, width))
    if layout is None:
        if len(taps._layouts) >= _MOST_LAYOUTS:
            taps._layouts.clear()
        layout = taps._layouts[height, width] = _Layout(loaded, taps, height, width)
    if not layout.at:
        return dense_form(x, taps)
    out = x.new_empty((images, taps.outputs, *layout.size))
    if loaded.secateur_depthwise(
        layout.at, x.data_ptr(), *taps.pointers, out.data_ptr(), images, torch.get_num_threads()
    ):
        raise MemoryError("no memory for a depth-wise convolution")
    return out


def _pair(value: Any) -> Pair:
    first, second = value
    return int(first), int(second)
