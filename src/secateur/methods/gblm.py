"""GBLM-Pruner: Wanda's score plus the gradient of the language-model loss; and gradient alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from secateur.errors import UsageError
from secateur.evidence.statistics import Evidence
from secateur.methods.base import Need, Published, one_of
from secateur.methods.wanda import input_norm

Norm = Literal["l1", "l2"]
_NEED = {"l1": Need.GRAD_L1, "l2": Need.GRAD_L2, "signed": Need.GRAD_SIGNED}
_SEQUENCES, _LENGTH = 128, 2048  # the calibration for which the paper tuned alpha


@dataclass(frozen=True)
class GBLM(Published):
    """S_ij = |W_ij| ||X_j||_2 + alpha |W_ij| ||G_ij||_p, rows compared apart, no update.

    Das et al., "Beyond Size: How Gradients Shape Pruning Decisions in Large Language Models",
    2023, algorithm 1. ||G_ij||_p is taken *across samples*, of the gradients of each calibration
    sequence's mean cross-entropy in the dense model; p = 1 is the paper's headline.

    The two terms have different units, so alpha = 100 means what it does only under the
    authors' normalisation and calibration (N = 128 sequences of L = 2048 tokens). Their code
    divides the input term by sqrt(N) and the gradient term by nothing:

    * ``normalize="reference"`` does the same with the N at hand:
      |W| (sqrt(sum x^2 / N) + alpha sum|g|) for l1, sqrt(sum g^2) for l2;
    * ``normalize="mean"`` (default) keeps the balance they tuned whatever N and L are: means
      over tokens and samples with alpha' = alpha 128 sqrt(L) / 2048 for l1 and
      alpha sqrt(128) sqrt(L) / 2048 for l2. A mean loss over L tokens has gradients
      of order 1 / sqrt(L), and sqrt(L) undoes that. At N = 128 and L = 2048 the two are the
      same ranking; independence of N is exact, of L as far as gradients of tokens are
      independent.

    Attributes:
        alpha: weight of the gradient term in the authors' units; 0 gives Wanda.
        norm: across samples, ``"l1"`` or ``"l2"``.
        normalize: ``"mean"`` or ``"reference"``; ``compat="reference"`` implies the latter.
    """

    name = "gblm"
    summary = "Wanda's score plus |W| times a gradient norm across samples; no update"
    paper = "Das et al. 2023, arXiv:2311.04902"

    alpha: float = 100.0
    norm: Norm = "l1"
    normalize: Literal["mean", "reference"] = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("norm", self.norm, ("l1", "l2"))
        one_of("normalize", self.normalize, ("mean", "reference"))
        if not 0 <= self.alpha < float("inf"):
            raise UsageError("a weight >= 0", field="alpha", value=self.alpha, fix="e.g. 100")

    def requirements(self) -> frozenset[Need]:
        """Input norms, and gradients in the norm asked for unless alpha is 0."""
        gradients = {_NEED[self.norm]} if self.alpha else set()
        return frozenset({Need.INPUTS} | gradients)

    def score(self, weight: Tensor, evidence: Evidence) -> Tensor:
        """The mixed score, (d_out, d_in)."""
        moments = evidence.moments()
        if not self.alpha:
            return weight.abs() * input_norm(moments)
        gradient = evidence.gradient(self.norm)
        if self.normalize == "reference" or self.compat == "reference":
            activation = input_norm(moments, evidence.sequences)
            return weight.abs() * activation + weight.abs() * (self.alpha * gradient)
        assert evidence.gradients is not None
        samples = max(1, evidence.gradients.samples)
        length = moments.tokens / max(1, evidence.sequences)
        # sum|g| = N mean|g|, sqrt(sum g^2) = sqrt(N) rms(g): per-sample figures, then N = 128
        power = 1.0 if self.norm == "l1" else 0.5
        typical = gradient * (_SEQUENCES / samples) ** power
        balance = self.alpha * length**0.5 / _LENGTH
        return weight.abs() * (input_norm(moments) + balance * typical)


@dataclass(frozen=True)
class Gradient(Published):
    """S_ij = |W_ij| ||G_ij||: the GBLM-Pruner paper's ablation without activations.

    Attributes:
        norm: across samples ``"l1"``, ``"l2"``, or ``"signed"`` for |sum g|, which lets samples
            cancel and ruins the model: the reason the paper takes norms.
    """

    name = "gradient"
    summary = "|W| times a gradient norm across samples (GBLM's ablation)"
    paper = "Das et al. 2023, arXiv:2311.04902"

    norm: Literal["l1", "l2", "signed"] = "l1"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("norm", self.norm, tuple(_NEED))

    def requirements(self) -> frozenset[Need]:
        """Gradients in the norm asked for."""
        return frozenset({_NEED[self.norm]})

    def score(self, weight: Tensor, evidence: Evidence) -> Tensor:
        """|W| ||G||, (d_out, d_in)."""
        return weight.abs() * evidence.gradient(self.norm)
