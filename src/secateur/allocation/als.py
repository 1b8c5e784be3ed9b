"""ALS: layers whose activations repeat what other layers say may be sparser."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import Tensor

from secateur.allocation.base import (
    Allocator,
    Problem,
    pattern_limits,
    refuse_target_outside,
)
from secateur.allocation.projection import refuse_infeasible
from secateur.errors import UsageError
from secateur.evidence.readings import Reading
from secateur.evidence.redundancy import (
    BlockFeatures,
    Feature,
    MatrixRedundancy,
    Normalise,
    gram_of,
    redundancy,
)
from secateur.solvers.knapsack import Vector, fractional_knapsack, interior, linear_programme

Solution = Literal["knapsack", "highs", "interior"]
Variant = Literal["density", "sparsity"]
Mu = Literal["row", "global"] | float


def independence(psi: Tensor, mu: Mu = "row") -> Vector:
    """omega_i = exp(-rho_i / mu), rho_i = sum_j Psi_ij - 1, largest scaled to 1.

    Args:
        psi: (n, n) redundancies, unit diagonal.
        mu: the mean of the row (as printed), of the whole matrix, or a number.
    """
    matrix = psi.numpy().astype(np.float64)
    rho = matrix.sum(1) - 1
    if mu == "row":
        scale = matrix.mean(1)
    else:
        scale = np.full(len(rho), matrix.mean() if mu == "global" else float(mu))
    exponent = -rho / scale
    # Scaled before exp: e^-32 and the like underflow a solver's tolerance.
    omega: Vector = np.exp(exponent - exponent.max())
    return omega


def suffix_mean(omega: Vector) -> Vector:
    """c_i = (1 / (L - i + 1)) sum_{j >= i} omega_j: a layer counts with all that follow it."""
    sums = np.cumsum(omega[::-1])[::-1]
    mean: Vector = sums / np.arange(len(omega), 0, -1)
    return mean


def share_out(
    value: Vector,
    sizes: Sequence[int],
    sparsity: float,
    low: Sequence[float],
    high: Sequence[float],
    variant: Variant = "density",
    solution: Solution = "knapsack",
    strength: float = 8.0,
) -> list[float]:
    """Ratios of n items from their values, the weighted mean exactly ``sparsity``.

    ``density`` (default): what is *kept* is shared out, max c.x with x = 1 - s, so that
    independent items stay dense, as the paper's text says. ``sparsity``: its formula as
    printed, max c.s, which gives independent items *more* sparsity.

    Args:
        value: c (n,).
        sizes: parameters of each item.
        low, high: bounds of each item's sparsity.

    Raises:
        UsageError: bounds that cannot meet the sparsity.
    """
    refuse_infeasible(sizes, sparsity, low, high)
    keeps = variant == "density"
    share = 1 - sparsity if keeps else sparsity
    lows = [1 - h for h in high] if keeps else list(low)
    highs = [1 - lo for lo in low] if keeps else list(high)
    budget = share * sum(sizes)
    if solution == "interior":
        x = interior(list(value), sizes, budget, lows, highs, strength)
    elif solution == "highs":
        x = linear_programme(list(value), sizes, budget, lows, highs)
    else:
        x = fractional_knapsack(list(value), sizes, budget, lows, highs)
    return [float(1 - v) if keeps else float(v) for v in x]


@dataclass(frozen=True)
class ALS(Allocator):
    """Adaptive Layer Sparsity: a redundancy matrix and two linear programmes.

    Li, Li, Lee, Sun, "Adaptive Layer Sparsity for Large Language Models via Activation
    Correlation Assessment", NeurIPS 2024. No code was published; the objective is OMPQ's.
    First blocks, then the matrices inside each block, share out what is kept.

    Attributes:
        feature: activations compared between blocks: ``input``, ``output`` or ``gate``.
        tokens: sampled for that; ``component_tokens`` inside a block.
        normalise: ``centre`` features (as OMPQ's code does), ``standardise`` them, or ``none``.
        mu: scale of the exponent: ``row`` (as printed), ``global`` or a number.
        variant: see ``share_out``.
        solution: ``knapsack`` (the LP, closed form), ``highs`` (the LP by scipy), ``interior``
            (a quadratic term with ``strength`` keeps ratios off their bounds; not the paper's).
        width: blocks lie within the target +- this, unless min_sparsity and max_sparsity say
            otherwise. An LP puts nearly all on a bound, so this is what matters most.
        components: whether the matrices inside a block differ.
        component_feature: ``output`` or ``input`` (where q, k and v are equal).
        component_width: matrices lie within their block's ratio +- this.
    """

    name = "als"
    summary = "redundancy between layers' activations; two linear programmes"
    paper = "Li et al. 2024, NeurIPS (Adaptive Layer Sparsity)"

    feature: Feature = "input"
    tokens: int = 2048
    normalise: Normalise = "centre"
    mu: Mu = "row"
    variant: Variant = "density"
    solution: Solution = "knapsack"
    strength: float = 8.0
    width: float = 0.1
    components: bool = True
    component_feature: Literal["input", "output"] = "output"
    component_tokens: int = 256
    component_width: float = 0.05

    def __post_init__(self) -> None:
        for field, value, least in (
            ("tokens", self.tokens, 2),
            ("component_tokens", self.component_tokens, 2),
            ("width", self.width, 0),
            ("component_width", self.component_width, 0),
        ):
            if value < least:
                raise UsageError(f"at least {least}", field=field, value=value)
        if not self.strength > 0:
            raise UsageError("above 0", field="strength", value=self.strength)
        if not isinstance(self.mu, str) and not self.mu > 0:
            raise UsageError("above 0, 'row' or 'global'", field="mu", value=self.mu)

    def readings(self) -> tuple[Reading, ...]:
        """Features of the blocks; inside them only the redundancies."""
        between = BlockFeatures(self.feature, self.tokens, self.normalise)
        if not self.components:
            return (between,)
        return between, self._within

    @property
    def _within(self) -> MatrixRedundancy:
        return MatrixRedundancy(self.component_feature, self.component_tokens, self.normalise)

    def layer_bounds(self, problem: Problem) -> tuple[float, float]:
        """Lowest and highest ratio of a block."""
        low = max(0.0, problem.sparsity - self.width)
        high = min(super().bounds(problem)[1], problem.sparsity + self.width)
        if self.min_sparsity is not None:
            low = self.min_sparsity
        return low, high if self.max_sparsity is None else self.max_sparsity

    def refuse_bounds(self, problem: Problem) -> None:
        """See ``Allocator.refuse_bounds``: the blocks' own bounds are the narrower."""
        refuse_target_outside(problem.sparsity, *self.layer_bounds(problem))

    def bounds(self, problem: Problem) -> tuple[float, float]:
        """A matrix may go beyond its block's bounds by ``component_width``."""
        low, high = self.layer_bounds(problem)
        beyond = self.component_width if self.components else 0.0
        ceiling = max(high, 1 - (1 - problem.sparsity) / 10)
        return max(0.0, low - beyond), min(ceiling, high + beyond)

    def wishes(self, problem: Problem) -> dict[str, float]:
        """Both stages; each block's parameters are met exactly by its matrices."""
        blocks = self._between(problem)
        target = problem.target
        if target.keep is not None and target.group is not None:
            own = target.group - target.keep
            if pattern_limits(own, target.group, self.bounds(problem)) == (own, own):
                problem.notes.append(
                    f"no other N:{target.group} lies within the bounds, so all matrices keep the "
                    f"target's own; a 'width' of {1 / target.group:g} or more reaches the next"
                )
        if not self.components:
            return problem.by_block(blocks)
        low, high = self.bounds(problem)
        out: dict[str, float] = {}
        sizes = problem.sizes
        records = problem.read(self._within)
        for names, ratio, record in zip(problem.blocks, blocks, records, strict=True):
            which = [names[int(i)] for i in record["which"]]
            out |= dict.fromkeys(names, ratio)  # experts show no common tokens
            if len(which) < 2:
                continue
            value = suffix_mean(independence(record["psi"], self.mu))
            found = share_out(
                value,
                [sizes[n] for n in which],
                ratio,
                [min(ratio, max(low, ratio - self.component_width))] * len(which),
                [max(ratio, min(high, ratio + self.component_width))] * len(which),
                self.variant,
                self.solution,
                self.strength,
            )
            out |= dict(zip(which, found, strict=True))
        return out

    def _between(self, problem: Problem) -> list[float]:
        if len(problem.blocks) == 1:
            problem.notes.append("a single block: its ratio is the target's")
            return [problem.sparsity]
        records = problem.read(BlockFeatures(self.feature, self.tokens, self.normalise))
        psi = redundancy([gram_of(record) for record in records])
        low, high = self.layer_bounds(problem)
        n = len(problem.blocks)
        return share_out(
            suffix_mean(independence(psi, self.mu)),
            problem.block_sizes,
            problem.sparsity,
            [low] * n,
            [high] * n,
            self.variant,
            self.solution,
            self.strength,
        )
