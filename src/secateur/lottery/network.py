"""The target: a ReLU network written as a chain of affine layers, and the box it is judged on.

Every layer acts on *columns*: a dense layer has one column per input, a convolution one per
(channel, tap), and a bias is the weight of one more column whose input is the constant 1. All
constructions and all bounds see nothing but ``(outputs, columns)`` matrices.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from secateur.errors import NumericsError, UsageError


@dataclass(frozen=True)
class Geometry:
    """Where a layer's columns come from.

    Attributes:
        inputs: shape of one example going in, ``(features,)`` or ``(channels, height, width)``.
        outputs: shape of one example coming out.
        kernel: (height, width) of a convolution, or None for a dense layer.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    kernel: tuple[int, int] | None = None
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Geometry:
        """Back from JSON."""
        values: dict[str, Any] = {k: v if v is None else tuple(v) for k, v in record.items()}
        return cls(**values)

    def columns(self, x: Tensor) -> Tensor:
        """(batch, *inputs) -> (batch, positions, columns)."""
        if self.kernel is None:
            return x.reshape(x.shape[0], 1, -1)
        x = x.reshape(x.shape[0], *self.inputs)
        patches = F.unfold(x, self.kernel, self.dilation, self.padding, self.stride)
        return patches.transpose(1, 2)

    def assemble(self, y: Tensor) -> Tensor:
        """(batch, positions, outputs) -> (batch, *outputs)."""
        return y.transpose(1, 2).reshape(y.shape[0], *self.outputs)


@dataclass(frozen=True)
class Layer:
    """``x -> act(matrix @ columns(x))``.

    Attributes:
        matrix: (outputs, columns), float64; the last column is the bias if ``bias``.
        slope: of the activation left of 0: 0 ReLU, 1 identity, in between leaky ReLU.
    """

    matrix: Tensor
    bias: bool
    slope: float
    geometry: Geometry

    def columns(self, x: Tensor, constant: float = 1.0) -> Tensor:
        """(batch, *inputs) -> (batch, positions, columns), with ``constant`` in the bias column."""
        columns = self.geometry.columns(x)
        return F.pad(columns, (0, 1), value=constant) if self.bias else columns

    def activate(self, y: Tensor) -> Tensor:
        """The activation, elementwise."""
        return y if self.slope == 1 else F.leaky_relu(y, self.slope)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, *inputs) -> (batch, *outputs), in the dtype of ``x``."""
        y = self.columns(x) @ self.matrix.to(x.dtype).T
        return self.activate(self.geometry.assemble(y))

    @property
    def inner_slope(self) -> float:
        """Slope of the intermediate activation a construction inserts before this layer."""
        return self.slope if 0 < self.slope < 1 else 0.0


@dataclass(frozen=True)
class Box:
    """A closed box of inputs, ``low <= x <= high`` elementwise (float64, the input's shape)."""

    low: Tensor
    high: Tensor

    def __post_init__(self) -> None:
        if self.low.shape != self.high.shape:
            raise UsageError(
                f"the box's corners differ in shape: {tuple(self.low.shape)} and "
                f"{tuple(self.high.shape)}",
                field="domain",
            )
        if not (self.low.isfinite().all() and self.high.isfinite().all()):
            raise UsageError(
                "a sup error exists only on a bounded domain",
                field="domain",
                value="unbounded",
                fix="give finite bounds, e.g. 0,1 for pixels",
            )
        if bool((self.low > self.high).any()):
            at = int((self.low > self.high).flatten().nonzero()[0])
            ends = (float(side.flatten()[at]) for side in (self.low, self.high))
            raise UsageError(
                "a lower bound exceeds its upper bound",
                field="domain",
                value=",".join(f"{end:g}" for end in ends),
            )

    @classmethod
    def of(cls, domain: Box | str | tuple[Any, Any], shape: Sequence[int]) -> Box:
        """Read ``"0,1"``, ``(0, 1)``, a pair of tensors or a Box, for inputs of ``shape``."""
        if isinstance(domain, Box):
            if domain.low.shape != torch.Size(shape):
                raise UsageError(
                    f"the box has shape {tuple(domain.low.shape)}, the input {tuple(shape)}",
                    field="domain",
                )
            return domain
        try:
            low, high = domain.split(",") if isinstance(domain, str) else domain
            ends = [torch.as_tensor(_number(end), dtype=torch.float64) for end in (low, high)]
            return cls(*(end.expand(tuple(shape)).clone() for end in ends))
        except (ValueError, TypeError, RuntimeError):
            raise UsageError(
                f"not a box for inputs of shape {tuple(shape)}",
                field="domain",
                value=domain,
                fix="two numbers, e.g. 0,1, or two tensors of the input's shape",
            ) from None


def _number(end: Any) -> Any:
    return float(end) if isinstance(end, str) else end


@dataclass(frozen=True)
class TargetNetwork:
    """A chain of layers; the function a ticket has to reproduce."""

    layers: tuple[Layer, ...]
    names: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        if not self.layers:
            raise UsageError("the network has no affine layer", field="target")
        for number, layer in enumerate(self.layers):
            name = self.names[number] if self.names else str(number)
            if not bool(layer.matrix.isfinite().all()):
                raise NumericsError(f"the weights of layer '{name}' are not all finite")
            if not 0 <= layer.slope <= 1:
                raise UsageError(
                    "an activation's slope lies in [0, 1]", field=name, value=layer.slope
                )
        for first, second in zip(self.layers, self.layers[1:], strict=False):
            if math.prod(first.geometry.outputs) != math.prod(second.geometry.inputs):
                raise UsageError(
                    f"a layer gives {first.geometry.outputs}, the next takes "
                    f"{second.geometry.inputs}",
                    field="target",
                )

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one example."""
        return self.layers[0].geometry.inputs

    @property
    def weights(self) -> int:
        """Number of weights, biases included."""
        return sum(layer.matrix.numel() for layer in self.layers)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, *input_shape) -> (batch, *output_shape), in the dtype of ``x``."""
        for layer in self.layers:
            x = layer.forward(x)
        return x

    def digest(self) -> str:
        """SHA-256 of the layers' description and float64 weights."""
        digest = hashlib.sha256(json.dumps(self.description(), sort_keys=True).encode())
        for layer in self.layers:
            digest.update(layer.matrix.contiguous().numpy().astype("<f8").tobytes())
        return digest.hexdigest()

    def description(self) -> list[dict[str, Any]]:
        """The layers without their weights, for JSON."""
        return [
            {"bias": layer.bias, "slope": layer.slope, "geometry": asdict(layer.geometry)}
            for layer in self.layers
        ]

    @classmethod
    def from_description(
        cls, description: list[dict[str, Any]], matrices: Sequence[Tensor]
    ) -> TargetNetwork:
        """Back from ``description`` and the matrices in order."""
        return cls(
            tuple(
                Layer(m.double(), d["bias"], d["slope"], Geometry.from_record(d["geometry"]))
                for d, m in zip(description, matrices, strict=True)
            )
        )

    def with_matrices(self, matrices: Sequence[Tensor]) -> TargetNetwork:
        """The same architecture with other weights."""
        return TargetNetwork.from_description(self.description(), matrices)
