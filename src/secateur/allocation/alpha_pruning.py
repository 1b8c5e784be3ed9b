"""AlphaPruning: blocks whose spectra have lighter tails are less well trained, and give more."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from secateur.allocation.base import Allocator, Problem
from secateur.allocation.mapping import minmax
from secateur.allocation.projection import Mode
from secateur.errors import UsageError
from secateur.evidence.readings import Reading
from secateur.evidence.spectrum import Spectra, hill, hill_at_peak


@dataclass(frozen=True)
class AlphaPruning(Allocator):
    """r_l = (1 - eps) + 2 eps minmax(alpha)_l, scaled to the budget; alpha the tail's exponent.

    Lu et al., "AlphaPruning: Using Heavy-Tailed Self-Regularization Theory for Improved
    Layer-wise Pruning of Large Language Models", NeurIPS 2024. A block's alpha is the mean of
    its matrices'. The released code scales without a limit and can ask for more than all of a
    block (1.06 at 80 %); here ratios stay within bounds and the rest makes up for it.

    Attributes:
        fit: where the tail begins: near the mode of the spectrum (``peak``, the default of the
            release) or at its ``tail`` largest share (``hill``; 0.5 is the release's ``mid``).
        eps: half the range of the ratios before scaling (the scripts use 0.2 to 0.5).
        tail: the share for ``hill``.
        compat: ``"reference"`` for the release's lower limit of the peak search.
    """

    name = "alphapruning"
    summary = "heavy-tailed spectra stay denser; weights alone"
    paper = "Lu et al. 2024, arXiv:2410.10912"
    mode: ClassVar[Mode] = "scale"

    fit: Literal["peak", "hill"] = "peak"
    eps: float = 0.3
    tail: float = 0.5
    compat: Literal["", "reference"] = ""

    def __post_init__(self) -> None:
        if not 0 <= self.eps <= 1:
            raise UsageError("in [0, 1]", field="eps", value=self.eps, fix="e.g. 0.3")
        if not 0 < self.tail <= 1:
            raise UsageError("in (0, 1]", field="tail", value=self.tail, fix="e.g. 0.5")

    def readings(self) -> tuple[Reading, ...]:
        """Spectra alone."""
        return (Spectra(),)

    def alpha(self, eigenvalues: Tensor) -> float:
        """The tail's exponent of one matrix."""
        values = eigenvalues.double()
        if self.fit == "hill":
            return hill(values, self.tail)
        return hill_at_peak(values, literal=self.compat == "reference")

    def wishes(self, problem: Problem) -> dict[str, float]:
        """The mapping before it is scaled to the budget."""
        alphas = []
        for record in problem.read(Spectra()):
            found = [a for a in map(self.alpha, record.values()) if math.isfinite(a)]
            alphas.append(sum(found) / len(found) if found else math.nan)
        known = [a for a in alphas if math.isfinite(a)]
        if len(set(known)) < 2:
            problem.notes.append("all blocks have the same exponent: the plan is uniform")
            return dict.fromkeys(problem.shapes, problem.sparsity)
        middle = sum(known) / len(known)  # of a block without a spectrum (all zeros)
        m = minmax([a if math.isfinite(a) else middle for a in alphas])
        return problem.by_block([1 - self.eps + 2 * self.eps * v for v in m])
