"""Magnitude and random units: the two baselines of every structured method."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from secateur.methods.structured_base import ScoreJob, StructuredMethod
from secateur.models.units import Group, along, parameters_of


@dataclass(frozen=True)
class UnitMagnitude(StructuredMethod):
    """Remove the units of smallest norm: (sum of |w|^p over all slices of the unit)^(1/p).

    The l2 baseline of LLM-Pruner (Ma et al., NeurIPS 2023, table 1). Needs no data.

    Attributes:
        norm: l1 or l2.
    """

    name = "unit-magnitude"
    summary = "norm of a whole unit (head, channel, layer); needs no data"
    paper = "baseline of Ma et al. 2023, arXiv:2305.11627"
    needs_data = False

    norm: Literal["l1", "l2"] = "l2"

    def scores(self, job: ScoreJob) -> dict[str, Tensor]:
        """Norm of every unit, (n_units,)."""
        return {group.key: self._of(job, group) for group in job.groups}

    def _of(self, job: ScoreJob, group: Group) -> Tensor:
        parameters = parameters_of(job.model)
        power = 1 if self.norm == "l1" else 2
        total = torch.zeros(group.n_units)
        if group.kind == "layer":
            for number in range(group.n_units):
                inside = f"{group.key}.{number}."
                total[number] = sum(
                    float(p.detach().float().abs().pow(power).sum())
                    for name, p in parameters.items()
                    if name.startswith(inside)
                )
        seen: set[tuple[int, int, int]] = set()
        for part in group.slices:
            value = parameters[part.parameter].detach()
            place = (value.data_ptr(), part.dim, int(part.index[0, 0]))
            if place in seen:  # tied: it is one weight, and counts once
                continue
            seen.add(place)
            total += along(value.float().abs().pow(power), part).cpu()
        return total if power == 1 else total.sqrt()


@dataclass(frozen=True)
class UnitRandom(StructuredMethod):
    """Remove units at random: what pruning would cost without any criterion.

    Attributes:
        seed: together with the group's key it fixes the choice.
    """

    name = "unit-random"
    summary = "random units, the floor below every structured method"
    needs_data = False

    seed: int = 0

    def scores(self, job: ScoreJob) -> dict[str, Tensor]:
        """Uniform in [0, 1) for every unit."""
        found = {}
        for group in job.groups:
            digest = hashlib.sha256(f"{self.seed}/{group.key}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
            found[group.key] = torch.rand(group.n_units, generator=generator)
        return found
