"""OWL: blocks with many outliers keep more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from secateur.allocation.base import Allocator, Problem
from secateur.allocation.mapping import around_mean, width_of
from secateur.errors import UsageError
from secateur.evidence.readings import Reading
from secateur.evidence.score_summary import COMMON, MagnitudeScores, ScoreSummary, WandaScores

Scores = Literal["wanda", "magnitude"]


def scores_reading(scores: Scores, *multiples: float) -> Reading:
    """The summary to ask for; the common multiples are all in one, so that it is shared."""
    extra = tuple(m for m in multiples if m not in COMMON)
    kind = WandaScores if scores == "wanda" else MagnitudeScores
    return kind(COMMON + extra)


def summaries(records: Sequence[dict[str, Tensor]]) -> list[ScoreSummary]:
    """Readings of all blocks as summaries."""
    return [ScoreSummary.from_state(record) for record in records]


def checked_lambda(lam: float, field: str = "lam") -> float:
    """``lam`` if a range of 2 lam makes sense."""
    if not 0 <= lam <= 0.5:
        raise UsageError(
            "half the range of the ratios lies in [0, 0.5]", field=field, value=lam, fix="e.g. 0.08"
        )
    return lam


def note_if_constant(values: Sequence[float], problem: Problem, what: str) -> None:
    """Say in plain words when there is nothing to tell blocks apart by."""
    if len(values) == 1:
        problem.notes.append("the model has one block, which takes the whole target")
    elif width_of(values) == 0:
        problem.notes.append(f"{what} is the same in every block: the plan is uniform")


@dataclass(frozen=True)
class OWL(Allocator):
    """s_l = S - 2 lambda (D_l - mean D), D_l the min-max scaled outlier ratio of block l.

    Yin et al., "Outlier Weighed Layerwise Sparsity (OWL)", ICML 2024. A block's outlier ratio
    is the share of its Wanda scores above ``m`` times their mean, all its matrices together;
    it is counted exactly, in two looks at the scores of one block at a time.

    With an N:M target the half range is lambda_nm / (2 M), so that counts of removed weights
    move by up to ``lam_nm`` among M, as in the released N:M variant; there the rounded counts
    miss the target, here they meet it.

    Attributes:
        m: outliers exceed m times the mean (paper: 5; the released code's default is 3).
        lam: half the range of the ratios (0.08).
        lam_nm: the range of removed weights among M, with N:M targets (2).
        scores: ``wanda``, or ``magnitude``, which needs no data.
    """

    name = "owl"
    summary = "blocks with a larger share of outlying scores keep more"
    paper = "Yin et al. 2023, arXiv:2310.05175"

    m: float = 5.0
    lam: float = 0.08
    lam_nm: float = 2.0
    scores: Scores = "wanda"

    def __post_init__(self) -> None:
        checked_lambda(self.lam)
        for name in ("m", "lam_nm"):
            if getattr(self, name) <= 0:
                raise UsageError("must be positive", field=name, value=getattr(self, name))

    def readings(self) -> tuple[Reading, ...]:
        """See ``Allocator.readings``."""
        return (scores_reading(self.scores, float(self.m)),)

    def wishes(self, problem: Problem) -> dict[str, float]:
        """See ``Allocator.wishes``."""
        blocks = summaries(problem.read(self.readings()[0]))
        ratios = [-summary.outlier_ratio(self.m) for summary in blocks]
        note_if_constant(ratios, problem, "the share of outliers")
        sizes = problem.block_sizes
        half = half_range(problem, self.lam, self.lam_nm)
        return problem.by_block(around_mean(ratios, sizes, problem.sparsity, half))


def half_range(problem: Problem, lam: float, lam_nm: float) -> float:
    """lambda of this target: the given one, or that of counts among M."""
    group = problem.target.group
    return lam if group is None else lam_nm / (2 * group)
