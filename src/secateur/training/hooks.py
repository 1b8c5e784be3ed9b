"""What the training loop and the procedures it carries say to each other."""

from __future__ import annotations

import importlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.data.batches import Batch, ImageBatch
from secateur.errors import MissingExtra
from secateur.models.vision.outputs import logits_of
from secateur.training import checkpoint
from secateur.training.settings import TrainSettings

Loss = Callable[[nn.Module, Any], Tensor]
"""(model, batch) to the mean loss over the batch's predicted tokens, or images."""


@dataclass
class Training:
    """A training under way, as hooks see it.

    Attributes:
        model: what is trained.
        named: the trained parameters by name.
        step: steps finished so far.
    """

    model: nn.Module
    settings: TrainSettings
    named: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    accelerator: Any
    step: int = 0
    options: Callable[[str, nn.Parameter], Mapping[str, Any]] | None = None

    @property
    def done(self) -> float:
        """Share of the steps finished, for schedules."""
        return self.step / self.settings.steps

    def refresh(self, carry: Callable[[str, str, Tensor], Tensor | None]) -> None:
        """Take note of parameters that surgery replaced, keeping optimizer state.

        Args:
            carry: (parameter's name, state's key, old tensor) to what the new parameter starts
                with, None to start anew. Called for state whose shape no longer fits.
        """
        old = checkpoint.optimizer_tensors(self.optimizer, self.named)
        self.named = trainable(self.model)
        self.optimizer = make_optimizer(self.named, self.settings, self.options)
        kept: dict[str, Tensor] = {}
        for full, value in old.items():
            name, _, key = full.rpartition("#")
            parameter = self.named.get(name)
            if parameter is None:
                continue
            fits = value.ndim == 0 or value.shape == parameter.shape
            new = value if fits else carry(name, key, value)
            if new is not None:
                kept[full] = new
        checkpoint.restore_optimizer(self.optimizer, self.named, kept)


class Hook:
    """What a procedure adds to the loop; every method may be left out."""

    def begin(self, at: Training) -> None:
        """Before the first step of this process (also of a resumed training)."""

    def before_forward(self, at: Training) -> None:
        """Before each forward: draw masks, set temperatures."""

    def after_backward(self, at: Training) -> None:
        """When a step's gradients are complete, before they are clipped."""

    def after_step(self, at: Training) -> None:
        """After the optimizer's step; ``at.step`` counts it already."""

    def end(self, at: Training) -> None:
        """After the last step, also when it stopped early."""

    def abort(self, at: Training, reverted: bool) -> None:
        """When an error or a signal ends the training; leave an ordinary model behind.

        Args:
            reverted: the parameters are those of the last good state in memory again.
        """

    def metrics(self) -> dict[str, Any]:
        """Figures to write beside the loss of the step just done."""
        return {}

    def state(self) -> dict[str, Tensor]:
        """What has to be kept with a checkpoint, beyond the trained parameters."""
        return {}

    def restore(self, state: dict[str, Tensor], at: Training) -> None:
        """Put ``state`` back, before the parameters are (re-do surgery, then ``at.refresh``)."""


@dataclass
class Fitted:
    """What a training did.

    Attributes:
        losses: of every step.
        stopped: ``finished`` or ``early`` (its best state was put back).
        resumed: the step it went on from.
    """

    steps: int
    losses: list[float]
    trained: int
    total: int
    tokens: int
    seconds: float
    stopped: str = "finished"
    resumed: int = 0
    validations: list[tuple[int, float]] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        """For JSON."""
        last = self.losses[-max(1, len(self.losses) // 10) :]  # the mean of the last tenth
        return {
            "steps": self.steps,
            "first_loss": self.losses[0] if self.losses else None,
            "last_loss": sum(last) / len(last) if last else None,
            "trained": self.trained,
            "total": self.total,
            "share": self.trained / max(1, self.total),
            "tokens": self.tokens,
            "seconds": round(self.seconds, 3),
            "tokens_per_second": round(self.tokens / self.seconds, 1) if self.seconds else None,
            "stopped": self.stopped,
            "validations": self.validations,
        }


def next_token_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy (nats) of each token given those before it."""
    mask = {} if batch.mask is None else {"attention_mask": batch.mask.long()}
    logits: Tensor = model(input_ids=batch.ids, use_cache=False, **mask).logits[:, :-1]
    targets = batch.ids[:, 1:]
    if batch.mask is not None:
        targets = targets.masked_fill(~(batch.mask[:, 1:] & batch.mask[:, :-1]), -100)
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def autocasted(x: Tensor) -> Tensor:
    """A layer's input in the type that products are computed in, for autograd functions of our own."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def classification_loss(model: nn.Module, batch: ImageBatch) -> Tensor:
    """Mean cross-entropy (nats) of the images' labels; the model gives logits (B, classes)."""
    return F.cross_entropy(logits_of(model(batch.pixels)).float(), batch.labels)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that require gradients, shared ones once."""
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def make_optimizer(
    named: Mapping[str, nn.Parameter],
    settings: TrainSettings,
    options: Callable[[str, nn.Parameter], Mapping[str, Any]] | None = None,
) -> torch.optim.Optimizer:
    """The settings' optimizer over ``named``; ``options`` may give a parameter ``lr_scale`` and others.

    Raises:
        MissingExtra: moments in 8 bits, and bitsandbytes is not there.
    """
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in named.items():
        own: dict[str, Any] = {
            "weight_decay": settings.weight_decay if parameter.dim() > 1 else 0.0
        }
        own |= {"lr_scale": 1.0} | dict(options(name, parameter) if options else {})
        group = groups.setdefault(json.dumps(own, sort_keys=True), {**own, "params": []})
        group["params"].append(parameter)
    if settings.optimizer == "adamw8bit":
        kind: Any = eight_bit_adamw()
        made: torch.optim.Optimizer = kind(
            list(groups.values()), lr=settings.lr, betas=settings.betas
        )
        return made
    if settings.optimizer == "sgd":
        return torch.optim.SGD(list(groups.values()), lr=settings.lr, momentum=settings.momentum)
    return torch.optim.AdamW(list(groups.values()), lr=settings.lr, betas=settings.betas)


def eight_bit_adamw() -> type:
    """AdamW whose moments are 8-bit codes with a scale for every 256 (Dettmers et al., ICLR 2022).

    Raises:
        MissingExtra: bitsandbytes is not there.
    """
    log = logging.getLogger("bitsandbytes")
    before = log.level
    log.setLevel(logging.ERROR)  # it warns of kernels that have no part in this
    try:
        optimizers: Any = importlib.import_module("bitsandbytes.optim")
    except ImportError as error:
        raise MissingExtra("bitsandbytes", "bnb", "optimizer adamw8bit") from error
    finally:
        log.setLevel(before)
    kind: type = optimizers.AdamW8bit
    return kind
