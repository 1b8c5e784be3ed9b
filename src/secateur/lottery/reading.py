"""Reading a target network: from a torch module or from a safetensors file.

Accepted: chains of Linear and Conv2d with ReLU, LeakyReLU or identity in between; BatchNorm in
evaluation mode is folded into the layer before it; Flatten, Dropout and Identity are passed over.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import UsageError
from secateur.lottery.network import Geometry, Layer, TargetNetwork
from secateur.tensorfile import opened

METADATA_KEY = "secateur.network"
_PASSED_OVER = (nn.Identity, nn.Dropout, nn.Dropout2d, nn.Flatten)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


def from_module(model: nn.Module, input_shape: tuple[int, ...] | None = None) -> TargetNetwork:
    """Read a chain of layers out of a ``nn.Sequential`` (nested ones too) or a single layer.

    Args:
        model: see the module's docstring; anything else is refused by name.
        input_shape: shape of one example; needed when the first layer is a convolution.
    """
    layers: list[Layer] = []
    names: list[str] = []
    shape = tuple(input_shape) if input_shape else None
    for name, part in _parts(model, ""):
        if isinstance(part, nn.Linear | nn.Conv2d):
            layers.append(_affine(part, shape, name))
            names.append(name)
            shape = layers[-1].geometry.outputs
        elif isinstance(part, _NORMS):
            if not layers or layers[-1].slope != 1:
                raise _unsupported(name, part, "a BatchNorm is folded into the Linear before it")
            layers[-1] = _fold_norm(layers[-1], part, name)
        elif isinstance(part, nn.ReLU | nn.LeakyReLU):
            if not layers:
                raise _unsupported(name, part, "the chain starts with an affine layer")
            slope = part.negative_slope if isinstance(part, nn.LeakyReLU) else 0.0
            last = layers[-1]
            layers[-1] = Layer(last.matrix, last.bias, last.slope * slope, last.geometry)
        elif not isinstance(part, _PASSED_OVER):
            raise _unsupported(name, part, "only (leaky-)ReLU, identity and affine layers")
    return TargetNetwork(tuple(layers), tuple(names))


def from_file(path: str | Path) -> TargetNetwork:
    """Read a network from safetensors.

    A file written by ``save_network`` carries its architecture. Any other file is read as a
    dense ReLU network: its 2-D ``*.weight`` tensors in natural order of their names, ``*.bias``
    beside them, ReLU between, nothing after the last.
    """
    with opened(path) as file:
        metadata = file.metadata() or {}
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    if METADATA_KEY in metadata:
        description: list[dict[str, Any]] = json.loads(metadata[METADATA_KEY])
        matrices = [tensors[f"matrix.{i}"] for i in range(len(description))]
        return TargetNetwork.from_description(description, matrices)
    return from_state_dict(tensors)


def from_state_dict(tensors: dict[str, Tensor]) -> TargetNetwork:
    """A dense ReLU network from its state dict (see ``from_file``)."""
    keys = sorted((k for k in tensors if k.endswith("weight")), key=_natural)
    if not keys or any(tensors[key].ndim != 2 for key in keys):
        raise UsageError(
            "a plain file must hold 2-D weights of a dense ReLU network",
            field="network",
            value=", ".join(f"{k}{tuple(tensors[k].shape)}" for k in keys[:5]) or "no weights",
            fix="use secateur.lottery.save_network(from_module(model, input_shape), path)",
        )
    parts: list[nn.Module] = []
    for key in keys:
        weight, bias = tensors[key], tensors.get(key.removesuffix("weight") + "bias")
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, dtype=torch.float64)
        linear.weight.data.copy_(weight)
        if bias is not None:
            linear.bias.data.copy_(bias)
        parts += [linear, nn.ReLU()]
    return from_module(nn.Sequential(*parts[:-1]))


def _natural(key: str) -> list[tuple[int, str]]:
    return [(int(p), "") if p.isdigit() else (-1, p) for p in key.replace("_", ".").split(".")]


def _parts(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(module, nn.Sequential):
        for name, child in module.named_children():
            yield from _parts(child, f"{prefix}{name}.")
    else:
        yield prefix.rstrip(".") or type(module).__name__, module


def _affine(part: nn.Linear | nn.Conv2d, shape: tuple[int, ...] | None, name: str) -> Layer:
    weight = part.weight.detach().to("cpu", torch.float64)
    matrix = weight.reshape(weight.shape[0], -1)
    if part.bias is not None:
        matrix = torch.cat([matrix, part.bias.detach().to("cpu", torch.float64)[:, None]], dim=1)
    if isinstance(part, nn.Linear):
        if shape and math.prod(shape) != part.in_features:
            raise UsageError(
                f"'{name}' takes {part.in_features} inputs but is given {shape}", field="target"
            )
        geometry = Geometry(shape or (part.in_features,), (part.out_features,))
    else:
        geometry = _conv_geometry(part, shape, name)
    return Layer(matrix, part.bias is not None, 1.0, geometry)


def _conv_geometry(part: nn.Conv2d, shape: tuple[int, ...] | None, name: str) -> Geometry:
    if part.groups != 1 or part.padding_mode != "zeros" or isinstance(part.padding, str):
        raise _unsupported(name, part, "convolutions with groups=1 and numeric zero padding")
    if shape is None or len(shape) != 3:
        raise UsageError(
            f"the convolution '{name}' needs the shape of its input",
            field="input_shape",
            value=shape,
            fix="input_shape=(channels, height, width)",
        )
    kernel, stride, padding, dilation = (
        (int(pair[0]), int(pair[1]))
        for pair in (part.kernel_size, part.stride, part.padding, part.dilation)
    )
    size = tuple(
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(shape[1:], kernel, stride, padding, dilation, strict=True)
    )
    return Geometry(shape, (part.out_channels, *size), kernel, stride, padding, dilation)


def _fold_norm(layer: Layer, norm: nn.BatchNorm1d | nn.BatchNorm2d, name: str) -> Layer:
    if norm.training or norm.running_mean is None or norm.running_var is None:
        raise UsageError(
            "only a BatchNorm in evaluation mode is a fixed affine map",
            field=name,
            value="training mode",
            fix="call model.eval() first",
        )
    mean, variance = norm.running_mean.double().cpu(), norm.running_var.double().cpu()
    scale = (variance + norm.eps).rsqrt()
    shift = -mean * scale
    if norm.affine:
        gain, offset = norm.weight.detach().double().cpu(), norm.bias.detach().double().cpu()
        scale, shift = scale * gain, shift * gain + offset
    matrix = layer.matrix * scale[:, None]
    if layer.bias:
        matrix[:, -1] += shift
    else:
        matrix = torch.cat([matrix, shift[:, None]], dim=1)
    return Layer(matrix, True, layer.slope, layer.geometry)


def _unsupported(name: str, part: nn.Module, known: str) -> UsageError:
    return UsageError(
        f"'{name}' is a {type(part).__name__}, which the constructions cannot represent",
        field="target",
        value=type(part).__name__,
        fix=f"supported: {known}",
    )
