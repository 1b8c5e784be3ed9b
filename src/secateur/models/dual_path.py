"""One set of weights run two ways: soft (units multiplied by a number) and hard (units sliced off).

Soft: every place where a group's units are read multiplies them by its gates, which is after
batch norm and activation, where a scale counts (batch norm cancels one in front of it). A
LayerNorm over gated units weighs them by their gates. With gates of 0 and 1 both are the sliced
network exactly.

Hard: the parameters are sliced for one forward, so it costs what the cut network costs, and its
gradients reach the whole parameters; what is sliced off gets none.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from secateur.errors import UsageError
from secateur.models.attention_heads import narrow_attention
from secateur.models.channel_graph import ChannelGroup, ChannelGroups
from secateur.models.channel_surgery import shrink_channels
from secateur.models.state import forget_graphs
from secateur.models.units import along, parameters_of

Gates = Mapping[str, Tensor]
"""Group key -> (n_units,) numbers in the units' own order."""


def filter_norms(model: nn.Module, group: ChannelGroup) -> Tensor:
    """(n_units,) float32: mean over the group's layers of the L1 norm of each unit's filters.

    Biases and norms do not count. Source: S2HPruner's code (arXiv 2410.07046).
    """
    parameters = parameters_of(model)
    layers: dict[str, Tensor] = {}
    for part in group.slices:
        weight = parameters.get(part.parameter)
        if part.role == "writes" and weight is not None and weight.dim() > 1:
            value = along(weight.detach().abs(), part)
            layers[part.parameter] = layers.get(part.parameter, 0) + value
    if not layers:
        raise UsageError("no layer makes these units", field="group", value=group.key)
    return torch.stack(list(layers.values())).mean(0)


