"""S2HPruner: widths learned while the network trains, a hard network distilled all along.

    p = softmax(u / tau),  w_k = sum_{j>=k} p_j,  E = sum_k p_k c_k,  n^ = ceil(E)

Source: Lin et al., "S2HPruner: Soft-to-Hard Distillation Bridges the Discretization Gap in Pruning",
NeurIPS 2024 (arXiv 2410.07046), and its published code. The maths is in ``training.width_masks``,
``training.soft_hard`` and ``training.mask_fusion``, the training in ``training.s2hpruner``; here are
the options a recipe gives.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

from secateur.errors import UsageError
from secateur.methods.vision_base import VisionJob, VisionMethod, VisionOutcome
from secateur.recipe_vision import TargetKind
from secateur.training.s2h_finish import cut, learn_widths, measure_gap
from secateur.training.s2h_options import Learning, Order, Trained
from secateur.training.s2h_start import check_resolutions, first_masks, width_choices
from secateur.training.soft_hard import Distillation
from secateur.training.width_masks import Centre, Init

MEASURED = 1024
"""Training images the gap is measured on at the end."""


@dataclass(frozen=True)
class S2HPruner(VisionMethod):
    """One-stage structured pruning with soft-to-hard distillation.

    The recipe's ``training`` is the training: there is no fine-tuning after it. Where it names no
    ``clip``, gradients are clipped to norm 1: a hard network that has just lost channels is so far
    from the soft one that a step without it can kill units for good.

    Attributes:
        relax, lr, momentum, weight_decay, tau, init, init_std, init_share, divisor, order,
            distillation, kd, auto_temperature, train, kd_scale, dis_scale, centre, gap_every,
            warmup, freeze, resolutions: see ``training.s2h_options.Learning``.
    """

    name = "s2hpruner"
    summary = "vision: widths learned with the weights, soft and hard network distilling each other"
    paper = "Lin et al. 2024, arXiv:2410.07046"
    targets: ClassVar[tuple[TargetKind, ...]] = ("flops",)
    trains = True

    relax: float = 0.01
    lr: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 0.0
    tau: float = 1.0
    init: Init = "max"
    init_std: float = 0.01
    init_share: float | None = None
    divisor: int | None = None
    order: Order = "l1"
    distillation: Distillation = "t1"
    kd: float = 1.0
    auto_temperature: bool = False
    train: Trained = "soft"
    kd_scale: float = 1.0
    dis_scale: float = 0.5
    centre: Centre = "mean"
    gap_every: int = 1
    warmup: float = 0.1
    freeze: float = 0.2
    resolutions: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        self.learning(flops=0.5)  # refuse what it refuses

    def learning(self, **given: Any) -> Learning:
        """The options with what the run knows: ``flops``, ``at_least``, ``multiple``, ``seed``."""
        return Learning(**{**asdict(self), **given})

    def _options(self, job: VisionJob) -> Learning:
        return self.learning(
            flops=1 - job.target.share, at_least=job.at_least, multiple=job.round_to, seed=job.seed
        )

    def check(self, recipe: Any) -> None:
        """See ``VisionMethod``: it trains, and distils in its own way.

        Raises:
            UsageError: no training in the recipe; a second distillation; a ranking.
        """
        if recipe.training is None:
            raise UsageError(
                "S2HPruner learns widths in a training",
                field="training",
                value=None,
                fix="training: {epochs: 30} in the recipe, or -R epochs=30",
            )
        if recipe.training.distil:
            raise UsageError(
                "S2HPruner's soft network is the teacher",
                field="training.distil",
                value=recipe.training.distil,
                fix="leave it out; the method's option is kd",
            )
        if recipe.structure.ranking != "local":
            raise UsageError(
                "widths are learned, not ranked",
                field="structure.ranking",
                value=recipe.structure.ranking,
                fix="leave it out",
            )

    def check_job(self, job: VisionJob) -> None:
        """See ``VisionMethod``: a target no width reaches is refused before anything is trained."""
        options = self._options(job)
        first_masks(width_choices(job.groups, options), options)
        check_resolutions(job.model, job.example, options)

    def prune(self, job: VisionJob) -> VisionOutcome:
        """See ``VisionMethod``.

        Raises:
            UsageError: no images or no training; a target that cannot be reached.
            NumericsError: a loss or a gradient that is not finite.
        """
        if job.images is None or job.settings is None:
            raise UsageError(
                "S2HPruner trains: it needs images and a training",
                field="images" if job.images is None else "training",
                value=None,
            )
        settings = job.settings
        if settings.clip is None:
            settings = replace(settings, clip=1.0)
        widths, fitted = learn_widths(
            job.model, job.groups, job.images, settings, self._options(job),
            folder=job.folder, progress=job.progress,
        )  # fmt: skip
        record = widths.record()
        if not record["within"]:
            job.notes.append(
                f"FLOPs are {record['flops']:.3f} of the dense network's, "
                f"{record['target']:.3f} was asked for: no width that is one step away is nearer"
            )
        frozen = record["frozen_from"]
        if frozen is not None and abs(frozen - record["target"]) > 2 * record["relax"]:
            job.notes.append(
                f"FLOPs were at {frozen:.3f} when the masks were frozen, and were brought to the target "
                "without a look at images: more steps, or a higher lr of the masks, make widths better"
            )
        some = [batch.to(job.device) for batch in job.images.sample(MEASURED)]
        pixels = [batch.pixels for batch in some]
        gap = measure_gap(widths, pixels, some)
        structure = cut(widths, pixels)
        layers = [
            {"name": group.key, "kind": group.kind, "before": before, "after": after}
            for group in job.groups.prunable
            if group.key in record["widths"]
            for after, before in [record["widths"][group.key]]
        ]
        record |= {"training": fitted, "gap": {**asdict(gap), "part": "train"}}
        return VisionOutcome(structure, trained=True, record=record, layers=layers)
