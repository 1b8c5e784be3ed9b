"""Wanda: weights times the norm of their inputs, compared within each output neuron."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from secateur.evidence.statistics import Evidence, InputMoments
from secateur.masks.selection import (
    cumulative_share,
    nominal_sparsity,
    refuse_nan,
    select,
    select_cumulative_reference,
)
from secateur.masks.target import Cut, Scope
from secateur.methods.base import Decision, Need, Published


def input_norm(moments: InputMoments, sequences: int = 0) -> Tensor:
    """||x_j|| per feature (d_in,): root mean square over tokens, or as the original has it.

    The original divides the sum of squares by the number of calibration sequences instead of
    tokens; give ``sequences`` for that. Within a matrix it is the same ranking.
    """
    return (moments.diagonal / sequences).sqrt() if sequences else moments.mean_square().sqrt()


@dataclass(frozen=True)
class Wanda(Published):
    """S_ij = |W_ij| ||X_j||_2, rows compared apart, survivors left as they are.

    Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", ICLR 2024,
    equation 1. It is OBS with a diagonal Hessian: the removal that hurts ||(W - W') X|| least
    if inputs were uncorrelated.

    Attributes:
        variant: rows may give unequal shares. Each row is cut where the running sum of its
            sorted scores passes alpha times its total, one alpha for the whole matrix
            (the paper's appendix; ``--use_variant``). The authors bisect alpha to within
            1e-3 of the target; here the exact count is met by ranking that running share.
    """

    name = "wanda"
    summary = "|W| times the norm of its input, row by row; no update"
    paper = "Sun et al. 2023, arXiv:2306.11695"
    needs = frozenset({Need.INPUTS})

    variant: bool = False

    def score(self, weight: Tensor, evidence: Evidence) -> Tensor:
        """|W| ||X||, (d_out, d_in)."""
        sequences = evidence.sequences if self.compat == "reference" else 0
        return weight.abs() * input_norm(evidence.moments(), sequences)

    def decide(
        self, weight: Tensor, evidence: Evidence, cut: Cut, gone: Tensor | None = None
    ) -> Decision:
        """See ``Method.decide``. N:M patterns have equal shares, so the variant changes nothing."""
        if not self.variant or cut.is_pattern:
            return super().decide(weight, evidence, cut, gone)
        score = self.score(weight, evidence)
        refuse_nan(score, evidence.name)
        if self.compat == "reference":
            mask = select_cumulative_reference(score, nominal_sparsity(cut))
            return Decision(mask, None, score)
        share = cumulative_share(score)
        share = share if gone is None else share.masked_fill(gone, -1.0)
        whole = replace(cut, scope=Scope("layer"))
        return Decision(select(share, whole, evidence.name), None, score)