class DualPath:
    """A model's two executions over its prunable groups.

    Args:
        model: whose parameters are used; they are never changed. ``nn.MultiheadAttention`` is
            replaced by the project's own, with the same parameters under the same names.
        groups: its groups; those that are not prunable stay as they are.
    """

    def __init__(self, model: nn.Module, groups: ChannelGroups) -> None:
        self.model, self.groups = model, groups
        read = {port.module for group in groups.prunable for port in group.inputs}
        # PyTorch's own attention never calls its output projection: nothing could be multiplied.
        narrow_attention(model, read | {name.removesuffix(".out_proj") for name in read})
        modules = dict(model.named_modules())
        self._shell: tuple[tuple[tuple[str, int], ...], nn.Module] | None = None
        self._ports: dict[str, list[tuple[str, Tensor]]] = {}
        self._norms: dict[str, list[tuple[str, Tensor]]] = {}
        for group in groups.prunable:
            for port in group.inputs:
                self._ports.setdefault(port.module, []).append((group.key, port.index))
            for part in group.slices:
                name, _, leaf = part.parameter.rpartition(".")
                mixes = isinstance(modules.get(name), nn.LayerNorm | nn.RMSNorm)
                if part.role == "norm" and leaf == "weight" and mixes:
                    self._norms.setdefault(name, []).append((group.key, part.index))

    # -- soft ----------------------------------------------------------------------------------

    @contextmanager
    def soft(self, gates: Gates) -> Iterator[None]:
        """While this lasts, the model multiplies its units by ``gates`` where they are read."""
        handles = []
        try:
            for name, ports in self._ports.items():
                module = self.model.get_submodule(name)
                hook = _gating(module, ports, gates)
                handles.append(module.register_forward_pre_hook(hook))
            for name, ports in self._norms.items():
                module = self.model.get_submodule(name)
                handles.append(module.register_forward_hook(_weighing(ports, gates)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    # -- hard ----------------------------------------------------------------------------------

    def hard(self, kept: Mapping[str, Tensor], *inputs: Any) -> Any:
        """The output of the network that has only the ``kept`` units (bool (n_units,) by group)."""
        widths = tuple((key, int(units.sum())) for key, units in kept.items())
        if self._shell is None or self._shell[0] != widths:
            self._shell = (widths, self._cut_copy(kept))
        shell = self._shell[1]
        shell.train(self.model.training)
        return functional_call(shell, self.sliced(kept), inputs, tie_weights=False)

    def sliced(self, kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Every parameter without the units that are not kept, as functions of the whole ones.

        Buffers too, since some count in a forward (a batch norm that is frozen, a fixed scale); as
        copies, so that batch norms see the images of the soft network only.
        """
        gone: dict[tuple[str, int], Tensor] = {}
        buffers = {name: value.clone() for name, value in self.model.named_buffers()}
        parameters = parameters_of(self.model) | buffers
        for group in self.groups.prunable:
            units = kept.get(group.key)
            if units is None or bool(units.all()):
                continue
            for part in group.slices:
                if part.parameter in parameters:
                    at = (part.parameter, part.dim)
                    size = parameters[part.parameter].shape[part.dim]
                    mask = gone.setdefault(at, torch.zeros(size, dtype=torch.bool))
                    mask[part.index[~units.cpu()].reshape(-1)] = True
        out: dict[str, Tensor] = dict(parameters)
        for (name, dim), mask in gone.items():
            stay = (~mask).nonzero().squeeze(1).to(out[name].device)
            out[name] = out[name].index_select(dim, stay)
        return out

    @torch.no_grad()
    def _cut_copy(self, kept: Mapping[str, Tensor]) -> nn.Module:
        """A copy of the model whose modules expect sliced parameters."""
        forget_graphs(self.model)
        shell = copy.deepcopy(self.model)
        shrink_channels(shell, self.groups, {key: ~units.cpu() for key, units in kept.items()})
        return shell.requires_grad_(False)


def _unit_gates(ports: list[tuple[str, Tensor]], gates: Gates, size: int) -> Tensor | None:
    """(size,): what each position is multiplied by; 1 where no gated unit is."""
    total: Tensor | None = None
    for key, index in ports:
        if key not in gates:
            continue
        gate = gates[key]
        unit = torch.full((size,), len(gate), dtype=torch.int64, device=gate.device)
        unit[index.to(gate.device)] = torch.arange(len(gate), device=gate.device)[:, None]
        own = torch.cat([gate, gate.new_ones(1)])[unit]
        total = own if total is None else total * own
    return total


def _gating(
    module: nn.Module, ports: list[tuple[str, Tensor]], gates: Gates
) -> Callable[[nn.Module, tuple[Any, ...]], Any]:
    """A forward pre-hook that multiplies the module's input."""
    last = isinstance(module, nn.Linear) or not hasattr(module, "kernel_size")

    def hook(_: nn.Module, args: tuple[Any, ...]) -> Any:
        x = args[0]
        dim = x.dim() - 1 if last else x.dim() - len(module.kernel_size) - 1  # type: ignore[arg-type]
        gate = _unit_gates(ports, gates, x.shape[dim])
        if gate is None:
            return None
        shape = [1] * x.dim()
        shape[dim] = -1
        gated = x * gate.to(x.dtype).view(shape)
        # Self-attention gets the same tensor as query, key and value.
        return tuple(gated if arg is x else arg for arg in args)

    return hook


def _weighing(
    ports: list[tuple[str, Tensor]], gates: Gates
) -> Callable[[nn.Module, tuple[Any, ...], Any], Any]:
    """A forward hook that gives a LayerNorm (or RMSNorm) its statistics weighed by the gates."""

    def hook(module: Any, args: tuple[Any, ...], output: Any) -> Any:
        x = args[0].float()
        gate = _unit_gates(ports, gates, x.shape[-1])
        if gate is None:
            return None
        share = gate.float() / gate.float().sum()
        eps = module.eps
        if isinstance(module, nn.LayerNorm):
            x = x - (x * share).sum(-1, keepdim=True)
        elif eps is None:
            eps = torch.finfo(x.dtype).eps
        y = x * ((x.square() * share).sum(-1, keepdim=True) + eps).rsqrt()
        if module.weight is not None:
            y = y * module.weight
        if getattr(module, "bias", None) is not None:
            y = y + module.bias
        return y.to(output.dtype)

    return hook
