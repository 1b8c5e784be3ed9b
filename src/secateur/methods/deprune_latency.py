"""What a width costs on this device, for DEPrune's recalibration: measured, or modelled.

On a CPU a depth-wise layer is timed on the tap-list kernel it will run on, and there is no
staircase: time follows the number of taps. On a CUDA device it is timed on the Triton kernels.
Where neither is there, and with ``measure=False``, a step every 32 columns is assumed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.kernels.depthwise import Taps, backends, can_list, depthwise
from secateur.masks.depthwise import CHANNELS, balanced, staircase

_ROUNDS = 15
_POINTS = 24  # of a curve


@dataclass(eq=False)
class Latency:
    """Times of layers, each measured once.

    Attributes:
        inputs: shape of every convolution's input, (B, C, H, W).
        measure: False: the model only.
        rows: what was asked, for the report: (layer, width, seconds).
    """

    model: nn.Module
    inputs: dict[str, tuple[int, ...]]
    measure: bool = True
    rows: list[tuple[str, int, float]] = field(default_factory=list)
    _known: dict[tuple[str, int], float] = field(default_factory=dict)

    @property
    def source(self) -> str:
        """``measured`` or ``model``."""
        return "measured" if self.measure and self._can_measure() else "model"

    def columns(self, layer: str, kept: int) -> float:
        """Seconds of a depth-wise layer whose ranges keep so many columns.

        A layer that cannot run on tap lists takes as long whatever it keeps: 0 for every width.
        """
        conv = self.model.get_submodule(layer)
        assert isinstance(conv, nn.Conv2d)
        if self.source == "model":
            return staircase(1.0, 1.0)(0, kept)
        if not can_list(conv):
            return 0.0

        def prepare() -> Callable[[], object]:
            x = torch.randn(self.inputs[layer], device=conv.weight.device)
            taps = Taps.of(conv, balanced(conv.weight, kept, layer).cpu())
            return lambda: _run(x, taps)

        return self._time(layer, kept, prepare)

    def curve(self, layer: str) -> list[tuple[int, float]]:
        """(columns, seconds) of one layer from nothing gone to nearly all, where it is measured."""
        if self.source == "model" or not can_list(self.model.get_submodule(layer)):
            return []
        full = CHANNELS * self.model.get_parameter(f"{layer}.weight")[0].numel()
        step = max(CHANNELS // 2, full // _POINTS // 16 * 16)
        return [(n, self.columns(layer, n)) for n in range(step, full + 1, step)]

    def filters(self, writers: tuple[str, ...], readers: tuple[str, ...], width: int) -> float:
        """Seconds of the point-wise layers that write and read ``width`` channels."""
        if self.source == "model":
            return staircase(1.0, 1.0)(0, width)
        return sum(self._pointwise(n, width, True) for n in writers) + sum(
            self._pointwise(n, width, False) for n in readers
        )

    def _pointwise(self, name: str, width: int, writes: bool) -> float:
        conv = self.model.get_submodule(name)
        if not isinstance(conv, nn.Conv2d) or name not in self.inputs:
            return 0.0

        def prepare() -> Callable[[], object]:
            weight = conv.weight[:width] if writes else conv.weight[:, :width]
            shape = list(self.inputs[name])
            shape[1] = weight.shape[1]
            x = torch.randn(shape, device=weight.device)
            weight = weight.contiguous()
            return lambda: F.conv2d(x, weight, None, conv.stride, conv.padding, conv.dilation)

        return self._time(f"{name} {'out' if writes else 'in'}", width, prepare)

    def _can_measure(self) -> bool:
        device = next(self.model.parameters()).device.type
        if device == "cuda":
            from secateur.kernels.depthwise_triton import available

            return available()
        return device == "cpu" and backends()[0] != "torch"

    @torch.no_grad()
    def _time(self, name: str, width: int, prepare: Callable[[], Callable[[], object]]) -> float:
        if (name, width) not in self._known:
            work = prepare()
            work()
            times = []
            for _ in range(_ROUNDS):
                self._wait()
                start = time.perf_counter()
                work()
                self._wait()
                times.append(time.perf_counter() - start)
            self._known[name, width] = statistics.median(times)
            self.rows.append((name, width, self._known[name, width]))
        return self._known[name, width]

    def _wait(self) -> None:
        if next(self.model.parameters()).device.type == "cuda":
            torch.cuda.synchronize()


def _run(x: Tensor, taps: Taps) -> Tensor:
    if x.device.type == "cuda":
        from secateur.kernels.depthwise_triton import depthwise_cuda

        return depthwise_cuda(x, taps)
    return depthwise(x, taps)


@torch.no_grad()
def input_shapes(model: nn.Module, example: Tensor) -> dict[str, tuple[int, ...]]:
    """Shape of what every convolution takes in, by its name."""
    shapes: dict[str, tuple[int, ...]] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            shapes[name] = tuple(args[0].shape)

        return hook

    handles = [
        m.register_forward_pre_hook(watch(n))
        for n, m in model.named_modules()
        if isinstance(m, nn.Conv2d)
    ]
    try:
        model(example)
    finally:
        for handle in handles:
            handle.remove()
    return shapes
