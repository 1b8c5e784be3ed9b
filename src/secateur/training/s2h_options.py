"""How S2HPruner learns widths (``training.s2hpruner``): every choice, checked once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from secateur.errors import UsageError
from secateur.training.soft_hard import Distillation
from secateur.training.width_masks import Centre, Init

Order = Literal["l1", "fixed", "identity"]
Trained = Literal["soft", "hard"]


@dataclass(frozen=True)
class Learning:
    """How widths are learned.

    Attributes:
        flops: share of the FLOPs that is to be left, in (0, 1].
        relax: how far off it may be.
        lr: of the masks, for gradients of length 1 a group; follows the weights' schedule.
        momentum, weight_decay: of the masks' SGD.
        tau: temperature of the distributions.
        init, init_std, init_share: where they start, see ``width_masks.first_logits``.
        divisor: units in a step of width; default a 32nd of the group.
        at_least: units that stay in every group.
        multiple: the hard network's widths are rounded up to it.
        order: units are ranked by ``l1`` in every step, once (``fixed``), or as they stand.
        distillation: ``t1`` ... ``t6``, ``one-way`` or ``none``, see ``soft_hard``.
        kd: weight of the distillation in the loss.
        auto_temperature: standardise the logits before they are compared.
        train: ``hard``: no soft network; the masks get a straight-through gradient (an ablation).
        kd_scale, dis_scale: see ``mask_fusion.fuse``.
        centre: what is taken off the logits after a step.
        gap_every: steps between two looks of the masks at the gap.
        warmup, freeze: share of the steps, at the start and at the end, without mask updates.
        resolutions: factors of the images' size, one drawn each step (convolutional networks).
        seed: of ``init: normal``.
    """

    flops: float
    relax: float = 0.01
    lr: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 0.0
    tau: float = 1.0
    init: Init = "max"
    init_std: float = 0.01
    init_share: float | None = None
    divisor: int | None = None
    at_least: int = 1
    multiple: int = 1
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
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.flops <= 1:
            raise UsageError(
                "a share of the FLOPs in (0, 1]", field="flops", value=self.flops, fix="e.g. 0.5"
            )
        for name in ("relax", "tau", "lr", "init_std"):
            if not 0 < getattr(self, name) < math.inf:
                raise UsageError("must be positive", field=name, value=getattr(self, name))
        for name in ("weight_decay", "kd", "kd_scale", "dis_scale"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UsageError("must not be negative", field=name, value=getattr(self, name))
        for name in ("momentum", "warmup", "freeze"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError("must lie in [0, 1)", field=name, value=getattr(self, name))
        if self.warmup + self.freeze >= 1:
            raise UsageError(
                "warm-up and freeze leave no step to learn the widths in",
                field="freeze",
                value=self.freeze,
                fix=f"below {1 - self.warmup:g}",
            )
        for name in ("at_least", "multiple", "gap_every"):
            if getattr(self, name) < 1:
                raise UsageError("must be at least 1", field=name, value=getattr(self, name))
        for name, kinds in (
            ("order", Order), ("distillation", Distillation), ("train", Trained), ("centre", Centre)
        ):  # fmt: skip
            if getattr(self, name) not in get_args(kinds):
                raise UsageError(
                    "unknown", field=name, value=getattr(self, name),
                    fix=f"one of {', '.join(get_args(kinds))}",
                )  # fmt: skip
        if not self.resolutions or any(not 0 < r <= 1 for r in self.resolutions):
            raise UsageError("factors in (0, 1]", field="resolutions", value=self.resolutions)
        if self.train == "hard" and self.distillation != "none":
            raise UsageError(
                "without a soft network there is nothing to distil from",
                field="distillation",
                value=self.distillation,
                fix="distillation: none",
            )
