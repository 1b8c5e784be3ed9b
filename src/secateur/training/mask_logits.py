"""The logits that a learned mask has: how many a group, where they start, what they take.

See ``training.maskllm`` for what is done with them.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import comb
from typing import Literal

import torch
from torch import Tensor

from secateur.errors import UsageError
from secateur.kernels.candidate_mix import NAMED, CandidateMix, Draw, likeliest
from secateur.kernels.soft_top import SoftTop
from secateur.models.anatomy import Matrix
from secateur.training.settings import Optimizer

Logits = Literal["auto", "patterns", "weights"]
ENUMERATED = 70
"""Most patterns a group may have to get a logit each (4:8 has 70; 8:16 has 12,870)."""


@dataclass(frozen=True)
class Learning:
    """How masks are learned; the defaults are the published ones.

    Attributes:
        alpha: how much the prior counts.
        init_std: spread of the first logits.
        kappa: scale of the logits, at the start and at the end.
        tau: temperature, at the start and at the end.
        weight_reg: lambda, how much large surviving weights are rewarded.
        logits: one per ``patterns`` or one per ``weights``; auto: patterns up to 70 of them.
        candidates: patterns that a group chooses among, those nearest to its prior; None: all.
        seed: of the first logits and of the noise.
    """

    alpha: float = 3.0
    init_std: float = 0.01
    kappa: tuple[float, float] = (100.0, 500.0)
    tau: tuple[float, float] = (4.0, 0.05)
    weight_reg: float = 1e-5
    logits: Logits = "auto"
    candidates: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("alpha", "weight_reg"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UsageError("must not be negative", field=name, value=getattr(self, name))
        if not self.init_std > 0:
            raise UsageError(
                "equal logits have no spread for the prior to be scaled by",
                field="init_std",
                value=self.init_std,
                fix="0.01 is the published one",
            )
        for name in ("kappa", "tau"):
            if any(not 0 < end < float("inf") for end in getattr(self, name)):
                raise UsageError("must be positive", field=name, value=getattr(self, name))
        if self.logits not in ("auto", "patterns", "weights"):
            raise UsageError(
                "unknown", field="logits", value=self.logits, fix="auto, patterns or weights"
            )
        if self.candidates is not None and self.logits == "weights":
            raise UsageError(
                "a choice among patterns has no logit a weight",
                field="candidates",
                value=self.candidates,
                fix="logits: patterns",
            )

    def draw(self, done: float, key: tuple[int, int] | None) -> Draw:
        """The draw when the share ``done`` of the steps is over."""
        (k0, k1), (t0, t1) = self.kappa, self.tau
        return Draw(key, k0 + (k1 - k0) * done, t0 + (t1 - t0) * done)

    def logits_per_group(self, keep: int, group: int) -> int:
        """How many logits a group of N:M has: one a pattern, a candidate or (M) a weight.

        Raises:
            UsageError: too many patterns, or not as many as ``candidates``.
        """
        patterns = comb(group, keep)
        if self.candidates is not None:
            if patterns > NAMED or not 2 <= self.candidates <= patterns:
                raise UsageError(
                    f"{keep}:{group} has {patterns} patterns to choose among",
                    field="candidates",
                    value=self.candidates,
                    fix=f"2 to {patterns}" if patterns <= NAMED else "leave candidates out",
                )
            return self.candidates
        if self._one_a_weight(keep, group):
            return group
        if patterns > ENUMERATED:
            raise UsageError(
                f"{keep}:{group} has {patterns} patterns, too many for a logit each",
                field="logits",
                value=self.logits,
                fix="logits: weights",
            )
        return patterns

    def mixture(
        self, matrix: Matrix, keep: int, group: int, prior: Tensor | None
    ) -> CandidateMix | SoftTop:
        """How the masks of a matrix's groups are parametrised.

        Raises:
            UsageError: see ``logits_per_group``; M does not divide the inputs; the prior is of
                another shape, or missing where it names the candidates.
        """
        count = self.logits_per_group(keep, group)
        _refuse_misfit(matrix, keep, group, prior)
        self.refuse_no_prior(prior is not None)
        if self.candidates is None or prior is None:
            return (SoftTop if self._one_a_weight(keep, group) else CandidateMix)(keep, group)
        weight = matrix.tensor().reshape(-1, group)
        index = likeliest(keep, group, weight, prior.reshape(-1, group), count)
        return CandidateMix(keep, group, index.to(matrix.stored.device))

    def refuse_no_prior(self, given: bool) -> None:
        """Raise a UsageError if candidates are asked for and there is no prior that names them."""
        if self.candidates is not None and not given:
            raise UsageError(
                "the likeliest masks are those near the prior's, and there is none",
                field="candidates",
                value=self.candidates,
                fix="a prior such as wanda, or leave candidates out",
            )

    def _one_a_weight(self, keep: int, group: int) -> bool:
        return self.logits == "weights" or (
            self.logits == "auto" and comb(group, keep) > ENUMERATED
        )


def _refuse_misfit(matrix: Matrix, keep: int, group: int, prior: Tensor | None) -> None:
    columns = matrix.shape[1]
    if columns % group:
        raise UsageError(
            f"'{matrix.name}' has {columns} inputs, which {group} does not divide",
            field="sparsity",
            value=f"{keep}:{group}",
            fix=f"--exclude '{matrix.name}', or another pattern",
        )
    if prior is not None and tuple(prior.shape) != matrix.shape:
        raise UsageError(
            f"the prior of '{matrix.name}' is {tuple(prior.shape)}, not {matrix.shape}",
            field="prior",
            value=tuple(prior.shape),
            fix="a mask of this model",
        )


def first_logits(
    matrix: Matrix,
    mix: CandidateMix | SoftTop,
    options: Learning,
    prior: Tensor | None,
    generator: torch.Generator,
) -> Tensor:
    """Logits (G, K) of one matrix: a little noise, and the prior in units of its spread."""
    rows, columns = matrix.shape
    shape = (rows * columns // mix.group, mix.logits_per_group)
    logits = torch.randn(shape, generator=generator) * options.init_std
    if prior is not None:
        logits += options.alpha * logits.std() * mix.prior(prior.reshape(-1, mix.group))
    return logits


def bytes_per_weight(
    keep: int,
    group: int,
    options: Learning,
    optimizer: Optimizer = "adamw",
    *,
    keep_best: bool = False,
    turns: int = 1,
) -> float:
    """Bytes that learning takes for each masked weight, beyond the frozen model's.

    Logits, their gradient, and the optimizer's two moments (one for ``sgd``), in float32
    (``adamw8bit``: in a byte, and a scale for every 256), and the best logits so far; noise and
    mixtures are made again instead of kept. A candidate's number is a byte, and so is every mask
    that something starts from or is held under. In ``turns`` only one share has logits.
    """
    per_group = options.logits_per_group(keep, group)
    moments = {"adamw": 8.0, "adamw8bit": 2 * (1 + 4 / 256), "sgd": 4.0}[optimizer]
    a_logit = 4 + 4 + moments + 4 * keep_best + (options.candidates is not None)
    return per_group / group * a_logit / turns + 1
