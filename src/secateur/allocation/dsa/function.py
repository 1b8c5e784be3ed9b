"""A DSA function evaluated: from block summaries to one number a block.

Pure: no model, no method. What is not finite is an error that names the block, never a value.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from secateur.allocation.dsa.expression import Expression
from secateur.allocation.dsa.operators import POST, PRE, REDUCE, outlier_ratio
from secateur.errors import NumericsError
from secateur.evidence.score_summary import ScoreSummary, Values


def block_values(expression: Expression, blocks: Sequence[ScoreSummary]) -> list[float]:
    """V_l = reduce(pre(scores of block l)), not yet checked."""
    with np.errstate(all="ignore"):
        return [reduce_summary(expression, summary) for summary in blocks]


def phi(expression: Expression, blocks: Sequence[ScoreSummary]) -> Values:
    """phi_l = post(V_l) of every block, (blocks,) float64; larger means sparser.

    Raises:
        NumericsError: a block's value is NaN or infinite; says which and where it arose.
    """
    values = np.array(block_values(expression, blocks))
    _finite(values, expression, "the reduction", values)
    with np.errstate(all="ignore"):
        out = values
        for name in expression.post:
            before, out = out, POST[name](out)
            _finite(out, expression, name, before)
    return out


def _finite(out: Values, expression: Expression, step: str, given: Values) -> None:
    bad = np.flatnonzero(~np.isfinite(out))
    if bad.size:
        from_what = "" if step == "the reduction" else f" of {given[bad[0]]:.6g}"
        raise NumericsError(
            f"{step}{from_what} is not finite in block {bad[0]} ({bad.size} of {out.size} blocks)",
            field="expression",
            value=str(expression),
            fix="choose another function ('paper' is finite everywhere), or search one",
        )


def reduce_summary(expression: Expression, summary: ScoreSummary) -> float:
    """One block's V, from exact moments where they suffice, else from the histogram."""
    exact = _from_moments(expression, summary)
    if exact is not None:
        return exact
    x, w = summary.points()
    for name in expression.pre:
        x = PRE[name](x, w)
    if expression.reduce == "OUTLIER":
        return outlier_ratio(x, w, expression.parameter or 5.0)
    return REDUCE[expression.reduce](x, w)


def _from_moments(expression: Expression, s: ScoreSummary) -> float | None:
    pre = tuple(name for name in expression.pre if name not in ("NO_OP", "ABS"))  # scores are >= 0
    kind, n = expression.reduce, max(1, s.count)
    if not pre:
        if kind == "OUTLIER":
            return s.outlier_ratio(expression.parameter or 5.0)
        if kind == "GEOMETRIC_MEAN":
            return 0.0 if s.zeros else math.exp(s.logs / n)
        return _moment(kind, s.total, s.squares, n, absolute=s.total)
    if pre in (("LOG",), ("ABSLOG",)):
        return _moment(kind, s.logs, s.log_squares, n)
    return None


def _moment(
    kind: str, total: float, squares: float, n: int, absolute: float | None = None
) -> float | None:
    if kind == "MEAN":
        return total / n
    if kind == "L1_NORM" and absolute is not None:
        return absolute / n
    if kind == "GRAM":
        return squares
    if kind == "FROBENIUS_NORM":
        return math.sqrt(squares)
    if kind in ("VAR", "STD"):
        spread = max(0.0, squares / n - (total / n) ** 2)
        return spread if kind == "VAR" else math.sqrt(spread)
    return None
