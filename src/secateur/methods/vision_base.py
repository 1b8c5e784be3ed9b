"""What a method for vision networks is: it takes a network and gives it back smaller.

Writing one takes one function (``VisionMethod.prune``), which may do as it likes with the network:
rank channels and cut them, zero single weights, or train on the way. What comes before (loading,
finding groups of channels, measuring) and after (batch norms, fine-tuning with the cut kept, saving,
re-opening, report) is the run's, ``run/vision.py``. Register it with one line in ``methods``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from secateur.allocation.channels import Budget
from secateur.data.images import ImageSet
from secateur.masks.structured import StructuredMask
from secateur.methods.base import Described
from secateur.models.channel_graph import ChannelGroups
from secateur.progress import SILENT, Progress
from secateur.recipe_vision import TargetKind
from secateur.training.settings import TrainSettings


@dataclass(frozen=True)
class VisionTarget:
    """How much is to go.

    Attributes:
        kind: share of the FLOPs, of all parameters, of channels, or of the method's own weights.
        share: that goes, in [0, 1).
    """

    kind: TargetKind
    share: float


@dataclass(eq=False)
class VisionJob:
    """What a method gets.

    Attributes:
        model: in evaluation mode, on its device; changed in place.
        groups: its groups of channels, tried (``check_groups``); of kinds or names the recipe
            leaves alone as not prunable.
        images: training part; None where the run has none.
        target: how much goes.
        settings: of the recipe's ``training``, for methods that train; None if it has none.
        batch: images in a forward.
        seed: for whatever is drawn.
        at_least, round_to, ranking: as of ``VisionStructure``.
        folder: for a method's own checkpoints; None keeps everything in memory.
        progress, notes: where to report what takes long, and sentences for the report.
        example: one input of zeros, (1, C, H, W).
    """

    model: nn.Module
    groups: ChannelGroups
    target: VisionTarget
    images: ImageSet | None = None
    settings: TrainSettings | None = None
    batch: int = 64
    seed: int = 0
    at_least: int = 1
    round_to: int = 1
    ranking: Literal["local", "global"] = "local"
    folder: Path | None = None
    progress: Progress = SILENT
    notes: list[str] = field(default_factory=list)
    example: Tensor = field(default_factory=lambda: torch.zeros(0))

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(iter(self.model.parameters())).device

    @property
    def budget(self) -> Budget:
        """The target as widths are counted against it."""
        return Budget(self.target.kind, self.target.share, self.at_least, self.round_to)


@dataclass(eq=False)
class VisionOutcome:
    """What a method did to the network.

    Attributes:
        structure: channels that were cut out of it, in original numbers.
        masks: parameter name -> bool, single weights that are zero now and stay so.
        trained: it trained the network itself: no fine-tuning follows.
        record: anything for the report, JSON-able.
        layers: a row for each layer the method speaks of: ``name``, ``kind``, ``before``, ``after``
            and whatever else.
        delivered: share of its own weights that went, where ``masks`` do not tell (some of the
            masked were cut out after); None otherwise.
    """

    structure: StructuredMask = field(default_factory=StructuredMask)
    masks: dict[str, Tensor] = field(default_factory=dict)
    trained: bool = False
    record: dict[str, Any] = field(default_factory=dict)
    layers: list[dict[str, Any]] = field(default_factory=list)
    delivered: float | None = None


@dataclass(frozen=True)
class VisionMethod(Described):
    """Prunes vision networks; subclasses are frozen dataclasses, their fields the options."""

    targets: ClassVar[tuple[TargetKind, ...]] = ("flops", "parameters", "channels")
    """Kinds of target it can reach, its usual one first."""
    trains: ClassVar[bool] = False
    """It trains the network: it needs images, and random weights are no hindrance."""

    def check(self, recipe: Any) -> None:
        """Refuse a recipe (``VisionRecipe``) that cannot work, before anything is loaded."""

    def check_job(self, job: VisionJob) -> None:
        """Refuse what this network cannot give, before anything is trained."""

    def prune(self, job: VisionJob) -> VisionOutcome:
        """Make ``job.model`` smaller, in place."""
        raise NotImplementedError(f"{type(self).__name__} does not prune")
