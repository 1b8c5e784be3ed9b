"""Masks that outlive training: what is zero before is zero after, to the last weight.

Gradients of masked weights are dropped before they are clipped or reach the optimizer, so no
moment of theirs is ever anything but zero; weight decay multiplies a zero. After each step
they are set to zero all the same, whatever the optimizer.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from secateur.errors import UsageError, VerificationError
from secateur.models.anatomy import Matrix, ModelView
from secateur.training.loop import Hook, Training
from secateur.training.sharding import alike


class KeepZeros(Hook):
    """Keeps every masked weight of the matrices that are trained at zero.

    Args:
        masks: matrix name -> (d_out, d_in) bool, True where the weight is gone.
    """

    def __init__(self, view: ModelView, masks: Mapping[str, Tensor]) -> None:
        self.view, self.masks = view, masks
        self._gone: dict[str, Tensor] = {}

    def begin(self, at: Training) -> None:
        """See ``Hook``."""
        gone: dict[str, Tensor] = {}
        names = {id(p): name for name, p in at.named.items()}
        for matrix in self.view.matrices():
            # By what it is, whatever it is called here; a sharded one has only the name in common.
            name = names.get(id(matrix.stored), matrix.key)
            parameter = at.named.get(name)
            if parameter is None or matrix.name not in self.masks:
                continue
            whole = gone.setdefault(name, torch.zeros(tuple(parameter.shape), dtype=torch.bool))
            _seen(matrix, whole).copy_(self.masks[matrix.name])
        self._gone = {name: alike(mask, at.named[name]) for name, mask in gone.items()}

    @torch.no_grad()
    def after_backward(self, at: Training) -> None:
        """See ``Hook``."""
        for name, gone in self._gone.items():
            grad = at.named[name].grad
            if grad is not None:
                grad.masked_fill_(gone, 0)

    @torch.no_grad()
    def after_step(self, at: Training) -> None:
        """See ``Hook``."""
        for name, gone in self._gone.items():
            at.named[name].masked_fill_(gone, 0)


def _seen(matrix: Matrix, tensor: Tensor) -> Tensor:
    """A tensor shaped like the matrix's parameter, as a (d_out, d_in) view."""
    if matrix.index is not None:
        tensor = tensor[matrix.index]
    return tensor.T if matrix.transposed else tensor


def check_masks(view: ModelView, masks: Mapping[str, Tensor]) -> int:
    """Every mask fits its matrix, and every weight it names is zero; returns how many.

    Raises:
        UsageError: a mask of no matrix, of another shape, or over weights that are not zero.
    """
    matrices = {m.name: m for m in view.matrices()}
    gone = 0
    for name in masks:
        matrix = matrices.get(name)
        if matrix is None:
            raise UsageError(
                "the model has no matrix of that name",
                field="masks",
                value=name,
                fix="give the masks of this model; its matrices are such as "
                f"{next(iter(matrices))}",
            )
        mask = masks[name]
        if tuple(mask.shape) != matrix.shape:
            raise UsageError(
                f"the mask of '{name}' is {tuple(mask.shape)}, its matrix {matrix.shape}",
                field="masks",
                value=name,
                fix="give the masks of this model",
            )
        left = int(((matrix.tensor() != 0) & mask.to(matrix.stored.device)).count_nonzero())
        if left:
            raise UsageError(
                f"{left} weights of '{name}' that the mask says are gone are not zero",
                field="masks",
                value=name,
                fix="give the masks of this model, or prune it again",
            )
        gone += int(mask.count_nonzero())
    return gone


def prove_zeros(view: ModelView, masks: Mapping[str, Tensor], before: int) -> int:
    """The check after training: the zeros there were are there still.

    Raises:
        VerificationError: naming the matrix.
    """
    try:
        after = check_masks(view, masks)
    except UsageError as error:
        raise VerificationError(f"training lost the mask: {error.message}") from None
    if after != before:
        raise VerificationError(f"{before} weights were gone before training, {after} after")
    return after


def masks_from_zeros(view: ModelView) -> dict[str, Tensor]:
    """Masks of what is zero now: for a sparse model that came without its masks.

    Raises:
        UsageError: hardly anything is zero.
    """
    masks = {m.name: (m.tensor() == 0).cpu() for m in view.matrices()}
    gone = sum(int(m.count_nonzero()) for m in masks.values())
    elements = sum(m.numel() for m in masks.values())
    if gone < 0.001 * elements:
        raise UsageError(
            f"only {gone} of {elements} weights are zero, so it is no sparse model",
            field="mask_from_zeros",
            value=True,
            fix="prune it first",
        )
    return masks
