"""When units go during a training: at a fixed pace, or so that the size falls in a line.

    every_n_batches   one channel's worth of units every N steps, as published: a head counts as
                      its ``head_dim`` channels and is followed by a pause that long
    linear_params     parameters fall in a straight line from ``start`` to ``stop``, whatever the
                      sizes of the units

Both begin after ``start`` steps of plain training, and both are at the budget after ``stop``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from secateur.errors import UsageError

Pace = Literal["linear_params", "every_n_batches"]


@dataclass(frozen=True)
class PruneSchedule:
    """When units go.

    Attributes:
        pace: see the module.
        start: steps without pruning; at least 1, to have a saliency to go by.
        stop: the step after which the model is at its budget.
        every: steps from one event to the next.
    """

    pace: Pace = "linear_params"
    start: int = 1
    stop: int = 100
    every: int = 1

    def __post_init__(self) -> None:
        if self.pace not in get_args(Pace):
            raise UsageError(
                f"one of {', '.join(get_args(Pace))}", field="prune_pace", value=self.pace
            )
        if self.every < 1:
            raise UsageError("must be at least 1", field="prune_every", value=self.every)
        if not 1 <= self.start < self.stop:
            raise UsageError(
                "pruning begins after at least one step and ends later",
                field="prune_until",
                value=self.stop,
                fix=f"more steps (tokens), or an end beyond step {max(1, self.start)}",
            )

    def due(self, step: int) -> bool:
        """Whether units may go after ``step`` steps."""
        if not self.start < step <= self.stop:
            return False
        return step == self.stop or (step - self.start) % self.every == 0

    def allowed(self, step: int, initial: int, budget: int) -> int:
        """Parameters there may be after ``step`` steps, on the line.

        >>> PruneSchedule(start=10, stop=20).allowed(15, 1000, 500)
        750
        """
        done = min(1.0, max(0.0, (step - self.start) / (self.stop - self.start)))
        return budget if done == 1.0 else round(initial - (initial - budget) * done)

    def channels(self, step: int) -> int:
        """Channels that may be gone after ``step`` steps, at the fixed pace."""
        return max(0, step - self.start) // self.every
