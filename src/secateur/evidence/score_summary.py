"""What an allocator needs to know of a block's scores, without keeping the scores.

A block of a large model has 2e8 of them. Here they are counted into a fixed logarithmic
histogram, 128 bins to each power of two: a bin holds the numbers that share the first 16 bits
of their float32 pattern, so finding it is a shift, no logarithm and no range to guess, and
summaries of any parts of a block add up exactly. Each bin keeps its sum too, and moments are
kept exactly beside it. Any element-wise function followed by any reduction is then a weighted
sum over the means of a few thousand bins instead of a pass over the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from secateur.errors import NumericsError
from secateur.evidence.readings import BlockFacts, Reading
from secateur.evidence.statistics import all_finite

BINS = 2**15
COMMON = (2.0, 3.0, 5.0, 6.0, 7.0, 10.0)
"""Multiples of the mean whose outliers are counted for whoever asks: one pass serves them all."""
_SHIFT = 16
_PIECE = 2**24  # scores handled at once
Values = NDArray[np.float64]


class ScoreSummary:
    """Histogram and exact moments of scores that are not negative.

    Attributes:
        count: scores seen; ``zeros`` of them are exactly 0.
        total, squares: sum and sum of squares.
        logs, log_squares: the same of the natural logarithm, zeros left out.
        low, high: the smallest score above zero, and the largest.
        bins: (32768,) int64, how many scores fall in each bin (zeros not counted).
        sums: (32768,) float64, their sum in each bin.
    """

    def __init__(self) -> None:
        self.count = 0
        self.zeros = 0
        self.total = 0.0
        self.squares = 0.0
        self.logs = 0.0
        self.log_squares = 0.0
        self.low = float("inf")
        self.high = 0.0
        self.bins = torch.zeros(BINS, dtype=torch.int64)
        self.sums = torch.zeros(BINS, dtype=torch.float64)
        self._above: dict[float, int] = {}
        self._points: tuple[Values, Values] | None = None

    # -- gathering -----------------------------------------------------------------------------

    @torch.no_grad()
    def update(self, scores: Tensor, name: str = "weight") -> None:
        """Add scores of any shape.

        Raises:
            NumericsError: one is NaN, infinite or negative; ``name`` says whose.
        """
        self._above.clear()  # they belonged to another mean
        self._points = None
        for flat in scores.detach().reshape(-1).split(_PIECE):
            self._add(flat.to(torch.float32), name)

    def _add(self, flat: Tensor, name: str) -> None:
        if not flat.numel():
            return
        if not all_finite(flat) or float(flat.min()) < 0:
            raise NumericsError(
                f"the scores of '{name}' are not all finite and >= 0, so they have no histogram",
                fix="allocate with a method whose scores are importances (wanda, magnitude)",
            )
        flat = flat.abs()  # -0.0 has another bit pattern than 0.0
        index = flat.view(torch.int32) >> _SHIFT
        self.bins += torch.bincount(index, minlength=BINS).cpu()
        self.sums += torch.bincount(index, flat.double(), minlength=BINS).cpu()
        positive = flat[flat > 0]
        zeros = flat.numel() - positive.numel()
        self.bins[0] -= zeros
        self.count += flat.numel()
        self.zeros += zeros
        if positive.numel():
            logs = positive.log()
            self.total += float(positive.sum(dtype=torch.float64))
            self.squares += float(positive.double().square().sum())
            self.logs += float(logs.sum(dtype=torch.float64))
            self.log_squares += float(logs.double().square().sum())
            self.low = min(self.low, float(positive.min()))
            self.high = max(self.high, float(positive.max()))

    def merge(self, other: ScoreSummary) -> None:
        """Add what another part of the block, or another machine, has seen."""
        for name in ("count", "zeros", "total", "squares", "logs", "log_squares"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)
        self.bins, self.sums = self.bins + other.bins, self.sums + other.sums
        self._above.clear()
        self._points = None

    @torch.no_grad()
    def count_outliers(self, scores: Iterable[Tensor], multiples: Sequence[float]) -> None:
        """Second pass: how many scores exceed each multiple of the mean, exactly.

        The mean is known only when all scores were seen, so they are looked at again; for a
        Wanda-type score that is one product with the weights.

        Raises:
            ValueError: not the scores the summary was made of.
        """
        above = dict.fromkeys(map(float, multiples), 0)
        limits = {multiple: _float32_below(multiple * self.mean) for multiple in above}
        seen = 0
        for score in scores:
            seen += score.numel()
            for multiple, limit in limits.items():
                above[multiple] += int((score.float() > limit).sum())
        if seen != self.count:
            raise ValueError(f"{seen} scores in the second pass, {self.count} in the first")
        self._above = above

    # -- reading -------------------------------------------------------------------------------

    @property
    def mean(self) -> float:
        """Mean score, exact."""
        return self.total / max(1, self.count)

    @property
    def constant(self) -> bool:
        """True when all scores are equal."""
        return self.count == self.zeros or (not self.zeros and self.low == self.high)

    def points(self) -> tuple[Values, Values]:
        """Mean score of each bin and how many it stands for, both (n,) float64; zeros first.

        Kept until more scores come: do not write to them.
        """
        if self._points is not None:
            return self._points
        index = torch.nonzero(self.bins).squeeze(1)
        weights = self.bins[index].double().numpy()
        # Clipping undoes the rounding of the division: a constant stays itself.
        means = self.sums[index].numpy() / weights
        means = np.clip(means, min(self.low, self.high), self.high)
        if self.zeros:
            means = np.concatenate([[0.0], means])
            weights = np.concatenate([[float(self.zeros)], weights])
        self._points = (means, weights)
        return self._points

    def outlier_ratio(self, multiple: float) -> float:
        """The share of scores above ``multiple`` times their mean.

        Exact for multiples given to ``count_outliers``; for others from the histogram, whose
        one straddling bin (less than 1 % wide) is shared out in proportion.
        """
        if float(multiple) in self._above:
            return self._above[float(multiple)] / max(1, self.count)
        threshold = np.float32(min(multiple * self.mean, 3e38))
        index = int(threshold.view(np.int32)) >> _SHIFT
        edges = np.array([index << _SHIFT, (index + 1) << _SHIFT], dtype=np.int32)
        left, right = edges.view(np.float32).astype(np.float64)
        left, right = max(left, self.low), min(right, self.high)
        share = float(np.clip((right - threshold) / (right - left), 0, 1)) if right > left else 0.0
        above = int(self.bins[index + 1 :].sum()) + share * int(self.bins[index])
        return float(above) / max(1, self.count)

    def median(self) -> float:
        """The score half of all lie below, from the histogram (its bins are under 1 % wide)."""
        x, w = self.points()
        return float(x[np.searchsorted(np.cumsum(w), w.sum() / 2)]) if len(x) else 0.0

    # -- keeping -------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """Tensors to save."""
        moments = [self.total, self.squares, self.logs, self.log_squares, self.low, self.high]
        return {
            "bins": self.bins,
            "sums": self.sums,
            "counts": torch.tensor([self.count, self.zeros]),
            "moments": torch.tensor(moments, dtype=torch.float64),
            "multiples": torch.tensor(list(self._above), dtype=torch.float64),
            "above": torch.tensor(list(self._above.values()), dtype=torch.int64),
        }

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> ScoreSummary:
        """The inverse of ``state``."""
        out = cls()
        out.bins, out.sums = state["bins"].clone(), state["sums"].clone()
        out.count, out.zeros = state["counts"].tolist()
        moments: list[Any] = state["moments"].tolist()
        out.total, out.squares, out.logs, out.log_squares, out.low, out.high = moments
        pairs = zip(state["multiples"].tolist(), state["above"].tolist(), strict=True)
        out._above = dict(pairs)
        return out


def summarise(
    scores: Callable[[], Iterable[tuple[str, Tensor]]], multiples: Sequence[float] = ()
) -> ScoreSummary:
    """Summary of one block.

    Args:
        scores: yields (name, scores) of each matrix; called a second time when ``multiples``
            are given, for their exact outlier counts.
        multiples: of the mean, above which a score is an outlier.
    """
    summary = ScoreSummary()
    for name, score in scores():
        summary.update(score, name)
    if multiples:
        summary.count_outliers((score for _, score in scores()), multiples)
    return summary


def _float32_below(value: float) -> float:
    """The largest float32 not above ``value``: a float32 exceeds the one iff it exceeds the other."""
    near = np.float32(min(value, 3e38))
    return float(near if near <= value else np.nextafter(near, np.float32(-np.inf)))


# -- as readings ------------------------------------------------------------------------------


@dataclass(frozen=True)
class WandaScores(Reading):
    """Summary of abs(W_ij) ||X_j|| over all matrices of a block (root mean square over tokens).

    Matrices no token reached (idle experts) are left out.

    Attributes:
        outliers: multiples of the mean above which scores are counted exactly.
    """

    name: ClassVar[str] = "wanda-scores"
    inputs: ClassVar[bool] = True

    outliers: tuple[float, ...] = COMMON

    def read(self, block: BlockFacts) -> dict[str, Tensor]:
        """See ``Reading.read``."""

        def scores() -> Iterator[tuple[str, Tensor]]:
            for m in block.matrices:
                if m.moments is not None and m.moments.tokens:
                    yield m.name, m.weight().abs() * m.moments.mean_square().sqrt()

        return summarise(scores, self.outliers).state()


@dataclass(frozen=True)
class MagnitudeScores(Reading):
    """Summary of abs(W_ij) over all matrices of a block; needs no data.

    Attributes:
        outliers: multiples of the mean above which scores are counted exactly.
    """

    name: ClassVar[str] = "magnitude-scores"

    outliers: tuple[float, ...] = COMMON

    def read(self, block: BlockFacts) -> dict[str, Tensor]:
        """See ``Reading.read``."""

        def scores() -> Iterator[tuple[str, Tensor]]:
            for m in block.matrices:
                yield m.name, m.weight().abs()

        return summarise(scores, self.outliers).state()
