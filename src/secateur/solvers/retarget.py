"""Weights whose output on the pruned stream comes closest to the dense model's.

Earlier blocks have been pruned, so a matrix now sees inputs x that differ from the dense
model's x_d. Asking it to reproduce W x keeps the damage done so far; asking for W x_d lets it
undo part of it. Least squares turns the second question into the first:

    min_V E|W x_d - V x|^2  =  const + min_V tr (V - T) H (V - T)^T,
    T = W C H^-1,   C = E[x_d x^T],   H = E[x x^T],

so pruning T under H is pruning W towards the dense stream. T is drawn to W by the same
damping the pruning solver uses: T = (W C + l W)(H + l I)^-1.
(The target of SlimGPT's and GPTAQ's asymmetric calibration; the reduction is elementary.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.errors import NumericsError
from secateur.evidence.statistics import InputMoments


def retarget(
    weight: Tensor, moments: InputMoments, damping: float = 0.01, name: str = "weight"
) -> Tensor:
    """T for a weight (d_out, d_in), float32; the weight itself where nothing was pruned before.

    Args:
        weight: (d_out, d_in).
        moments: with ``gram`` and ``cross``.
        damping: l as a share of the mean diagonal of H.
        name: for errors.

    Raises:
        NumericsError: H cannot be factored even with heavy damping.
    """
    if moments.cross is None:
        return weight
    h = moments.second_moment().double()
    c = (moments.cross / max(1, moments.tokens)).double()
    eye = torch.eye(len(h), dtype=h.dtype, device=h.device)
    level = damping * float(h.diagonal().mean())
    for _ in range(4):
        factor, failed = torch.linalg.cholesky_ex(h + level * eye)
        if int(failed) == 0 and level > 0:
            # (C + l I)(H + l I)^-1, shared by all rows.
            move = torch.cholesky_solve((c + level * eye).T, factor).T
            return (weight.double() @ move).to(weight.dtype)
        level = max(level * 10, 1e-8)
    raise NumericsError(
        f"the second moments of '{name}' cannot be factored ({moments.tokens} tokens)",
        fix="give more calibration text, or reconstruct: block",
    )
