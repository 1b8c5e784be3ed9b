"""How many images a model names rightly, under a recorded protocol."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.data.images import ImageSet
from secateur.errors import NumericsError, UsageError
from secateur.models.state import evaluating
from secateur.models.vision.outputs import logits_of


@dataclass(frozen=True)
class ImageProtocol:
    """Everything an accuracy depends on besides the model.

    Attributes:
        dataset, part, fingerprint: which images.
        images, classes: how many.
        preprocess: how they become input.
        dtype: the model computes in.
    """

    dataset: str
    part: str
    fingerprint: str
    images: int
    classes: int
    preprocess: str
    dtype: str
    metric: str = "share of images whose largest logit is their label's"

    @property
    def digest(self) -> str:
        """Eight hex digits over all fields: equal digests, comparable figures."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:8]

    def record(self) -> dict[str, Any]:
        """All fields and the digest, for JSON."""
        return asdict(self) | {"digest": self.digest}


@dataclass(frozen=True, eq=False)
class Accuracy:
    """What was measured.

    Attributes:
        top1: share of images named rightly.
        top5: share whose label is among the five largest; None with fewer than ten classes.
        loss: mean cross-entropy, nats.
        stderr: standard error of ``top1``.
        guesses: (N,) the class each image was given.
        protocol: on what.
    """

    top1: float
    top5: float | None
    loss: float
    stderr: float
    guesses: Tensor = field(repr=False)
    protocol: ImageProtocol

    def record(self) -> dict[str, Any]:
        """Figures for JSON."""
        return {
            "accuracy": self.top1,
            "top5": self.top5,
            "loss": self.loss,
            "stderr": self.stderr,
            "images": len(self.guesses),
        }


@torch.no_grad()
def accuracy(model: nn.Module, images: ImageSet, batch: int = 64) -> Accuracy:
    """Accuracy of ``model``, called as ``model(pixels)`` for logits (B, classes).

    Raises:
        UsageError: the model knows more or fewer classes than the images have.
        NumericsError: a logit is not finite.
    """
    place = next(iter(model.parameters()))
    guesses, right5, loss = [], 0, 0.0
    with evaluating(model):
        for part in images.batches(batch):
            part = part.to(place.device)
            logits = logits_of(model(part.pixels.to(place.dtype))).float()
            check_classes(logits, images)
            if not torch.isfinite(logits).all():
                raise NumericsError("a logit is not finite", field="model")
            loss += float(F.cross_entropy(logits, part.labels, reduction="sum"))
            guesses.append(logits.argmax(1).cpu())
            if logits.shape[1] >= 10:
                best = logits.topk(5, 1).indices
                right5 += int((best == part.labels[:, None]).any(1).sum())
    found = torch.cat(guesses)
    count = len(found)
    top1 = float((found == images.targets).double().mean())
    wide = logits.shape[1] >= 10
    return Accuracy(
        top1=top1,
        top5=right5 / count if wide else None,
        loss=loss / count,
        stderr=(top1 * (1 - top1) / count) ** 0.5,
        guesses=found,
        protocol=ImageProtocol(
            dataset=images.name,
            part=images.part,
            fingerprint=images.fingerprint,
            images=count,
            classes=len(images.classes),
            preprocess=json.dumps(images.preprocess.record(), sort_keys=True),
            dtype=str(place.dtype).removeprefix("torch."),
        ),
    )


def check_classes(logits: Tensor, images: ImageSet) -> None:
    """Refuse a model that is no classifier of these images.

    Raises:
        UsageError: logits of another shape, or not one for each class.
    """
    if logits.dim() != 2:
        raise UsageError(
            f"gives {tuple(logits.shape)} for a batch of images, not (images, classes)",
            field="model",
            fix="a classifier",
        )
    if logits.shape[1] != len(images.classes):
        raise UsageError(
            f"knows {logits.shape[1]} classes, the images have {len(images.classes)}",
            field="images",
            value=images.name,
            fix="images of the classes it was trained on, all of them in order, or a model made for "
            "these",
        )
