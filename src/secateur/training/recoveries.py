"""The ways to get quality back after a cut, by name; each is given the same task."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from secateur.data.windows import Windows
from secateur.models.anatomy import ModelView
from secateur.progress import SILENT, Progress
from secateur.registry import Registry
from secateur.training.loop import Loss, next_token_loss
from secateur.training.perp import perp
from secateur.training.settings import TrainSettings


@dataclass(frozen=True)
class Task:
    """A cut model and how it is to be recovered, in place.

    Attributes:
        masks: matrix name -> (d_out, d_in) bool, True where the weight is gone; a matrix
            without one has nothing gone. What is gone must stay gone.
        train: subsets and at most one kind of adapter (``perp.parts`` takes them apart).
        adapter: the adapter's options.
        reconstruction: ``samples``, ``unit`` and ``stream`` of reconstruct.
        teacher: the dense model, for those who learn from it (loaded only if asked for).
        folder: for checkpoints; the same task there goes on where it stopped.
        keep: where the adapter is written in PEFT's format, for ``base``, before it is merged.
        identity: what else a checkpoint has to agree on.
    """

    view: ModelView
    masks: Mapping[str, Tensor]
    data: Windows
    settings: TrainSettings
    train: Sequence[str]
    adapter: Mapping[str, Any] = field(default_factory=dict)
    reconstruction: Mapping[str, Any] = field(default_factory=dict)
    loss: Loss = next_token_loss
    validate: Callable[[], float] | None = None
    teacher: Callable[[], nn.Module] | None = None
    checkpointing: bool = False
    folder: Path | None = None
    keep: Path | None = None
    base: str = ""
    identity: Mapping[str, Any] = field(default_factory=dict)
    progress: Progress = SILENT


Recovery = Callable[[Task], dict[str, Any]]
"""Recovers the task's model in place; returns a JSON-able record with ``trained``, ``total``,
``share``, ``seconds``, ``zeros`` and ``train``."""


def retrain(task: Task) -> dict[str, Any]:
    """PERP on ``task.train``."""
    return perp(
        task.view,
        task.masks,
        task.data,
        task.settings,
        train=task.train,
        adapter=task.adapter,
        loss=task.loss,
        validate=task.validate,
        checkpointing=task.checkpointing,
        folder=task.folder,
        keep=task.keep,
        base=task.base,
        identity=task.identity,
        progress=task.progress,
    )


def retrain_all(task: Task) -> dict[str, Any]:
    """Full retraining under the fixed mask."""
    return retrain(replace(task, train=("all",)))


recoveries: Registry[Recovery] = Registry(
    "recovery",
    {
        "perp": retrain,
        "full": retrain_all,
        "imp": retrain_all,
        "reconstruct": "secateur.training.reconstruction:recover",
    },
    group="secateur.recoveries",
)
