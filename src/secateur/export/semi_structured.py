"""2:4 weights on the hardware that multiplies them faster, measured against dense.

NVIDIA GPUs from Ampere on (compute capability 8.0) have a 2:4 multiplier; PyTorch reaches it
through ``torch.sparse.to_sparse_semi_structured``. Everywhere else, and for shapes or types
it does not take, the answer is a plain reason. Nothing here claims a gain it has not timed.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import UsageError

ROWS, COLUMNS = 32, 64
"""A weight's rows and columns must be multiples of these (CUTLASS, 16-bit types)."""


@dataclass(frozen=True)
class SemiStructured:
    """What 2:4 brought here.

    Attributes:
        available: the device, type and shapes allow it.
        reason: why not, if not.
        converted: names of the linears that were converted.
        skipped: name -> why it stayed dense.
        dense, sparse: seconds per call, as median, low and high (10th, 90th percentile).
        ratio: dense over sparse median; above 1 is faster.
        difference: largest difference of the outputs, relative to the largest output.
    """

    available: bool
    reason: str | None = None
    converted: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    dense: dict[str, float] | None = None
    sparse: dict[str, float] | None = None
    ratio: float | None = None
    difference: float | None = None

    @property
    def verdict(self) -> str:
        """One honest sentence."""
        if not self.available:
            return f"2:4 is not available here: {self.reason}."
        if self.ratio is None or self.dense is None or self.sparse is None:
            return f"2:4 is in place in {len(self.converted)} linears; it was not timed."
        if self.sparse["low"] <= self.dense["high"] and self.dense["low"] <= self.sparse["high"]:
            return f"No measurable gain from 2:4 here ({self.ratio:.2f}x, within the spread)."
        if self.ratio <= 1:
            return f"2:4 is slower here ({self.ratio:.2f}x the dense speed)."
        return f"2:4 runs {self.ratio:.2f}x as fast as dense here."

    def record(self) -> dict[str, Any]:
        """For ``result.json``."""
        return asdict(self) | {"verdict": self.verdict}


def device_reason(device: torch.device | str, dtype: torch.dtype) -> str | None:
    """Why 2:4 cannot be used on ``device`` with ``dtype``; None if it can."""
    device = torch.device(device)
    if device.type != "cuda":
        return f"it needs a CUDA device of compute capability 8.0 or more, not '{device.type}'"
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"compute capability {major}.{minor} is below 8.0"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it needs float16 or bfloat16, not {str(dtype).removeprefix('torch.')}"
    return None


def weight_reason(weight: Tensor) -> str | None:
    """Why this weight (d_out, d_in) cannot be 2:4; None if it can."""
    if weight.ndim != 2:
        return "not a matrix"
    rows, columns = weight.shape
    if rows % ROWS or columns % COLUMNS:
        return f"{rows}x{columns} is not a multiple of {ROWS}x{COLUMNS}"
    if not is_two_four(weight):
        return "some group of four inputs keeps more than two weights"
    return None


def is_two_four(weight: Tensor) -> bool:
    """At most two non-zeros in every four consecutive inputs of a row."""
    if weight.shape[-1] % 4:
        return False
    groups = weight.detach().reshape(-1, 4)
    return bool((torch.count_nonzero(groups, dim=1) <= 2).all())


def to_semi_structured(model: nn.Module) -> SemiStructured:
    """Replace, in place, the weight of every 2:4 linear of ``model`` by its compressed form.

    Nothing is changed where the device cannot use it. Linears that are not 2:4, or of a shape
    the kernels do not take, stay dense and are listed with the reason.
    """
    parameter = next(model.parameters(), None)
    if parameter is None:
        raise UsageError("the model has no parameters", field="model", value=type(model).__name__)
    reason = device_reason(parameter.device, parameter.dtype)
    if reason is not None:
        return SemiStructured(False, reason)
    converted: list[str] = []
    skipped: dict[str, str] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        why = weight_reason(module.weight)
        if why is None:
            module.weight = nn.Parameter(_compress(module.weight.detach()), requires_grad=False)
            converted.append(name)
        else:
            skipped[name] = why
    if not converted:
        return SemiStructured(False, "no linear of the model is 2:4", skipped=skipped)
    return SemiStructured(True, None, converted, skipped)


@torch.no_grad()
def measure_semi_structured(
    weight: Tensor, tokens: int = 2048, repeats: int = 30, name: str = "weight"
) -> SemiStructured:
    """Time ``x @ weight.T`` dense and 2:4, taking turns, and compare the outputs.

    Args:
        weight: (d_out, d_in), 2:4 sparse, on the device and in the type to measure.
        tokens: rows of ``x``; decoding is 1 to 16, reading a prompt thousands.
        repeats: timed calls of each.
    """
    reason = device_reason(weight.device, weight.dtype)
    if reason is None:
        reason = weight_reason(weight)
    if reason is not None:
        return SemiStructured(False, reason, skipped={name: reason})
    x = torch.randn(tokens, weight.shape[1], dtype=weight.dtype, device=weight.device)
    compressed = _compress(weight)
    dense_out = nn.functional.linear(x, weight)
    sparse_out = nn.functional.linear(x, compressed)
    difference = (dense_out - sparse_out).abs().max() / dense_out.abs().max().clamp_min(1e-12)
    dense, sparse = _alternate(
        lambda: nn.functional.linear(x, weight),
        lambda: nn.functional.linear(x, compressed),
        repeats,
        weight.device,
    )
    ratio = dense["median"] / sparse["median"]
    return SemiStructured(True, None, [name], {}, dense, sparse, ratio, float(difference))


def _compress(weight: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*SparseSemiStructuredTensor is in prototype.*")
        compressed: Tensor = torch.sparse.to_sparse_semi_structured(weight.contiguous())
    return compressed


def _alternate(
    first: Callable[[], Any], second: Callable[[], Any], repeats: int, device: torch.device
) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds per call of two functions that take turns, so drift hits both alike."""
    times: tuple[list[float], list[float]] = ([], [])
    for round_ in range(repeats + 3):
        for call, record in zip((first, second), times, strict=True):
            torch.cuda.synchronize(device)
            start = time.perf_counter()
            call()
            torch.cuda.synchronize(device)
            if round_ >= 3:  # the first rounds load kernels
                record.append(time.perf_counter() - start)
    return _spread(times[0]), _spread(times[1])


def _spread(times: list[float]) -> dict[str, float]:
    tenths = statistics.quantiles(times, n=10, method="inclusive")
    return {"median": statistics.median(times), "low": tenths[0], "high": tenths[-1]}
