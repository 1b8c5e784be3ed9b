"""What the released DSA code does with a function, quirks included (``compat="reference"``).

For comparison with published results only. A value that is NaN becomes 0 and an infinite one
-1, so a function that fails on a block makes it the least sparse rather than being refused;
the geometric mean is the root of a product that underflows; the variance divides by n - 1;
lambda in the text is ignored; the mean over blocks is the plain one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from secateur.allocation.dsa.expression import Expression
from secateur.allocation.dsa.function import reduce_summary
from secateur.allocation.dsa.operators import POST, PRE
from secateur.evidence.score_summary import ScoreSummary, Values

LAMBDA = 0.08
LEAST = 0.01
_LOG_MAX, _LOG_TINY = math.log(3.4028235e38), math.log(1.4e-45)


def reference_phi(expression: Expression, blocks: Sequence[ScoreSummary]) -> Values:
    """phi as the released code has it: (blocks,), always finite."""
    with np.errstate(all="ignore"):
        v = np.array([_value(expression, summary) for summary in blocks])
        for name in expression.post:
            v = POST[name](v)
    return np.where(np.isnan(v), 0.0, np.where(np.isinf(v), -1.0, v))


def _value(expression: Expression, summary: ScoreSummary) -> float:
    if expression.reduce == "GEOMETRIC_MEAN":
        return _root_of_product(expression, summary)
    value = reduce_summary(expression, summary)
    n = summary.count
    unbiased = n / (n - 1) if n > 1 else math.nan
    return value * {"VAR": unbiased, "STD": math.sqrt(unbiased)}.get(expression.reduce, 1.0)


def _root_of_product(expression: Expression, summary: ScoreSummary) -> float:
    """(x_1 ... x_n)^(1/n) with the product in float32."""
    x, w = summary.points()
    for name in expression.pre:
        x = PRE[name](x, w)
    if bool((x == 0).any()):
        return 0.0
    log_product = float(np.dot(np.log(np.abs(x)), w))
    negative = int(w[x < 0].sum()) % 2 == 1
    if log_product < _LOG_TINY:
        return 0.0
    if negative:
        return math.nan  # an even or fractional root of a negative number
    return math.inf if log_product > _LOG_MAX else math.exp(log_product / summary.count)


def reference_ratios(values: Sequence[float], sparsity: float, lam: float = LAMBDA) -> list[float]:
    """The released mapping to ratios: plain mean, and what falls to 0 or below becomes 0.01."""
    v = np.asarray(values, dtype=np.float64)
    keep = 1 - (v - v.min()) / (v.max() - v.min())
    keep = 2 * lam * (keep - keep.min()) / (keep.max() - keep.min())
    ratios = 1 - (keep - keep.mean() + (1 - sparsity))
    out: list[float] = np.where(ratios <= 0, LEAST, ratios).tolist()
    return out
