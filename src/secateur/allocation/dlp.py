"""DLP: blocks with large scores, relative to the others, give more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from secateur.allocation.base import Allocator, Problem
from secateur.allocation.mapping import around_mean
from secateur.allocation.owl import (
    Scores,
    checked_lambda,
    note_if_constant,
    scores_reading,
    summaries,
)
from secateur.evidence.readings import Reading


@dataclass(frozen=True)
class DLP(Allocator):
    """Importance of a block 1 - a_l / sum a, a_l its mean Wanda score; then OWL's mapping.

    Chen et al., "DLP: Dynamic Layerwise Pruning in Large Language Models", ICML 2025. Larger
    importance keeps more: s_l = S - 2 alpha (I_l - mean I) with I min-max scaled.

    Attributes:
        alpha: half the range of the ratios (0.15).
        average: of a block's scores: ``mean`` (exact), or the published ``median`` (from the
            histogram).
        scores: ``wanda``, or ``magnitude``, which needs no data.
    """

    name = "dlp"
    summary = "blocks whose scores are large beside the others' give more"
    paper = "Chen et al. 2025, arXiv:2505.23807"

    alpha: float = 0.15
    average: Literal["mean", "median"] = "mean"
    scores: Scores = "wanda"

    def __post_init__(self) -> None:
        checked_lambda(self.alpha, "alpha")

    def readings(self) -> tuple[Reading, ...]:
        """See ``Allocator.readings``."""
        return (scores_reading(self.scores),)

    def wishes(self, problem: Problem) -> dict[str, float]:
        """See ``Allocator.wishes``."""
        blocks = summaries(problem.read(self.readings()[0]))
        sizes = [s.mean if self.average == "mean" else s.median() for s in blocks]
        total = sum(sizes) or 1.0
        values = [size / total for size in sizes]  # 1 - importance: larger, sparser
        note_if_constant(values, problem, "the average score")
        ratios = around_mean(values, problem.block_sizes, problem.sparsity, self.alpha)
        return problem.by_block(ratios)
