"""Eigenvalues of a matrix's W W^T, and how heavy the tail of their distribution is."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.evidence.readings import BlockFacts, Reading

_EXACT = 4096  # side up to which the small Gram is solved in float64


def spectrum(weight: Tensor) -> Tensor:
    """Squared singular values of W (d_out, d_in), ascending, min(d_out, d_in) of them, float64.

    From the smaller of W W^T and W^T W: far cheaper than an SVD, and the tail, which is all
    that is used, loses nothing by squaring.
    """
    rows, columns = weight.shape
    w = weight.double() if min(rows, columns) <= _EXACT else weight.float()
    gram = w @ w.T if rows <= columns else w.T @ w
    return torch.linalg.eigvalsh(gram).clamp_min(0).double()


def hill(values: Tensor, tail: float = 0.5) -> float:
    """alpha = 1 + k / sum_i ln(lambda_i / lambda_min) over the largest k = n - floor(n (1 - tail)).

    Args:
        values: ascending, positive ones count.
        tail: the share of eigenvalues taken for the tail (0.5: the ``mid`` of AlphaPruning).

    Returns:
        The power law's exponent; infinity if the tail is one value repeated.
    """
    positive = values[values > 0]
    top = positive[int(len(positive) * (1 - tail)) :].log()
    total = float((top - top[0]).sum()) if len(top) else 0.0
    return 1 + len(top) / total if total > 0 else float("inf")


def hill_at_peak(values: Tensor, bins: int = 100, literal: bool = False) -> float:
    """alpha of the tail that starts near the mode and fits a power law best.

    Every eigenvalue x in [0.95, 1.5] times the mode of the histogram of log10 lambda is tried
    as the tail's start; the one with the smallest Kolmogorov-Smirnov distance wins.

    Args:
        values: ascending.
        literal: take log10(0.95 mode) for the lower end, as the released code does; it compares
            a logarithm with a plain value, and so lets much smaller starts in.
    """
    positive = values[values > 0]
    n = len(positive)
    if n < 3 or float(positive[0]) == float(positive[-1]):
        return hill(values)
    logs = positive.log10()
    counts = torch.histc(logs.float(), bins, float(logs[0]), float(logs[-1]))
    edges = torch.linspace(float(logs[0]), float(logs[-1]), bins + 1, dtype=torch.float64)
    mode = 10 ** edges[int(counts.argmax())]
    least = torch.log10(0.95 * mode) if literal else 0.95 * mode
    starts = ((positive >= least) & (positive <= 1.5 * mode))[:-1].nonzero().flatten()
    best, alpha = float("inf"), hill(values)
    natural = positive.log()
    sums = natural.flip(0).cumsum(0).flip(0)
    for start in starts.tolist():
        k = n - start
        spread = float(sums[start] - k * natural[start])
        if spread <= 0:
            continue
        exponent = 1 + k / spread
        law = 1 - (positive[start:] / positive[start]) ** (1 - exponent)
        distance = float((law - torch.arange(k) / k).abs().max())
        if distance < best:
            best, alpha = distance, exponent
    return alpha


@dataclass(frozen=True)
class Spectra(Reading):
    """The eigenvalues of every matrix of a block; needs no data."""

    name = "spectra"

    def read(self, block: BlockFacts) -> dict[str, Tensor]:
        """Ascending eigenvalues by matrix, float32."""
        return {m.name: spectrum(m.weight()).float() for m in block.matrices}
