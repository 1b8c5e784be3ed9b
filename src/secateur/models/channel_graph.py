"""The coupling graph of a vision network: which channels go together, and where each is kept.

``channel_groups`` follows one forward (``channel_trace``), so any network that runs can be read:
convolutions (dense, grouped, depth-wise), linear layers, norms, additions, gates, concatenations,
attention. What cannot go says why. Sources of what is wrong with other such graphs: spec 05, B5.

>>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
>>> groups = channel_groups(net, torch.zeros(1, 3, 8, 8))
>>> [(g.key, g.n_units, g.prunable) for g in groups]
[('0', 8, True), ('3', 4, False)]
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from secateur.errors import UsageError
from secateur.masks.structured import structure_of
from secateur.models.channel_cost import Extent, LayerCost, TensorSize, Widths
from secateur.models.channel_labels import FREE
from secateur.models.channel_sizes import Sized
from secateur.models.channel_trace import Touch, Trace, Unknown, follow
from secateur.models.units import Group, Kind, Role, Slice

__all__ = ["ChannelGroup", "ChannelGroups", "Port", "channel_groups"]


@dataclass(frozen=True, eq=False)
class Port:
    """Where units are among the channels that enter or leave a module.

    Attributes:
        module: its name.
        index: (n_units, r) positions along the channels (dimension 1 of a convolution's
            activations, the last of a linear layer's).
    """

    module: str
    index: Tensor


@dataclass(frozen=True, eq=False)
class ChannelGroup(Group):
    """Channels (or heads) of which any may go, wherever they are.

    Attributes:
        producers, consumers, norms, depthwise: modules that write, read, normalise the units, or
            convolve each by itself.
        inputs, outputs: where they are in the activations that ``consumers`` take in and
            ``producers`` give out.
        prunable: whether any can go.
        reason: why not.
        counts: (module, attribute) that count the units, and follow a cut.
        sized: attributes that may count their channels (``channel_sizes``).
        rewritten: attentions whose code has widths written into it, and which an equal one stands
            in for when the units are cut (``attention_heads.QkvAttention``).
    """

    producers: tuple[str, ...] = ()
    consumers: tuple[str, ...] = ()
    norms: tuple[str, ...] = ()
    depthwise: tuple[str, ...] = ()
    inputs: tuple[Port, ...] = ()
    outputs: tuple[Port, ...] = ()
    prunable: bool = True
    reason: str = ""
    counts: tuple[tuple[str, str], ...] = ()
    sized: tuple[Sized, ...] = ()
    rewritten: tuple[str, ...] = ()


@dataclass(eq=False)
class ChannelGroups:
    """All groups of a network, in the order of their first layers.

    Attributes:
        groups: also those that cannot be pruned.
        layers: what each layer costs, in the order they ran.
        sizes: elements of every parameter.
        shapes: shape of every module's output for the example.
    """

    groups: list[ChannelGroup]
    layers: tuple[LayerCost, ...] = ()
    sizes: tuple[TensorSize, ...] = ()
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def __iter__(self) -> Iterator[ChannelGroup]:
        return iter(self.groups)

    def __len__(self) -> int:
        return len(self.groups)

    def __contains__(self, key: object) -> bool:
        return any(group.key == key for group in self.groups)

    def __getitem__(self, key: str) -> ChannelGroup:
        """The group of that key.

        Raises:
            UsageError: there is none.
        """
        for group in self.groups:
            if group.key == key:
                return group
        raise UsageError(
            "the model has no such group of channels",
            field="group",
            value=key,
            fix=f"e.g. {self.groups[0].key}" if self.groups else None,
        )

    @property
    def prunable(self) -> list[ChannelGroup]:
        """The groups that may lose units."""
        return [group for group in self.groups if group.prunable]

    @property
    def fixed(self) -> list[ChannelGroup]:
        """The others; each has a ``reason``."""
        return [group for group in self.groups if not group.prunable]

    def of(self, *kinds: str) -> list[ChannelGroup]:
        """The groups of these kinds."""
        return [group for group in self.groups if group.kind in kinds]

    def widths(self) -> dict[str, int]:
        """Units there are now, by group."""
        return {group.key: group.n_units for group in self.groups}

    def flops(self, widths: Widths | None = None) -> Any:
        """Operations for the example (2 for a multiply-add) when groups have these widths.

        Exact at whole numbers, differentiable in tensors. Norms and activations are left out.
        """
        return sum(layer.flops(widths) for layer in self.layers)

    def parameters(self, widths: Widths | None = None) -> Any:
        """Elements of all parameters when groups have these widths."""
        return sum(size.elements(widths) for size in self.sizes)

    def changed(self, changes: Mapping[str, Mapping[str, Any]]) -> ChannelGroups:
        """The same with other fields of some groups: key -> field -> value."""
        groups = [replace(g, **changes[g.key]) if g.key in changes else g for g in self.groups]
        return ChannelGroups(groups, self.layers, self.sizes, self.shapes)

    def refuse(self, reasons: Mapping[str, str]) -> ChannelGroups:
        """The same with more groups that cannot be pruned: key -> why."""
        return self.changed({k: {"prunable": False, "reason": why} for k, why in reasons.items()})


def channel_groups(
    model: nn.Module, example: Tensor | tuple[Any, ...], *, unknown: Unknown = "error"
) -> ChannelGroups:
    """The groups of channels of ``model``, found by following one forward; it stays as it is.

    Args:
        example: an input, of batch size 1 if ``flops`` is to speak of one image.
        unknown: with ``"keep"``, channels that meet an operation that cannot be followed stay
            whole instead of ending the search.

    Raises:
        SecateurError: an operation that cannot be followed, naming it and its module.
        UsageError: the model does not run on the example.
    """
    return _Assembly(model, follow(model, example, unknown=unknown)).groups()


class _Assembly:
    """From a trace to groups: units with the same places form one."""

    def __init__(self, model: nn.Module, trace: Trace) -> None:
        self.model, self.trace = model, trace
        self.tensors = dict(model.named_parameters()) | dict(model.named_buffers())
        self._loose()
        self.roots = {
            place: trace.atoms.find(t.labels).numpy() for place, t in trace.touches.items()
        }
        self.reasons = trace.atoms.reasons()
        # Root -> number of its group among those that can be pruned.
        self._index = np.full(len(trace.atoms), -1, dtype=np.int64)
        self._groups: list[ChannelGroup] = []

    def _loose(self) -> None:
        """Parameters that met channels element by element: along which dimension they count."""
        trace = self.trace
        solid = {
            int(root)
            for touch in trace.touches.values()
            for root in np.unique(trace.atoms.find(touch.labels).numpy())
        }
        for name, labels in trace.loose.items():
            roots = trace.atoms.find(labels).numpy()
            met = np.isin(roots, list(solid)) & (roots != FREE)
            if not met.any():
                continue
            for dim in range(roots.ndim):
                line = _along(np.where(met, roots, FREE), dim)
                if line is not None and len(np.unique(line)) > 1:
                    role: Role = "embed" if roots.ndim > 1 else "norm"
                    trace.touches[name, dim] = Touch(
                        name, dim, role, torch.from_numpy(line), name.rpartition(".")[0]
                    )
                    break
            else:
                if len(np.unique(roots[met])) > 1:
                    why = f"meets '{name}' in a way that is not followed"
                    trace.atoms.pin(torch.from_numpy(roots[met]), why)

    def groups(self) -> ChannelGroups:
        places = list(self.trace.touches)
        found: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for number, place in enumerate(places):
            here, counts = np.unique(self.roots[place], return_counts=True)
            for root, count in zip(here.tolist(), counts.tolist(), strict=True):
                if root != FREE:
                    found[root].append((number, count))
        alike: dict[tuple[Any, ...], list[int]] = defaultdict(list)
        for root, signature in found.items():
            if any(self.trace.touches[places[n]].role == "writes" for n, _ in signature):
                alike[tuple(signature), self.reasons.get(root, "")].append(root)
        out: list[ChannelGroup] = []
        taken: dict[str, int] = {}
        for (signature, reason), roots in sorted(alike.items(), key=lambda item: item[0][0]):
            touches = [self.trace.touches[places[n]] for n, _ in signature]
            key = next(t.module for t in touches if t.role == "writes")
            number = taken.get(key, 0)
            taken[key] = number + 1
            group = self._group(f"{key}#{number}" if number else key, roots, touches, reason)
            out.append(group)
            if group.prunable:
                self._index[roots] = len(self._groups)
                self._groups.append(group)
        layers = tuple(
            LayerCost(c.name, c.kind, c.factor, tuple(self._extent(part) for part in c.labels))
            for c in self.trace.costs
        )
        return ChannelGroups(out, layers, self._sizes(), self.trace.shapes)

    def _group(self, key: str, roots: list[int], touches: list[Touch], reason: str) -> ChannelGroup:
        first = self.roots[touches[0].name, touches[0].dim]
        place = {int(root): i for i, root in reversed(list(enumerate(first.tolist())))}
        roots = sorted(roots, key=lambda root: place[root])
        slices = tuple(
            Slice(t.name, t.dim, t.role, _positions(self.roots[t.name, t.dim], roots))
            for t in touches
        )
        held = set(roots)
        counts = tuple(
            dict.fromkeys(
                (module, attribute)
                for module, attribute, labels in self.trace.counts
                if held & set(self.trace.atoms.find(labels).tolist())
            )
        )
        normed = any(held & set(self.trace.atoms.find(n).tolist()) for n in self.trace.normed)
        kind: Kind = "head" if counts else "stem" if normed else "channel"
        if not reason and len(roots) < 2:
            reason = "is all there is of its kind"
        weights = sum(self._own(s) for s in slices if self.tensors[s.parameter].dim() > 1)
        total = sum(
            self._own(s) for s in slices if isinstance(self.tensors[s.parameter], nn.Parameter)
        )
        original, size = self._numbers(key, len(roots))
        if not reason and size < len(roots):
            reason = "has more units than the record of earlier cuts knows"
        return ChannelGroup(
            key=key,
            kind=kind,
            slices=slices,
            original=original,
            total=size,
            weights=weights,
            parameters=total,
            producers=_modules(touches, "writes"),
            consumers=_modules(touches, "reads"),
            norms=_modules(touches, "norm"),
            depthwise=tuple(
                name
                for name in _modules(touches, "per_unit")
                if hasattr(self.trace.modules[name], "groups")
            ),
            inputs=self._ports(touches, "reads", roots),
            outputs=self._ports(touches, "writes", roots),
            prunable=not reason,
            reason=reason,
            counts=counts,
            sized=self._sized(roots),
        )

    def _sized(self, roots: list[int]) -> tuple[Sized, ...]:
        """Attributes that count positions of these units, and how many of each."""
        found = []
        for one in self.trace.sized:
            labels = self.trace.atoms.find(one.owned).numpy()
            line = np.where((labels == labels[:, :1]).all(1), labels[:, 0], FREE)
            known, counts = np.unique(line, return_counts=True)
            owners = dict(zip(known.tolist(), counts.tolist(), strict=True))
            owned = torch.tensor([owners.get(root, 0) for root in roots])
            if owned.any():
                found.append(replace(one, owned=owned))
        return tuple(found)

    def _own(self, part: Slice) -> int:
        tensor = self.tensors[part.parameter]
        return int(tensor.numel() // tensor.shape[part.dim] * part.index.shape[1])

    def _numbers(self, key: str, count: int) -> tuple[Tensor, int]:
        """Original numbers of the units, if some were cut before."""
        before = structure_of(self.model)
        gone = None if before is None else before.gone.get(key)
        if gone is None:
            return torch.arange(count)[:, None], count
        left = torch.nonzero(~gone)
        return left if len(left) == count else torch.arange(count)[:, None], len(gone)

    def _ports(self, touches: list[Touch], role: str, roots: list[int]) -> tuple[Port, ...]:
        found: dict[str, Port] = {}
        for touch in touches:
            if touch.role == role and touch.port is not None and touch.module not in found:
                line = self.trace.atoms.find(touch.port).numpy()
                found[touch.module] = Port(touch.module, _positions(line, roots))
        return tuple(found.values())

    def _extent(self, labels: Tensor) -> Extent:
        roots = self.trace.atoms.find(labels).numpy()
        held = self._index[roots[roots != FREE]]
        counts = np.bincount(held[held >= 0], minlength=len(self._groups)).tolist()
        units = {
            group.key: (count / group.n_units, group.n_units)
            for group, count in zip(self._groups, counts, strict=True)
            if count
        }
        return Extent(len(roots) - sum(counts), units)

    def _sizes(self) -> tuple[TensorSize, ...]:
        found = []
        for name, parameter in self.model.named_parameters():
            rest, extents = 1, []
            for dim, size in enumerate(parameter.shape):
                touch = self.trace.touches.get((name, dim))
                if touch is None:
                    rest *= size
                else:
                    extents.append(self._extent(touch.labels))
            found.append(TensorSize(name, rest, tuple(extents)))
        return tuple(found)


def _along(roots: np.ndarray, dim: int) -> np.ndarray | None:
    """The one root at each position of ``dim``, None if some position has several."""
    line = np.moveaxis(roots, dim, 0).reshape(roots.shape[dim], -1)
    most = line.max(1)
    known = np.where(line == FREE, most[:, None], line)
    return most if bool((known == most[:, None]).all()) else None


def _positions(line: np.ndarray, roots: Iterable[int]) -> Tensor:
    """(n_units, r) where each root is along ``line``."""
    order = np.argsort(line, kind="stable")
    wanted = np.fromiter(roots, dtype=np.int64)
    starts = np.searchsorted(line[order], wanted)
    each = int((line == wanted[0]).sum())
    return torch.from_numpy(order[starts[:, None] + np.arange(each)].astype(np.int64))


def _modules(touches: Iterable[Touch], role: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(t.module for t in touches if t.role == role))
