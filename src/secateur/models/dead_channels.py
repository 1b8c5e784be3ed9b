"""Channels whose depth-wise taps are all gone: constants, and constants can be moved elsewhere.

Such a channel gives its bias wherever it is, whatever the image. Behind its norm and activation
it is still one number; a point-wise layer that reads it adds a number to its output, and that
number fits into the batch norm behind the layer or into its bias. The channel then goes from
every layer it is in, and the network computes what it did.

With squeeze-and-excitation the number is multiplied by a gate that depends on the image, so the
channel can go only where the number is 0. Nothing is read off the network's code to find that
out: whatever else flows into the channel is replaced by noise, and a channel is dead only if
none of its readers notices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from secateur.kernels.depthwise import is_depthwise
from secateur.models.channel_graph import ChannelGroup, ChannelGroups
from secateur.models.channel_surgery import shrink_channels

_NOISE = (1.0, 20.0)  # inside of what gates and clamps let through, and far beyond
_LOOKS, _IMAGES = 8, 4
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
    for group in groups.prunable:
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
        if constant.any():
            for port in group.inputs:
                _absorb(
                    model.get_submodule(port.module),
                    port.index[constant].reshape(-1),
                    values[port.module][constant].reshape(-1),
                    norms.get(port.module),
                )
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
        for _ in range(_LOOKS):
            noise = torch.randn((_IMAGES, *example.shape[1:]), generator=generator).to(example)
            model(noise * example.std().clamp_min(0.1) + example.mean())
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
        low, high = line.amin(1), line.amax(1)
        if name in seen:
            low, high = torch.minimum(low, seen[name][0]), torch.maximum(high, seen[name][1])
        seen[name] = low, high

    return hook


def _takes_constants(reader: nn.Module) -> bool:
    """Whether a constant channel reaches every output alike."""
    if isinstance(reader, nn.Linear):
        return True
    if not isinstance(reader, nn.Conv2d) or reader.groups != 1:
        return False
    return reader.padding == "valid" or not any(
        reader.padding if not isinstance(reader.padding, str) else (1,)
    )


def _norms_behind(model: nn.Module, example: Tensor) -> dict[str, nn.BatchNorm2d]:
    """The batch norm that alone takes in a layer's output, by the layer's name."""
    made: dict[int, str] = {}
    kept: list[Tensor] = []  # so that no identity is used twice
    found: dict[str, nn.BatchNorm2d] = {}

    def after(name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            if isinstance(module, nn.BatchNorm2d):
                source = made.get(id(args[0]))
                if source is not None and module.running_mean is not None:
                    found[source] = module
            elif isinstance(out, Tensor):
                made[id(out)] = name
                kept.append(out)

        return hook

    was = model.training
    layers = (nn.Conv2d, nn.BatchNorm2d)
    hooks = [(n, after(n), True) for n, m in model.named_modules() if isinstance(m, layers)]
    with _hooked(model, hooks):
        model.eval()
        model(example)
    model.train(was)
    return found


def _absorb(reader: nn.Module, places: Tensor, values: Tensor, norm: nn.BatchNorm2d | None) -> None:
    """Add what the channels ``places`` at ``values`` give to the reader's output for good."""
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
    if norm is not None and norm.running_mean is not None:
        norm.running_mean -= shift
    elif reader.bias is not None:
        assert isinstance(reader.bias, Tensor)
        reader.bias += shift
    else:
        reader.bias = nn.Parameter(shift)
