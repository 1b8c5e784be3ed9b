"""Channels by the size of their filters: the baselines of pruning vision networks.

A group's score is summed over its producers, so that coupled layers decide together: l1 norms of
filters (Li et al. 2017, arXiv:1608.08710), l2 norms, the distance from the other filters (FPGM, He
et al. 2019, arXiv:1811.00250: filters near the geometric median are replaceable), or chance.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from secateur.allocation.channels import (
    check_reachable,
    lowest_units,
    ranked_widths,
    uniform_widths,
)
from secateur.methods.vision_base import VisionJob, VisionMethod, VisionOutcome
from secateur.models.channel_graph import ChannelGroup
from secateur.models.channel_surgery import shrink_channels

Norm = Literal["l1", "l2", "fpgm"]


def unit_filters(model: nn.Module, group: ChannelGroup) -> list[Tensor]:
    """The weights that make each unit, (n_units, r) float32 for every producer."""
    parameters = dict(model.named_parameters())
    found = []
    for part in group.writes():
        weight = parameters[part.parameter].detach()
        if weight.dim() < 2:
            continue
        rows = weight.float().movedim(part.dim, 0).flatten(1)
        found.append(rows[part.index.to(rows.device)].flatten(1).cpu())
    return found


def filter_scores(filters: list[Tensor], norm: Norm) -> Tensor:
    """Importance of each unit, (n_units,), summed over the layers that make it.

    >>> filter_scores([torch.tensor([[3.0, 4.0], [0.0, 1.0]])], "l2").tolist()
    [5.0, 1.0]
    """
    if norm == "l1":
        return torch.stack([f.abs().sum(1) for f in filters]).sum(0)
    if norm == "l2":
        return torch.stack([f.square().sum(1) for f in filters]).sum(0).sqrt()
    return torch.stack([torch.cdist(f, f).sum(1) for f in filters]).sum(0)


@dataclass(frozen=True)
class _Ranked(VisionMethod):
    """Scores every unit, lets the budget say how many go, and cuts the lowest."""

    def score(self, job: VisionJob, group: ChannelGroup) -> Tensor:
        """Importance of the group's units, (n_units,), higher = keep."""
        raise NotImplementedError(f"{type(self).__name__} does not score")

    def check_job(self, job: VisionJob) -> None:
        """See ``VisionMethod``."""
        check_reachable(job.groups, job.budget)

    def prune(self, job: VisionJob) -> VisionOutcome:
        """See ``VisionMethod``."""
        scores = {g.key: self.score(job, g) for g in job.groups.prunable}
        if job.ranking == "global":
            # By each group's mean: filters of one layer are larger than another's for no reason.
            even = {k: s / s.mean().clamp(min=1e-12) for k, s in scores.items()}
            widths = ranked_widths(job.groups, job.budget, even)
        else:
            widths = uniform_widths(job.groups, job.budget)
        gone = lowest_units(scores, widths)
        layers = [
            {
                "name": g.key,
                "kind": g.kind,
                "before": g.n_units,
                "after": widths[g.key],
                "scores": [round(float(s), 6) for s in scores[g.key]],
            }
            for g in job.groups.prunable
        ]
        structure = shrink_channels(job.model, job.groups, gone)
        return VisionOutcome(structure, layers=layers)


@dataclass(frozen=True)
class ChannelL1(_Ranked):
    """Channels whose filters have the smallest l1 norms go."""

    name = "channel-l1"
    summary = "vision: l1 norm of the filters that make a channel; needs no data"
    paper = "Li et al. 2017, arXiv:1608.08710"
    norm: ClassVar[Norm] = "l1"

    def score(self, job: VisionJob, group: ChannelGroup) -> Tensor:
        """See ``_Ranked``."""
        return filter_scores(unit_filters(job.model, group), self.norm)


@dataclass(frozen=True)
class ChannelL2(ChannelL1):
    """Channels whose filters have the smallest l2 norms go."""

    name = "channel-l2"
    summary = "vision: l2 norm of the filters that make a channel; needs no data"
    paper = "baseline of DEPrune"
    norm = "l2"


@dataclass(frozen=True)
class ChannelFPGM(ChannelL1):
    """Channels whose filters are nearest to all others go: the others can stand in for them."""

    name = "channel-fpgm"
    summary = "vision: distance of a channel's filters from the others'; needs no data"
    paper = "He et al. 2019, arXiv:1811.00250"
    norm = "fpgm"


@dataclass(frozen=True)
class ChannelRandom(_Ranked):
    """Channels go at random: what pruning costs without any criterion.

    Attributes:
        seed: with the group's name it fixes the choice.
    """

    name = "channel-random"
    summary = "vision: random channels, the floor below every criterion"

    seed: int = 0

    def score(self, job: VisionJob, group: ChannelGroup) -> Tensor:
        """Uniform in [0, 1)."""
        key = hashlib.sha256(f"{self.seed}/{group.key}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key[:7], "big"))
        return torch.rand(group.n_units, generator=generator)
