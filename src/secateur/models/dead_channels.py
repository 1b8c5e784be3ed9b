"""Channels whose depth-wise taps are all gone: constants, and constants can be moved elsewhere.

Such a channel gives its bias wherever it is, whatever the image. Behind its norm and activation
it is still one number; a point-wise layer that reads it adds a number to its output, and that
number fits into the batch norm behind the layer or into its bias. The channel then goes from
every layer it is in, and the network computes what it did.

With squeeze-and-excitation the number is multiplied by a gate that depends on the image, so the
channel can go only where the number is 0. Nothing is read off the network's code to find that
out: whatever else flows into the channel is replaced by noise, and a channel is dead only if
none of its readers notices. What is folded is tried on a copy first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from secateur.kernels.depthwise import computes_plainly, is_depthwise
from secateur.models.channel_graph import ChannelGroup, ChannelGroups
from secateur.models.channel_surgery import mask_channels, shrink_channels
from secateur.models.vision.outputs import logits_of

_NOISE = (1.0, 20.0)  # inside of what gates and clamps let through, and far beyond
_LOOKS, _IMAGES = 8, 4
_TOLERANCE = 1e-4  # of the largest output: what rounding may change
Masks = Mapping[str, Tensor]


def silent_channels(group: ChannelGroup, model: nn.Module, masks: Masks) -> Tensor:
    """Units of a group for which some depth-wise layer has no tap left: bool (n_units,)."""
    silent = torch.zeros(group.n_units, dtype=torch.bool)
    modules = dict(model.named_modules())
    for part in group.slices:
        layer, _, kind = part.parameter.rpartition(".")
        mask = masks.get(part.parameter)
        if mask is None or kind != "weight" or part.dim or not is_depthwise(modules[layer]):
            continue
        silent |= mask.flatten(1).all(1)[part.index].all(1)
    return silent


@torch.no_grad()
def fold_dead_channels(
    model: nn.Module, groups: ChannelGroups, masks: Masks, example: Tensor, at_least: int = 1
) -> dict[str, Tensor]:
    """Move the constants of dead channels into what comes after their readers, in ``model``.

    Args:
        masks: weight name -> True where gone (of depth-wise layers; others are not looked at).
            The weights are zero there already.
        example: an input.
        at_least: channels that stay in every group.

    Returns:
        group key -> bool (n_units,): channels that nothing needs any more. They are still
        there; ``cut_dead_channels`` removes them.
    """
    candidates = {}
    # a product sums over channels: what a constant adds to it stays in no layer's bias
    summed = {
        key for c in groups.layers if c.kind == "product" for e in c.extents for key in e.units
    }
    for group in groups.prunable:
        if group.key in summed:
            continue
        silent = silent_channels(group, model, masks)
        room = max(0, group.n_units - at_least)
        silent &= silent.cumsum(0) <= room  # the first of them; the last stay where too few would
        if silent.any():
            candidates[group.key] = silent
    if not candidates:
        return {}
    seen = _looks(model, groups, candidates, example)
    norms = _norms_behind(model, example)
    dead = {}
    for key, silent in candidates.items():
        group = groups[key]
        constant, values = _constants(group, silent, seen)
        for port in group.inputs:
            reader = model.get_submodule(port.module)
            if not _takes_constants(reader):
                # zeros at the border differ from the constant, unless it is zero itself
                constant &= (values[port.module] == 0).all(1)
        found = [
            _Fold(
                port.module,
                port.index[constant].reshape(-1),
                values[port.module][constant].reshape(-1),
                norms.get(port.module, ""),
            )
            for port in group.inputs
        ]
        if constant.any() and _holds(model, groups, {key: constant}, found, example):
            for fold in found:
                _absorb(model, fold)
            dead[key] = constant
    return dead


def cut_dead_channels(
    model: nn.Module, groups: ChannelGroups, masks: dict[str, Tensor], dead: Mapping[str, Tensor]
) -> None:
    """Remove them, from the model and from the masks; groups are stale afterwards."""
    shrink_channels(model, groups, dead, also=[masks])


def _constants(
    group: ChannelGroup, silent: Tensor, seen: Mapping[str, tuple[Tensor, Tensor]]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Which silent channels every reader saw as one number, and the number: {reader: (n, r)}."""
    constant, values = silent.clone(), {}
    for port in group.inputs:
        if port.module not in seen:  # a reader that did not run says nothing
            return torch.zeros_like(silent), {}
        low, high = seen[port.module]
        same = (low == high) & torch.isfinite(low)
        constant &= same[port.index].all(1)
        values[port.module] = low[port.index]
    return constant, values


