"""Distilling a hard network from a soft one, both ways and apart: S2HPruner's losses.

The gap between the soft logits s and the hard logits h is G(s, h) = KL(soft || hard), the mean
over the batch. Decoupled and bidirectional (t1): G(sg s, h) teaches the weights, through the hard
network; G(s, sg h) teaches the masks only, through the soft one. "sg" stops gradients.

| variant | to the weights (a) | to the masks (b) |
|---|---|---|
| t1 | D(sg s, h) | D(s, sg h) |
| t2 | one loss D(s, h) / 2 to everything (coupled) | |
| t3 | D(sg s, h) | D(sg h, s) |
| t4 | D(sg s, h) + D(sg h, s) to everything (coupled, mutual) | |
| t5 | D(h, sg s) | D(sg h, s) |
| t6 | D(h, sg s) | D(s, sg h) |
| one-way | D(sg s, h) | nothing |
| none | nothing | nothing |

Source: Lin et al., NeurIPS 2024 (arXiv 2410.07046). Its published code has six variants and does
not say which one the paper used; t1 is the literal reading of one gap measure used both ways.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from secateur.errors import UsageError
from secateur.training.distil import logit_kl

Distillation = Literal["t1", "t2", "t3", "t4", "t5", "t6", "one-way", "none"]
COUPLED = ("t2", "t4")


def standardised(logits: Tensor) -> Tensor:
    """Each row with mean 0 and variance 1: a temperature that sets itself."""
    return F.layer_norm(logits, logits.shape[-1:], eps=1e-7)


def gap(teacher: Tensor, student: Tensor, auto_temperature: bool = False) -> Tensor:
    """KL(teacher || student) in nats, the mean over rows, from logits (B, classes) of both."""
    if auto_temperature:
        teacher, student = standardised(teacher.float()), standardised(student.float())
    return logit_kl(student, teacher).mean()


@torch.no_grad()
def jensen_shannon(soft: Tensor, hard: Tensor) -> Tensor:
    """JS divergence in nats, (B,), from logits (B, classes); 0 where both say the same.

    >>> jensen_shannon(torch.tensor([[0.0, 9.0]]), torch.tensor([[0.0, 9.0]])).item()
    0.0
    """
    p, q = torch.log_softmax(soft.double(), -1), torch.log_softmax(hard.double(), -1)
    m = torch.logaddexp(p, q) - torch.tensor(2.0).double().log()
    js = 0.5 * ((p.exp() * (p - m)).sum(-1) + (q.exp() * (q - m)).sum(-1))
    return js.clamp_min(0).float()


@dataclass(frozen=True)
class Gaps:
    """What distillation adds: ``joint`` to the loss, ``masks`` for the masks' gradient alone."""

    joint: Tensor | None
    masks: Tensor | None


def gaps(soft: Tensor, hard: Tensor, variant: Distillation, auto_temperature: bool = False) -> Gaps:
    """The distillation losses of one step, from logits (B, classes) that carry gradients.

    ``joint`` is added to the task's loss; in the decoupled variants the soft logits are constants
    in it, so nothing of it reaches the masks (the hard network multiplies by none).
    """
    s, h = soft.detach(), hard.detach()

    def g(teacher: Tensor, student: Tensor) -> Tensor:
        return gap(teacher, student, auto_temperature)

    if variant == "none":
        return Gaps(None, None)
    if variant == "t2":
        return Gaps(0.5 * g(soft, hard), None)
    if variant == "t4":
        return Gaps(g(s, hard) + g(h, soft), None)
    joint = g(hard, s) if variant in ("t5", "t6") else g(s, hard)
    if variant == "one-way":
        return Gaps(joint, None)
    if variant not in get_args(Distillation):
        raise UsageError("unknown variant", field="distillation", value=variant)
    return Gaps(joint, g(h, soft) if variant in ("t3", "t5") else g(soft, h))
