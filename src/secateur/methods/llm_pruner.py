"""LLM-Pruner: coupled channels ranked by what the loss's gradient says of all their weights.

Ma, Fang, Wang, NeurIPS 2023, arXiv:2305.11627. The mathematics is in ``group_importance``;
here it is applied to a model's groups.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from secateur.errors import UsageError
from secateur.evidence.gradients import gradients_by_block
from secateur.evidence.group_gradients import direct_sums
from secateur.evidence.objectives import Batch, Objective, language_model
from secateur.evidence.replay import Replay
from secateur.evidence.statistics import GradientMoments
from secateur.methods.base import one_of
from secateur.methods.group_importance import (
    CRITERIA,
    NORMS,
    REDUCTIONS,
    Criterion,
    Reduction,
    channel_importance,
    folded,
    reduced,
)
from secateur.methods.structured_base import ScoreJob, StructuredMethod
from secateur.models.anatomy import Block, ModelView
from secateur.models.units import Group, Slice, parameters_of, stack_of
from secateur.progress import SILENT, Progress

Sums = Mapping[str, GradientMoments]


@dataclass(frozen=True)
class LLMPruner(StructuredMethod):
    """Remove the heads, channels, residual channels or layers of least importance.

    A unit's importance is the sum over its channels, and over the members of its group (q, k,
    v and o of a head; gate, up and down of a channel), of |W g| (``element1``): to first order
    what the loss loses with each of its weights. Survivors stay as they are.

    Which units are ranked is the recipe's choice of kinds: ``head`` and ``ffn`` are the paper's
    "block-wise", ``stem`` its "channel-wise", ``layer`` its "layer-wise" pruning. The authors
    use 10 sequences of 64 tokens (``--samples 10 --length 64``), and leave the first four and
    the last two of LLaMA-7B's 32 layers alone; their ratio is of the layers that are cut.

    Gradients live for one block at a time: each block is recomputed and differentiated by
    itself, its units are scored, and its gradients are dropped before the next block's come.
    The residual width needs the whole model's at once; so does, by choice, a calibration set
    so large that its hidden states between all blocks would take more memory than the sums of
    all gradients.

    With grouped-query attention a key-value head answers for its own query heads
    [h rep, (h + 1) rep); the authors' Llama 3 script adds up heads h, h + n_kv, h + 2 n_kv...,
    which are not its own, so published Llama 3 figures rank other groups than ours.

    Attributes:
        criterion: ``element1``, ``element2``, ``mix``, ``vector``; or the baselines ``l1``,
            ``l2`` and ``random``.
        reduction: of a group's members: ``sum``, ``mean``, ``max``, ``prod``, ``first``,
            ``second``, ``last``.
        steps: units go in so many rounds, gradients taken anew before each.
        layers: of ``layer`` units: ``importance`` ranks them like all others; ``first`` keeps
            the first ones, as the authors do.
        seed: of ``random``.
    """

    name = "llm-pruner"
    summary = "coupled heads, channels or layers by |W x gradient|; no update"
    paper = "Ma et al. 2023, arXiv:2305.11627"

    criterion: Criterion = "element1"
    reduction: Reduction = "sum"
    steps: int = 1
    layers: Literal["importance", "first"] = "importance"
    seed: int = 0

    def __post_init__(self) -> None:
        one_of("criterion", self.criterion, CRITERIA)
        one_of("reduction", self.reduction, REDUCTIONS)
        one_of("layers", self.layers, ("importance", "first"))
        if self.steps < 1:
            raise UsageError("at least 1", field="steps", value=self.steps, fix="1")

    @property
    def rounds(self) -> int:
        """Steps in which the units go."""
        return self.steps

    def scores(self, job: ScoreJob) -> dict[str, Tensor]:
        """Importance of every unit, (n_units,) float64 by group key."""
        if self.criterion == "random":
            generator = torch.Generator().manual_seed(self.seed)
            return {g.key: torch.rand(g.n_units, generator=generator) for g in job.groups}
        found: dict[str, Tensor] = {}
        kept = [g for g in job.groups if g.kind == "layer" and self.layers == "first"]
        for group in kept:
            found[group.key] = torch.arange(group.n_units, 0, -1, dtype=torch.float64)
        rest = [g for g in job.groups if g.key not in found]
        local = [g for g in rest if g.kind != "stem"]
        shared = [g for g in rest if g.kind == "stem"]
        if NORMS[self.criterion]:
            _refuse_strays(job, local)
        if local and not NORMS[self.criterion]:
            found |= self._plain(job, local)
        elif local and self.by_block_is_smaller(job, local):
            found |= self._by_block(job, local)
        elif local:
            found |= self._whole(job, local)
        if shared:
            found |= self._whole(job, shared) if NORMS[self.criterion] else self._plain(job, shared)
        return {group.key: found[group.key] for group in job.groups}

    def by_block_is_smaller(self, job: ScoreJob, groups: Iterable[Group]) -> bool:
        """Whether the hidden states of all windows take less memory than all gradient sums."""
        assert job.windows is not None
        parameters = parameters_of(job.model)
        sums = len(NORMS[self.criterion]) * sum(
            4 * parameters[name].numel() for name in _names(groups, parameters)
        )
        width = job.model.get_input_embeddings().weight
        blocks = len(ModelView.of(job.model).blocks)
        hidden = (blocks + 1) * job.windows.ids.numel() * width.shape[1] * width.element_size()
        return hidden <= sums

    def _plain(self, job: ScoreJob, groups: Iterable[Group]) -> dict[str, Tensor]:
        parameters = parameters_of(job.model)
        return {g.key: self.unit_importance(g, parameters, {}) for g in groups}

    def _by_block(self, job: ScoreJob, groups: list[Group]) -> dict[str, Tensor]:
        """One block's gradients at a time: weights + one block's sums is all that is held."""
        assert job.windows is not None
        view = ModelView.of(job.model)
        parameters = parameters_of(job.model)
        inside = {block.index: [g for g in groups if _within(g, block)] for block in view.blocks}
        layered = [g for g in groups if g.kind == "layer"]
        found: dict[str, Tensor] = {
            g.key: torch.zeros(g.n_units, dtype=torch.float64) for g in layered
        }

        def chosen(block: Block) -> dict[str, nn.Parameter]:
            names = [s.parameter for g in inside[block.index] for s in g.slices]
            names += [n for g in layered for n in _matrices(g, block.index, parameters)]
            return {name: parameters[name] for name in names}

        def score(block: Block, sums: dict[str, GradientMoments]) -> None:
            for group in inside[block.index]:
                found[group.key] = self.unit_importance(group, parameters, sums)
            for group in layered:
                names = _matrices(group, block.index, parameters)
                found[group.key][block.index] = sum(
                    float(self._channels(parameters[n], 0, sums[n]).sum()) for n in names
                )

        replay = Replay(
            view,
            job.windows.ids,
            job.windows.mask,
            batch_size=1,
            device=next(job.model.parameters()).device,
        ).start()
        gradients_by_block(
            replay,
            NORMS[self.criterion],
            score,
            chunk=len(job.windows),
            parameters=chosen,
            progress=job.progress,
        )
        return found

    def _whole(self, job: ScoreJob, groups: list[Group]) -> dict[str, Tensor]:
        return importances(
            job.model, groups, job.samples(), language_model, method=self, progress=job.progress
        )

    def unit_importance(self, group: Group, parameters: Mapping[str, Tensor], sums: Sums) -> Tensor:
        """(n_units,) float64 of one group.

        Args:
            parameters: by name, at least those the group's slices name.
            sums: gradient sums by parameter name; empty for criteria that need none.
        """
        if group.kind == "layer":
            inside = [_matrices(group, number, parameters) for number in range(group.n_units)]
            totals = [
                sum(float(self._channels(parameters[n], 0, sums.get(n)).sum()) for n in names)
                for names in inside
            ]
            return torch.tensor(totals, dtype=torch.float64)
        parts = [s for s in group.slices if s.role != "per_unit"]
        width = min(part.index.shape[1] for part in parts)
        members: dict[str, Tensor] = {}
        seen: set[tuple[int, int, int]] = set()
        for part in parts:
            weight = parameters[part.parameter]
            place = (id(weight), part.dim, int(part.index[0, 0]))
            if place in seen:  # tied: it is one weight, and counts once
                continue
            seen.add(place)
            channels = self._channels(weight, part.dim, sums.get(part.parameter))
            for name, index in _members(group, part, width):
                own = folded(channels, index, width).cpu()
                members[name] = members[name] + own if name in members else own
        return reduced(list(members.values()), self.reduction)

    def _channels(self, weight: Tensor, dim: int, sums: GradientMoments | None) -> Tensor:
        found = {} if sums is None else sums.sums
        channels = channel_importance(
            weight.detach(), dim, self.criterion, found.get("signed"), found.get("l2")
        )
        # Every criterion is linear in the sums, so their mean is taken of the channels.
        return channels if sums is None else channels / max(1, sums.samples)


def importances(
    model: nn.Module,
    groups: Iterable[Group],
    batches: Iterable[Batch],
    objective: Objective,
    *,
    method: LLMPruner | None = None,
    progress: Progress = SILENT,
) -> dict[str, Tensor]:
    """Importance of every unit of any model under any objective, (n_units,) by group key.

    For encoders and encoder-decoders (whose objective needs labels), and for the residual
    width: one gradient sum of every parameter concerned is held meanwhile.

    Args:
        batches: tensors by name, samples along the first dimension.
        objective: see ``secateur.evidence.objectives``.
        method: criterion and reduction; by default those of the paper.
    """
    method = method or LLMPruner()
    groups = list(groups)
    parameters = parameters_of(model)
    names = _names(groups, parameters)
    sums = direct_sums(
        model,
        {name: parameters[name] for name in names},
        batches,
        objective,
        NORMS[method.criterion],
        progress=progress,
    )
    return {g.key: method.unit_importance(g, parameters, sums) for g in groups}


def _members(group: Group, part: Slice, width: int) -> list[tuple[str, Tensor]]:
    """The group members a slice holds: a weight and its bias are one, a fused gate-up two."""
    name = part.parameter.rpartition(".")[0] or part.parameter
    first = int(part.index[0, 0])  # tells the parts of a fused query-key-value matrix apart
    if group.kind == "ffn" and part.index.shape[1] > width:
        columns = part.index.split(width, 1)
        return [(f"{name}[{n}]", index) for n, index in enumerate(columns)]
    return [(f"{name}:{part.role}:{first}", part.index)]


def _names(groups: Iterable[Group], parameters: Mapping[str, Tensor]) -> list[str]:
    """Every parameter the groups' importances are read from."""
    names: dict[str, None] = {}
    for group in groups:
        names |= dict.fromkeys(part.parameter for part in group.slices)
        if group.kind == "layer":
            for number in range(group.n_units):
                names |= dict.fromkeys(_matrices(group, number, parameters))
    return list(names)


def _matrices(group: Group, number: int, parameters: Mapping[str, Tensor]) -> list[str]:
    """Names of the matrices of one layer of a group of layers."""
    start = f"{group.key}.{number}."
    return [name for name, p in parameters.items() if name.startswith(start) and p.dim() > 1]


def _refuse_strays(job: ScoreJob, groups: Iterable[Group]) -> None:
    """Groups of another stack than the decoder's, which the language-model loss does not rank."""
    blocks = ModelView.of(job.model).blocks
    for group in groups:
        if group.kind != "layer" and not any(_within(group, block) for block in blocks):
            raise UsageError(
                "lies in no block of the decoder",
                field="group",
                value=group.key,
                fix="for encoders and encoder-decoders use secateur.methods.llm_pruner.importances",
            )


def _within(group: Group, block: Block) -> bool:
    """By number: a group's key keeps the one its block had before others were dropped."""
    return group.block == block.index and group.stack == stack_of(block.name)
