"""What a structured method is: it ranks units, or decides block by block and repairs the rest.

Two ways to take part; a method does one of them:

* ``scores`` (driver ``"score"``): one number for every unit of every group, higher = keep.
  The run removes the lowest of each group as the plan says, in ``rounds`` steps with the
  model masked in between.
* ``decide`` (driver ``"blocks"``): called for one group after another while calibration data
  moves through the model; chooses its units and may rewrite the matrix that reads them.

The maths belongs into pure functions on tensors; these methods only pass tensors to them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from secateur.data.windows import Windows
from secateur.evidence.statistics import InputMoments
from secateur.methods.base import Described, Need
from secateur.models.units import Group
from secateur.progress import SILENT, Progress


@dataclass(eq=False)
class ScoreJob:
    """What a scoring method may look at.

    Attributes:
        model: as it is in this round: units gone so far are zero (on the run's device).
        groups: every group that is ranked.
        gone: group key -> (n_units,) bool, True for units gone in earlier rounds.
        windows: calibration tokens, None for methods that need none.
        batch_tokens: about how many tokens fit into one forward.
        round, rounds: which of how many.
        seed: of the recipe's calibration.
        progress: where to report what takes long.
        notes: plain sentences for the report may be added.
    """

    model: Any
    groups: list[Group]
    gone: dict[str, Tensor]
    windows: Windows | None = None
    batch_tokens: int = 2048
    round: int = 0
    rounds: int = 1
    seed: int = 0
    progress: Progress = SILENT
    notes: list[str] = field(default_factory=list)

    def batches(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """(ids (B, L), mask (B, L) bool or None) of all calibration windows, on the CPU."""
        assert self.windows is not None, "the method did not say that it needs data"
        return self.windows.batches(self.batch_tokens)

    def samples(self) -> list[dict[str, Tensor]]:
        """The same as the model's keyword inputs, on its device."""
        device = next(self.model.parameters()).device
        return [
            {"input_ids": ids.to(device)}
            | ({} if mask is None else {"attention_mask": mask.long().to(device)})
            for ids, mask in self.batches()
        ]


@dataclass(frozen=True, eq=False)
class UnitProblem:
    """One group to decide on, as pure tensors.

    Attributes:
        name: the group's key.
        kind: ffn, head or kv_group.
        weight: (d_out, c) float32 of the matrix that reads the units (o, down). With a dense
            target it is already the weight that on the pruned stream fits the dense outputs.
        columns: (n_units, r) columns of ``weight`` that belong to each unit.
        moments: second moments of the matrix's inputs as they are now (``gram`` (c, c)).
        count: how many units go in all, ``gone`` included.
        gone: (n_units,) bool, units that are zero already and go first.
        even: units fall into so many equal runs, each of which loses the same number.
        block, blocks: position in the model, for schedules.
        bias: (d_out,) float32 of that matrix, None where it has none.
    """

    name: str
    kind: str
    weight: Tensor
    columns: Tensor
    moments: InputMoments
    count: int
    gone: Tensor
    even: int = 1
    block: int = 0
    blocks: int = 1
    bias: Tensor | None = None


@dataclass(frozen=True, eq=False)
class UnitDecision:
    """What was decided for one group.

    Attributes:
        gone: (n_units,) bool with exactly ``count`` True.
        weight: (d_out, c) the reading matrix's new values (columns of gone units are zeroed by
            the run), or None: unchanged.
        score: (n_units,) importance as first ranked, for pictures; may be None.
        notes: figures of how it was found.
        bias: (d_out,) the reading matrix's new bias, or None: unchanged.
    """

    gone: Tensor
    weight: Tensor | None = None
    score: Tensor | None = None
    notes: dict[str, float] = field(default_factory=dict)
    bias: Tensor | None = None


@dataclass(frozen=True)
class StructuredMethod(Described):
    """Removes whole units; subclasses are frozen dataclasses, their fields the options."""

    driver: ClassVar[Literal["score", "blocks"]] = "score"
    kinds: ClassVar[frozenset[str]] = frozenset({"head", "kv_group", "ffn", "stem", "layer"})
    """Kinds of units it can rank."""
    usual_kinds: ClassVar[tuple[str, ...]] = ("head", "ffn")
    """What it cuts where the recipe names no kinds."""
    usual_ranking: ClassVar[Literal["local", "global"]] = "local"
    """How its units compete where the recipe does not say (local if widths are to be alike)."""
    needs_data: ClassVar[bool] = True

    def requirements(self) -> frozenset[Need]:
        """Calibration data, if the method looks at any."""
        return frozenset({Need.INPUTS}) if self.needs_data else frozenset()

    @property
    def rounds(self) -> int:
        """In how many steps the units go; scores are taken anew before each."""
        return 1

    def scores(self, job: ScoreJob) -> dict[str, Tensor]:
        """Group key -> (n_units,) float importance, higher = keep; finite for units not gone."""
        raise NotImplementedError(f"{type(self).__name__} does not score")

    def decide(self, problem: UnitProblem) -> UnitDecision:
        """Choose the units of one group and repair the matrix that reads them."""
        raise NotImplementedError(f"{type(self).__name__} does not decide block by block")


def lowest(score: Tensor, count: int, gone: Tensor | None = None, even: int = 1) -> Tensor:
    """The ``count`` units of lowest score, ties to the first: (n_units,) bool.

    Args:
        score: (n_units,).
        gone: units that go first, whatever their score.
        even: the units fall into so many equal runs, each losing ``count / even``.

    Raises:
        ValueError: ``even`` does not divide ``count``.
    """
    if count % even:
        raise ValueError(f"{count} units cannot be taken evenly from {even} runs")
    ranked = score.detach().double().cpu().clone()
    if gone is not None:
        ranked[gone.cpu()] = float("-inf")
    mask = torch.zeros(len(ranked), dtype=torch.bool)
    for run, out in zip(ranked.view(even, -1), mask.view(even, -1), strict=True):
        out[torch.sort(run, stable=True).indices[: count // even]] = True
    return mask
