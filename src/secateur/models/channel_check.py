"""Trying a network's groups before anything is cut: a copy that is cut must do what a masked one does.

Code with widths written into it (``reshape(b, n, 3, heads, c // heads)``) runs wrong when a layer is
narrower, and no graph can know. So every group is cut on trial, on copies; what does not hold is
tried again with the widths that modules have in attributes following the cut, then with an equal
attention of ours in the place of the network's own, and what still does not is marked as not
prunable, with what happened.
"""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from secateur.models.attention_heads import is_qkv, narrow_qkv
from secateur.models.channel_graph import ChannelGroup, ChannelGroups
from secateur.models.channel_surgery import mask_channels, shrink_channels

TOLERANCE = 1e-3
"""Largest difference, over the largest output, that rounding explains."""


@torch.no_grad()
def check_groups(
    model: nn.Module, groups: ChannelGroups, example: Tensor | tuple[Any, ...], seed: int = 0
) -> ChannelGroups:
    """The groups, those that cannot really be cut marked as such; the model stays as it is.

    Args:
        example: as of ``channel_groups``; random numbers of its shape are tried.
        seed: which units go on trial.
    """
    trial = _Trial(model, example, seed)
    live = trial.model
    if trial.wrong(groups, groups.prunable) is None:
        return groups
    sized = groups.changed(_sure(groups.prunable))
    if trial.wrong(sized, sized.prunable) is None:
        return sized
    bad = trial.failing(groups, groups.prunable)
    sized = groups.changed(_sure(groups[key] for key in bad))
    still = trial.failing(sized, sized.prunable)
    if still.keys() < bad.keys():
        groups, bad = groups.changed(_sure(groups[key] for key in bad.keys() - still.keys())), still
    if not bad:
        return groups
    alike = trial.faithful()
    if alike:
        trial.model = deepcopy(live)
        narrow_qkv(trial.model, alike)
        still = trial.failing(groups, groups.prunable)
        saved = bad.keys() - still.keys()
        groups = groups.changed({k: {"rewritten": tuple(alike)} for k in saved})
        bad = still
    return groups.refuse(bad) if bad else groups


def _sure(groups: Iterable[ChannelGroup]) -> dict[str, dict[str, Any]]:
    """Changes by which widths in attributes follow the cuts of these groups."""
    return {
        g.key: {"sized": tuple(replace(one, sure=True) for one in g.sized)}
        for g in groups
        if g.sized
    }


class _Trial:
    def __init__(self, model: nn.Module, example: Tensor | tuple[Any, ...], seed: int) -> None:
        inputs = example if isinstance(example, tuple) else (example,)
        device = next(iter(model.parameters())).device
        generator = torch.Generator().manual_seed(seed)
        self.generator = generator
        self.model = _livened(model, generator)
        self.inputs = [
            torch.randn(t.shape, generator=generator).to(device, t.dtype)
            if isinstance(t, Tensor) and t.is_floating_point()
            else t
            for t in inputs
        ]

    def wrong(self, groups: ChannelGroups, some: list[ChannelGroup]) -> str | None:
        """None if these groups can be cut together, and half of them without the others."""
        order = torch.randperm(len(some), generator=self.generator).tolist()
        half = [some[i] for i in order[: len(some) // 2]]
        return self(groups, some) or (self(groups, half) if half else None)

    def failing(self, groups: ChannelGroups, some: list[ChannelGroup]) -> dict[str, str]:
        """Which of these groups cannot be cut, and what happens."""
        bad: dict[str, str] = {}
        self.search(groups, some, bad)
        left = [g for g in some if g.key not in bad]
        # Groups that hold one by one and not together: give them up one after another.
        while left and bad and (why := self.wrong(groups, left)) is not None:
            bad[left.pop().key] = why
        return bad

    def faithful(self) -> list[str]:
        """Attentions for which ours can stand in without changing what the network computes."""
        wanted, found = None, []
        for name, module in self.model.named_modules():
            if not name or not is_qkv(module):
                continue
            if wanted is None:
                wanted = _first(deepcopy(self.model).eval()(*self.inputs))
            other = deepcopy(self.model).eval()
            narrow_qkv(other, [name])
            try:
                output = _first(other(*self.inputs))
            except Exception:  # it is called otherwise than ours can be
                continue
            if float((output - wanted).abs().max()) <= 1e-4 * (float(wanted.abs().max()) or 1.0):
                found.append(name)
        return found

    def search(self, groups: ChannelGroups, some: list[ChannelGroup], bad: dict[str, str]) -> None:
        """Halve what does not hold until single groups are left."""
        why = self.wrong(groups, some) if some else None
        if why is None:
            return
        if len(some) == 1:
            bad[some[0].key] = why
            return
        middle = len(some) // 2
        self.search(groups, some[:middle], bad)
        self.search(groups, some[middle:], bad)

    def __call__(self, groups: ChannelGroups, some: list[ChannelGroup]) -> str | None:
        """None if these groups can be cut together, else what went wrong."""
        gone = {}
        for group in some:
            most = max(2, group.n_units // 2 + 1)
            count = int(torch.randint(1, most, (), generator=self.generator))
            order = torch.randperm(group.n_units, generator=self.generator)
            units = torch.zeros(group.n_units, dtype=torch.bool)
            units[order[:count]] = True
            gone[group.key] = units
        masked, cut = deepcopy(self.model).eval(), deepcopy(self.model).eval()
        mask_channels(masked, groups, gone)
        wanted = _first(masked(*self.inputs))
        try:
            shrink_channels(cut, groups, gone)
            found = _first(cut(*self.inputs))
        except Exception as error:  # the model's own code may raise anything
            words = str(error).strip().splitlines() or [type(error).__name__]
            return f"the model's code needs its width: {words[0][:160]}"
        if found.shape != wanted.shape:
            return f"when cut, the output is {tuple(found.shape)} instead of {tuple(wanted.shape)}"
        far = _apart(found, wanted)
        if not far <= TOLERANCE:
            far = min(far, self.exactly(masked, cut))
        if not far <= TOLERANCE:
            return f"when cut, the output is off by {far:.2g} of its largest"
        return None

    def exactly(self, masked: nn.Module, cut: nn.Module) -> float:
        """How far apart they are in float64: a deep network may blow rounding up."""
        inputs = [x.double() if isinstance(x, Tensor) else x for x in self.inputs]
        try:
            wanted = _first(masked.double()(*inputs), torch.float64)
            return _apart(_first(cut.double()(*inputs), torch.float64), wanted)
        except Exception:  # code with a type written into it
            return float("inf")


@torch.no_grad()
def _livened(model: nn.Module, generator: torch.Generator) -> nn.Module:
    """A copy in which no branch is silent: scales that start near zero would hide a wrong cut."""
    copy = deepcopy(model).eval()
    for parameter in copy.parameters():
        if parameter.is_floating_point() and max(parameter.shape, default=1) == parameter.numel():
            more = torch.rand(parameter.shape, generator=generator) / 2 + 0.5
            parameter.add_(more.to(parameter.device, parameter.dtype))
    return copy


def _apart(found: Tensor, wanted: Tensor) -> float:
    """Largest difference, over the largest output; infinite where there is none to tell."""
    far = float((found - wanted).abs().max()) / (float(wanted.abs().max()) or 1.0)
    return far if far == far else float("inf")


def _first(output: Any, kind: torch.dtype = torch.float32) -> Tensor:
    """The first tensor of an output (its logits, where it says so)."""
    output = getattr(output, "logits", output)
    while not isinstance(output, Tensor):
        output = next(iter(output.values() if isinstance(output, dict) else output))
    return output.to(kind)
