"""SparseGPT: choose and update column by column with the exact inverse Hessian."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from secateur.errors import UsageError
from secateur.evidence.statistics import Evidence
from secateur.masks.target import Cut, Scope
from secateur.methods.base import Decision, Need, Published
from secateur.methods.factors import damping_notes, factor_of
from secateur.solvers.obs import Factor, sweep
from secateur.solvers.obs_reference import factorise_reference, sweep_reference


@dataclass(frozen=True)
class SparseGPT(Published):
    """Mask w_ij^2 / [H^-1]_jj band by band; survivors to the right make up for what goes.

    Frantar & Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in
    One-Shot", ICML 2023, algorithm 1; the algebra is in ``solvers.obs``.

    Attributes:
        damping: added to H's diagonal, relative to its mean.
        block_size: columns whose mask is chosen at once in scopes other than ``block:WIDTH``.
    """

    name = "sparsegpt"
    summary = "column by column with the inverse Hessian; survivors are updated"
    paper = "Frantar & Alistarh 2023, arXiv:2301.00774"
    needs = frozenset({Need.GRAM})
    scope = Scope("block", 128)
    update = "obs"

    damping: float = 0.01
    block_size: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.damping <= 1:
            raise UsageError("in [0, 1]", field="damping", value=self.damping, fix="e.g. 0.01")
        if self.block_size < 1:
            raise UsageError(
                "at least one column", field="block_size", value=self.block_size, fix="e.g. 128"
            )

    def score(self, weight: Tensor, evidence: Evidence) -> Tensor:
        """w^2 / [H^-1]_jj, twice the loss of removing each weight alone; (d_out, d_in)."""
        return _saliency(weight, factor_of(evidence, self.damping))

    def decide(
        self, weight: Tensor, evidence: Evidence, cut: Cut, gone: Tensor | None = None
    ) -> Decision:
        """The adaptive sweep: its mask depends on updates made on the way."""
        if self.compat == "reference":
            return self._decide_reference(weight, evidence, cut)
        factor = factor_of(evidence, self.damping)
        swept = sweep(
            weight, factor, cut, block_size=self.block_size, forced=gone, name=evidence.name
        )
        notes = damping_notes(factor, self.damping)
        return Decision(swept.mask, swept.weight, _saliency(weight, factor), notes)

    def _decide_reference(self, weight: Tensor, evidence: Evidence, cut: Cut) -> Decision:
        moments = evidence.moments()
        if moments.gram is None:
            raise ValueError(f"only the diagonal was gathered for '{evidence.name}'")
        factor = factorise_reference(moments.gram * (2 / max(1, evidence.sequences)), self.damping)
        width = cut.scope.width if cut.scope.kind == "block" else self.block_size
        banded = replace(cut, scope=Scope("block", width))
        swept = sweep_reference(weight, factor, banded, block_size=width, inclusive=True)
        notes = damping_notes(factor, self.damping)
        return Decision(swept.mask, swept.weight, _saliency(weight, factor), notes)


def _saliency(weight: Tensor, factor: Factor) -> Tensor:
    inverse_diagonal = factor.upper.square().sum(0)  # [H^-1]_jj = sum_i U_ij^2
    return (weight.square() / inverse_diagonal).masked_fill_(factor.dead, 0.0)
