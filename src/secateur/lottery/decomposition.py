"""The golden-ratio decomposition: a number as a sum of numbers known only up to an interval.

Lemma (our statement and proof; the idea is that of Orseau, Hutter and Rivasplata 2020). Let
``1/phi <= g < 1`` with phi the golden ratio. Take *any* p_i in [g^i, g^(i-1)], i = 1..k. Go
through them from large to small and take p_i whenever it still fits. Then every w in [0, 1]
is met with ``0 <= w - sum(taken) <= g^(k-1)``.

Proof: before step i the remainder is at most g^(i-2) (1 for i <= 2). Taken: it drops to at most
g^(i-2) - g^i = g^(i-2) (1 - g^2) <= g^(i-1), because 1 - g^2 <= g iff g >= 1/phi. Not taken: it
is below p_i <= g^(i-1). Either way the next step may start.

So 1/phi is the fastest admissible base, 2/3 (base 3/2, the paper's) has slack, and 1/2 fails.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from secateur.errors import UsageError

Base = Literal["golden", "3/2"]
GOLDEN = (math.sqrt(5) - 1) / 2
"""1/phi, rounded up so that 1 - g^2 <= g holds in float64 as well."""
BASES: dict[str, float] = {"golden": math.nextafter(GOLDEN, 1.0), "3/2": 2 / 3}


def ratio(base: str | float) -> float:
    """The ratio g of a base: ``golden`` (1/phi), ``3/2`` or the number phi >= base > 1 itself."""
    if isinstance(base, str) and base in BASES:
        return BASES[base]
    try:
        number = 1 / float(base)
    except (TypeError, ValueError, ZeroDivisionError):
        number = math.nan
    if not BASES["golden"] - 1e-9 <= number < 1:
        raise UsageError(
            "the decomposition holds for bases above 1 and up to the golden ratio 1.618",
            field="base",
            value=base,
            fix="base='golden' or base='3/2'",
        )
    return max(number, BASES["golden"])


def bits_needed(w_max: float, weight_eps: float, gamma: float) -> int:
    """The k for which ``w_max * gamma**(k-1) <= weight_eps`` (at least 1)."""
    if weight_eps >= w_max:
        return 1
    k = 1 + math.ceil(math.log(w_max / weight_eps) / math.log(1 / gamma))
    return k if w_max * gamma ** (k - 1) <= weight_eps else k + 1


def greedy(weight: float, parts: Sequence[float]) -> tuple[list[bool], float]:
    """Which parts the greedy rule takes, and what remains of ``weight``."""
    taken, remainder = [], weight
    for part in parts:
        take = remainder >= part
        taken.append(take)
        remainder -= part if take else 0.0
    return taken, remainder


def category_probabilities(k: int) -> NDArray[np.float64]:
    """P(|ab| falls into interval i), i = 1..k, for two hyperbolic factors (sum: 3/4).

    With u, v uniform on (0, 1), ln|ab| = K (u + v - 3/2), so interval i is
    ``3/2 - i/k <= u + v <= 3/2 - (i-1)/k`` under the triangular law of u + v.
    """

    def below(total: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.where(total <= 1, total**2 / 2, 1 - (2 - total) ** 2 / 2)

    edges = 1.5 - np.arange(k + 1) / k
    return np.asarray(below(edges[:-1]) - below(edges[1:]))


def slot_probability(k: int) -> float:
    """The least probability that one random neuron fills a given slot; at least 1/(8k).

    A slot fixes the interval, the sign of the in-weight and the sign of the out-weight.
    """
    return float(category_probabilities(k).min()) / 4
