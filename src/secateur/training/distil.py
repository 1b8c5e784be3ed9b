"""Learning from the dense model: the divergence of its predictions, besides or instead of text.

Hinton et al., 2015 (arXiv:1503.02531), section 2: both logits are divided by a temperature,
and the divergence is multiplied by its square so that gradients keep their size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from secateur.errors import UsageError
from secateur.training.loop import Batch, Loss, next_token_loss


def logit_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 KL(teacher || student) in nats, (...,) from logits (..., V) of both.

    >>> logit_kl(torch.zeros(1, 3), torch.zeros(1, 3)).item()
    0.0
    """
    p = torch.log_softmax(teacher.float() / temperature, -1)
    q = torch.log_softmax(student.float() / temperature, -1)
    return temperature**2 * (p.exp() * (p - q)).sum(-1)


def distillation_loss(
    teacher: nn.Module, weight: float = 1.0, temperature: float = 2.0, plain: Loss = next_token_loss
) -> Loss:
    """``weight`` of the divergence from ``teacher`` plus ``1 - weight`` of ``plain``.

    Raises:
        UsageError: a weight outside [0, 1] or a temperature that is not positive.
    """
    if not 0 <= weight <= 1:
        raise UsageError("must lie in [0, 1]", field="distil", value=weight)
    if not temperature > 0:
        raise UsageError("must be positive", field="temperature", value=temperature)
    teacher.eval().requires_grad_(False)

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        words = {} if batch.mask is None else {"attention_mask": batch.mask.long()}
        logits = model(input_ids=batch.ids, use_cache=False, **words).logits[:, :-1]
        with torch.no_grad():
            wanted = teacher(input_ids=batch.ids, use_cache=False, **words).logits[:, :-1]
        divergence = logit_kl(logits, wanted, temperature)
        keep = None if batch.mask is None else batch.mask[:, 1:] & batch.mask[:, :-1]
        mean = divergence.mean() if keep is None else divergence[keep].mean()
        if weight == 1:
            return mean
        text = plain(_Given(model, logits), batch)
        return weight * mean + (1 - weight) * text

    return loss


class _Given(nn.Module):
    """A model whose logits are known already: the text's loss costs no second forward."""

    def __init__(self, model: nn.Module, logits: Tensor) -> None:
        super().__init__()
        object.__setattr__(self, "_logits", logits)

    def forward(self, **_: object) -> object:
        """See ``nn.Module``."""
        from types import SimpleNamespace

        logits: Tensor = self._logits  # type: ignore[assignment]
        last = torch.zeros_like(logits[:, :1])
        return SimpleNamespace(logits=torch.cat([logits, last], 1))