def _looks(
    model: nn.Module, groups: ChannelGroups, candidates: Mapping[str, Tensor], example: Tensor
) -> dict[str, tuple[Tensor, Tensor]]:
    """Least and most of each channel that a reader takes in, with noise wherever else it flows."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    generator = torch.Generator().manual_seed(0)
    hooks: list[tuple[str, Callable[..., Any], bool]] = []
    for key, silent in candidates.items():
        group = groups[key]
        for port in group.outputs:
            if port.module not in group.depthwise:
                hooks.append((port.module, _noisy(port.index[silent], generator), True))
        hooks += [(port.module, _watch(port.module, seen), False) for port in group.inputs]
    was = model.training
    with _hooked(model, hooks):
        model.eval()
        for images in _noise(example, _LOOKS, generator):
            model(images)
    model.train(was)
    return seen


@contextmanager
def _hooked(model: nn.Module, hooks: list[tuple[str, Callable[..., Any], bool]]) -> Iterator[None]:
    handles = []
    try:
        for name, hook, after in hooks:
            module = model.get_submodule(name)
            add = module.register_forward_hook if after else module.register_forward_pre_hook
            handles.append(add(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _channels(module: nn.Module) -> int:
    return 1 if isinstance(module, nn.modules.conv._ConvNd) else -1


def _noisy(index: Tensor, generator: torch.Generator) -> Callable[..., Any]:
    places = index.reshape(-1)

    def hook(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        out = out.clone()
        line = out.movedim(_channels(module), 0)
        scale = _NOISE[int(torch.randint(len(_NOISE), (), generator=generator))]
        noise = torch.randn(line[places].shape, generator=generator) * scale
        line[places] = noise.to(out)
        return out

    return hook


def _watch(name: str, seen: dict[str, tuple[Tensor, Tensor]]) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any) -> None:
        line = args[0].movedim(_channels(module), 0).flatten(1)
        low, high = line.amin(1).cpu(), line.amax(1).cpu()
        if name in seen:
            low, high = torch.minimum(low, seen[name][0]), torch.maximum(high, seen[name][1])
        seen[name] = low, high

    return hook


def _takes_constants(reader: nn.Module) -> bool:
    """Whether a constant channel reaches every output alike, through a weight of the reader's own."""
    if isinstance(reader, nn.Linear):
        return type(reader).forward is nn.Linear.forward and "weight" in reader._parameters
    if not isinstance(reader, nn.Conv2d) or reader.groups != 1 or not computes_plainly(reader):
        return False
    return reader.padding == "valid" or not any(
        reader.padding if not isinstance(reader.padding, str) else (1,)
    )


class _Uses(TorchFunctionMode):
    """Counts the calls that take in each tensor somebody asked about."""

    def __init__(self) -> None:
        super().__init__()
        self.of: dict[int, int] = {}
        self.kept: list[Tensor] = []  # so that no identity is used twice

    def ask(self, tensor: Tensor) -> None:
        self.of[id(tensor)] = 0
        self.kept.append(tensor)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor | tuple | list) and not isinstance(out, torch.Size):
            for value in [*args, *(kwargs or {}).values()]:
                for part in value if isinstance(value, tuple | list) else (value,):
                    if id(part) in self.of:
                        self.of[id(part)] += 1
        return out


def _norms_behind(model: nn.Module, example: Tensor) -> dict[str, str]:
    """The batch norm that alone takes in a layer's output, and nothing else, by the layer's name."""
    uses, calls = _Uses(), Counter[str]()
    made: dict[int, str] = {}
    found: dict[str, tuple[int, str]] = {}

    def after(name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            calls[name] += 1
            if isinstance(module, nn.BatchNorm2d):
                source = made.get(id(args[0]))
                if source is not None and module.running_mean is not None:
                    found[source] = id(args[0]), name
            elif isinstance(out, Tensor):
                made[id(out)] = name
                uses.ask(out)

        return hook

    was = model.training
    layers = (nn.Conv2d, nn.BatchNorm2d)
    hooks = [(n, after(n), True) for n, m in model.named_modules() if isinstance(m, layers)]
    with _hooked(model, hooks), uses:
        model.eval()
        model(example)
    model.train(was)
    return {
        source: name
        for source, (tensor, name) in found.items()
        if uses.of[tensor] == calls[source] == calls[name] == 1
    }


@dataclass(frozen=True, eq=False)
class _Fold:
    """Channels ``places`` of a reader's input are ``values``; ``norm`` is what stands behind it."""

    reader: str
    places: Tensor
    values: Tensor
    norm: str


def _absorb(model: nn.Module, fold: _Fold) -> None:
    """Add what the constants give to the reader's output for good."""
    reader, places, values = model.get_submodule(fold.reader), fold.places, fold.values
    weight = reader.weight
    assert isinstance(weight, Tensor)
    if not bool(values.any()):
        return
    part = (
        weight[:, places.to(weight.device)].flatten(2)
        if weight.dim() > 2
        else (weight[:, places.to(weight.device), None])
    )
    shift = (part.sum(2).double() @ values.to(weight.device).double()).to(weight.dtype)
    norm = model.get_submodule(fold.norm) if fold.norm else None
    if isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None:
        norm.running_mean -= shift
    elif reader.bias is not None:
        assert isinstance(reader.bias, Tensor)
        reader.bias += shift
    else:
        reader.bias = nn.Parameter(shift)


def _holds(
    model: nn.Module,
    groups: ChannelGroups,
    gone: Mapping[str, Tensor],
    folds: list[_Fold],
    example: Tensor,
) -> bool:
    """Whether a copy does the same with the constants moved and the channels zeroed."""
    trial = deepcopy(model).eval()
    x = next(_noise(example, 1, torch.Generator().manual_seed(1)))
    wanted = logits_of(trial(x))
    for fold in folds:
        _absorb(trial, fold)
    mask_channels(trial, groups, gone)
    far = float((logits_of(trial(x)) - wanted).abs().max())
    return far <= _TOLERANCE * float(wanted.abs().max())


def _noise(example: Tensor, times: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Images of noise, as bright as the example."""
    for _ in range(times):
        noise = torch.randn((_IMAGES, *example.shape[1:]), generator=generator).to(example)
        yield noise * example.std().clamp_min(0.1) + example.mean()
