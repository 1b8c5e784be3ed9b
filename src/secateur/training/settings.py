"""How a training goes: everything its result depends on, checked once."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from secateur.errors import UsageError

Schedule = Literal["linear", "cosine", "constant"]
Precision = Literal["auto", "no", "bf16", "fp16"]
Optimizer = Literal["adamw", "adamw8bit", "sgd"]


@dataclass(frozen=True)
class TrainSettings:
    """One training.

    Attributes:
        steps: optimizer steps.
        lr: the highest learning rate.
        batch: windows in a step, over all processes and accumulated forwards together.
        micro_batch: windows in one forward of one process; None: all of its share.
        warmup: share of the steps in which the rate rises to ``lr``.
        schedule: how it falls afterwards (``constant``: it does not).
        floor: share of ``lr`` that it falls to.
        optimizer: ``adamw8bit`` holds both moments in 8 bits (package bitsandbytes); ``sgd`` holds
            one, the momentum.
        weight_decay: AdamW's, on matrices only (norms, biases and scales are not decayed).
        momentum: of ``sgd``.
        clip: largest norm of the gradient; None: not clipped.
        seed: order of the windows, and of whatever is drawn in a step.
        checkpoint_every: steps between two checkpoints; None: only the last.
        patience: validations without a better one after which it stops; None: never.
        validate_every: steps between two validations.
        precision: ``bf16`` computes in bfloat16 (parameters stay as they are), ``fp16`` in
            float16 under a scaled loss; ``auto``: bf16 where the device is a GPU that has it.
        shard: with several processes, share weights, gradients and optimizer state out over
            them (FSDP) instead of holding all of them in each.
    """

    steps: int = 100
    lr: float = 1e-3
    batch: int = 4
    micro_batch: int | None = None
    warmup: float = 0.1
    schedule: Schedule = "linear"
    floor: float = 0.0
    optimizer: Optimizer = "adamw"
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    momentum: float = 0.9
    clip: float | None = 1.0
    seed: int = 0
    checkpoint_every: int | None = 50
    patience: int | None = None
    validate_every: int = 50
    precision: Precision = "auto"
    shard: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "micro_batch", "checkpoint_every", "validate_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError("must be at least 1", field=name, value=value)
        for name, low, high in (
            ("lr", 0.0, math.inf),
            ("warmup", 0.0, 1.0),
            ("floor", 0.0, 1.0),
            ("weight_decay", 0.0, math.inf),
            ("clip", 0.0, math.inf),
        ):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise UsageError(f"must lie in [{low:g}, {high:g}]", field=name, value=value)
        kinds = {"schedule": Schedule, "precision": Precision, "optimizer": Optimizer}
        for name, kind in kinds.items():
            if getattr(self, name) not in get_args(kind):
                raise UsageError(
                    f"one of {', '.join(get_args(kind))}", field=name, value=getattr(self, name)
                )

    def rate(self, step: int) -> float:
        """The learning rate of a step (counted from 0); it is never 0.

        >>> [round(TrainSettings(steps=4, lr=1, warmup=0.5).rate(s), 2) for s in range(4)]
        [0.5, 1.0, 1.0, 0.5]
        """
        rise = round(self.warmup * self.steps)
        if step < rise:
            return self.lr * (step + 1) / rise
        left = (self.steps - step) / (self.steps - rise)
        if self.schedule == "constant":
            return self.lr
        if self.schedule == "cosine":
            left = (1 - math.cos(math.pi * left)) / 2
        return self.lr * (self.floor + (1 - self.floor) * left)

    def identity(self) -> dict[str, Any]:
        """What the result depends on: a training is resumed only under the same."""
        without = ("checkpoint_every",)
        return {k: v for k, v in asdict(self).items() if k not in without}
