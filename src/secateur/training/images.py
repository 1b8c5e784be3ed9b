"""Training vision networks on the shared loop, with what was pruned kept at zero."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.data.images import ImageSet
from secateur.errors import UsageError, VerificationError
from secateur.models.state import forget_graphs
from secateur.progress import SILENT, Progress
from secateur.training.batchnorm import KeptBuffers, recalibrate
from secateur.training.hooks import Fitted, Hook, Loss, Training, classification_loss
from secateur.training.loop import fit
from secateur.training.settings import TrainSettings


class KeepMasked(Hook):
    """Keeps single weights of any parameter at zero, whatever the optimizer does.

    Args:
        masks: parameter name -> bool of its shape, True where the weight is gone.
    """

    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        self.masks = dict(masks)
        self._gone: list[tuple[nn.Parameter, Tensor]] = []

    def begin(self, at: Training) -> None:
        """See ``Hook``."""
        self._gone = []
        for name, mask in self.masks.items():
            parameter = at.named.get(name)
            if parameter is None:
                continue
            if parameter.shape != mask.shape:
                raise UsageError(
                    f"the mask is {tuple(mask.shape)}, the parameter {tuple(parameter.shape)}",
                    field="masks",
                    value=name,
                )
            self._gone.append((parameter, mask.to(parameter.device)))

    @torch.no_grad()
    def after_backward(self, at: Training) -> None:
        """See ``Hook``."""
        for parameter, gone in self._gone:
            if parameter.grad is not None:
                parameter.grad.masked_fill_(gone, 0)

    @torch.no_grad()
    def after_step(self, at: Training) -> None:
        """See ``Hook``."""
        for parameter, gone in self._gone:
            parameter.masked_fill_(gone, 0)


def fit_images(
    model: nn.Module,
    images: ImageSet,
    settings: TrainSettings,
    *,
    masks: Mapping[str, Tensor] | None = None,
    loss: Loss = classification_loss,
    hooks: Sequence[Hook] = (),
    folder: Path | None = None,
    fresh: bool = False,
    identity: Mapping[str, Any] | None = None,
    progress: Progress = SILENT,
    label: str = "training",
) -> Fitted:
    """Train what requires gradients of ``model`` on labelled images, in place; then evaluation mode.

    Args:
        masks: parameter name -> bool, True for weights that stay zero.
        loss, hooks, folder, fresh, identity, progress, label: as of ``training.loop.fit``.

    Raises:
        SecateurError: as of ``fit``. VerificationError: a masked weight is not zero.
    """
    model.train()
    try:
        fitted = fit(
            model,
            images,
            settings,
            loss=loss,
            hooks=[KeptBuffers(model), KeepMasked(masks or {}), *hooks],
            folder=folder,
            fresh=fresh,
            identity=identity,
            progress=progress,
            label=label,
        )
    finally:
        model.eval()
        forget_graphs(model)
        for parameter in model.parameters():
            parameter.grad = None
    check_zeros(model, masks or {})
    return fitted


def check_zeros(model: nn.Module, masks: Mapping[str, Tensor]) -> int:
    """Every weight the masks name is zero; returns how many.

    Raises:
        VerificationError: naming the parameter.
    """
    parameters, count = dict(model.named_parameters()), 0
    for name, mask in masks.items():
        weight = parameters.get(name)
        if weight is None or weight.shape != mask.shape:
            raise VerificationError(f"the model has no parameter '{name}' of {tuple(mask.shape)}")
        if bool((weight.detach().cpu()[mask.cpu()] != 0).any()):
            raise VerificationError(f"'{name}' has weights that are not zero and should be gone")
        count += int(mask.sum())
    return count


def recalibrate_images(
    model: nn.Module, images: ImageSet, *, batches: int = 50, batch: int = 64
) -> list[str]:
    """Measure the batch norms' statistics anew on training images; no norms, nothing happens.

    Args:
        batches: at most so many, of ``batch`` images of all classes (``ImageSet.sample``).
    """
    if not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
        return []
    place = next(iter(model.parameters())).device
    return recalibrate(model, (b.pixels.to(place) for b in images.sample(batches * batch, batch)))
