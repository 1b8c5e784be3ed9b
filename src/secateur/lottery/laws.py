"""The laws a random network's weights are drawn from.

``hyperbolic`` is the law of Logarithmic Pruning: ln|w| is uniform, so every octave is equally
likely. The magnitude of each factor spans [-3/4, +1/4] of ``span`` in the logarithm; the product
of two factors then falls into every interval [g^i, g^(i-1)], i = 1..k, with probability between
1/(2k) and 1/k (see ``decomposition.category_probabilities``). ``uniform`` and ``normal`` are the
laws of Malach et al. and of common practice.

Weights are **float32 values**, so a product of two of them is exact in float64. They are computed
with additions, multiplications and bit shifts only (our own ``exp``), because the C library's
``exp`` may differ in the last bit from one platform to the next.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from secateur.errors import UsageError
from secateur.lottery.philox import uniforms

LawKind = Literal["hyperbolic", "uniform", "normal"]
KINDS: tuple[LawKind, ...] = get_args(LawKind)

LOG2_E = math.log2(math.e)
UPPER_SHARE = 0.25
"""Share of the hyperbolic law's logarithmic span that lies above 0 (derived in docs/lottery.md)."""
EXP2_COEFFICIENTS = tuple(math.log(2) ** n / math.factorial(n) for n in range(13, -1, -1))
"""Taylor coefficients of 2^f for |f| <= 1/2, highest power first (error below one ulp)."""

# Acklam's rational approximation of the normal quantile (relative error 1.15e-9).
CENTRE_TOP = (
    -3.969683028665376e01,
    2.209460984245205e02,
    -2.759285104469687e02,
    1.383577518672690e02,
    -3.066479806614716e01,
    2.506628277459239e00,
)
CENTRE_BOTTOM = (
    -5.447609879822406e01,
    1.615858368580409e02,
    -1.556989798598866e02,
    6.680131188771972e01,
    -1.328068155288572e01,
    1.0,
)


@dataclass(frozen=True)
class Law:
    """How one random layer is drawn.

    Attributes:
        kind: ``hyperbolic``, ``uniform`` (on [-1, 1]) or ``normal`` (truncated at 1.973 standard deviations).
        scale: factor on every weight (both factors of a product have it).
        span: length of the logarithm's support, ``k ln(1/g)``; hyperbolic only.
    """

    kind: LawKind
    scale: float
    span: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UsageError("unknown law", field="law", value=self.kind, fix=", ".join(KINDS))
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise UsageError("a law's scale is positive", field="scale", value=self.scale)
        if self.kind == "hyperbolic" and not (math.isfinite(self.span) and 0 < self.span < 160):
            raise UsageError(
                "float32 weights cannot span that many orders of magnitude",
                field="span",
                value=self.span,
                fix="ask for a larger epsilon (the span is ln(w_max / eps_w) and at most 160)",
            )

    @property
    def code(self) -> int:
        """The law's number in the compiled kernels."""
        return KINDS.index(self.kind)

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def values(
        self, seed: int, layer: int, role: int, pool: Tensor, neuron: Tensor, column: Tensor
    ) -> Tensor:
        """The random weights at these addresses (float32, broadcast shape)."""
        unit, sign = uniforms(seed, layer, role, pool, neuron, column)
        return (sign * (self.scale * self.magnitude(unit))).float()

    def magnitude(self, unit: Tensor) -> Tensor:
        """|w| / scale for a uniform in (0, 1); float64."""
        if self.kind == "hyperbolic":
            return exp2((unit - (1 - UPPER_SHARE)) * (self.span * LOG2_E))
        if self.kind == "uniform":
            return unit
        return half_normal(unit)


def exp2(power: Tensor) -> Tensor:
    """2**power from IEEE additions and multiplications only; the same bits everywhere."""
    whole = torch.floor(power + 0.5)
    part = power - whole
    result = torch.full_like(power, EXP2_COEFFICIENTS[0])
    for coefficient in EXP2_COEFFICIENTS[1:]:
        result = result * part + coefficient
    return result * ((whole.long() + 1023) << 52).view(torch.float64)


def half_normal(unit: Tensor) -> Tensor:
    """|N(0, 1)| given |N(0, 1)| < 1.973, from a uniform.

    The tail (4.85 %) would need a logarithm; leaving it out keeps the law reproducible, and no
    construction here uses the tail.
    """
    centred = unit * 0.47575
    square = centred * centred
    top = torch.full_like(unit, CENTRE_TOP[0])
    for coefficient in CENTRE_TOP[1:]:
        top = top * square + coefficient
    bottom = torch.full_like(unit, CENTRE_BOTTOM[0])
    for coefficient in CENTRE_BOTTOM[1:]:
        bottom = bottom * square + coefficient
    return top * centred / bottom
