"""A relaxed choice of N of M with one logit a weight, for groups too wide to enumerate.

8:16 has 12,870 patterns; one logit a weight is enough to rank them by their sum. The relaxed mask
is ``m = sigmoid((kappa pi + g - nu) / tau)`` with, in each group, the one ``nu`` for which the mask
sums to N: the projection onto the polytope of N-subsets under binary entropy. As tau goes to 0 it
is the top N of the perturbed logits, which is a draw of N without replacement (Gumbel top-k).
Noise comes from the counter of ``kernels.candidate_mix`` and nothing but the logits is stored.

With ``s = m (1 - m)`` and ``u = dL/dW^ * W``, backward is
``d pi = kappa / tau * s (u - <s, u> / <s, 1>)``.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import log

import torch
from torch import Tensor

from secateur.kernels.candidate_mix import Draw, gumbel

_STEPS = 40  # halvings: brings the bracket below float32's resolution
_CHUNK = 1 << 17


def relaxed_top(scores: Tensor, keep: int) -> Tensor:
    """sigmoid(scores - nu) whose rows sum to ``keep``; (G, M) -> (G, M)."""
    if keep == scores.shape[-1]:
        return torch.ones_like(scores)
    # The sum falls as nu grows; at the ends of this bracket it lies above and below N.
    margin = log(scores.shape[-1]) + 1.0
    ordered = scores.sort(-1, descending=True).values
    low = ordered[:, keep, None] - margin
    high = ordered[:, keep - 1, None] + margin
    for _ in range(_STEPS):
        middle = (low + high) / 2
        above = torch.sigmoid(scores - middle).sum(-1, keepdim=True) > keep
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return torch.sigmoid(scores - (low + high) / 2)


class SoftTop:
    """The relaxed top N of M; the same interface as ``CandidateMix``, one logit a weight."""

    def __init__(self, keep: int, group: int) -> None:
        self.keep, self.group = keep, group
        self.logits_per_group = group

    def prior(self, mask: Tensor) -> Tensor:
        """1 for kept, 0 for pruned (G, M; True = pruned), less the mean N/M."""
        return (~mask).float() - self.keep / self.group

    def choose(self, logits: Tensor) -> Tensor:
        """The N largest logits are kept, (G, M) bool, True = pruned; ties go to the first."""
        order = torch.argsort(logits, dim=-1, descending=True, stable=True)
        mask = torch.ones(logits.shape, dtype=torch.bool, device=logits.device)
        return mask.scatter_(-1, order[:, : self.keep], False)

    def masked(self, weight: Tensor, logits: Tensor, draw: Draw) -> Tensor:
        """``W * m``, float32 (G, M)."""
        return torch.cat([weight[part] * m for part, m in self._masks(logits, draw)])

    def backward(
        self, weight: Tensor, logits: Tensor, grad: Tensor, square: float | Tensor, draw: Draw
    ) -> tuple[Tensor, Tensor]:
        """See ``CandidateMix.backward``."""
        d_logits = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
        out = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
        for part, m in self._masks(logits, draw):
            w = weight[part].float()
            out[part] = w * m
            u, slope = (grad[part].float() + 2 * square * out[part]) * w, m * (1 - m)
            mean = (slope * u).sum(-1, keepdim=True) / slope.sum(-1, keepdim=True).clamp_min(1e-30)
            d_logits[part] = draw.kappa / draw.tau * slope * (u - mean)
        return d_logits, out

    def _masks(self, logits: Tensor, draw: Draw) -> Iterator[tuple[slice, Tensor]]:
        for at in range(0, len(logits), _CHUNK):
            part = slice(at, at + _CHUNK)
            scores = draw.kappa * logits[part].float()
            if draw.key is not None:
                start = at * logits.shape[-1]
                scores = scores + gumbel(start, tuple(scores.shape), draw.key, scores.device)
            yield part, relaxed_top(scores / draw.tau, self.keep)
