"""The operators DSA's functions are made of.

Li, Dong et al., "Discovering Sparsity Allocation for Layer-wise Pruning of Large Language
Models", NeurIPS 2024, appendix D, with the names of the released code. All are pure, and all
work on points with weights, so that a histogram stands for the scores it was counted from:

- *pre* operators map each score, ``PRE[name](x, w) -> x``;
- *reduce* operators make one number of a block, ``REDUCE[name](x, w) -> float``;
- *post* operators (the paper's transform and post) map the numbers of all blocks,
  ``POST[name](v) -> v``.

Where the released code and sense disagree, sense is the default (see each operator), and what
is not finite is never mended here: whoever evaluates a function refuses it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.special import expit, softmax

from secateur.evidence.score_summary import Values

Pre = Callable[[Values, Values], Values]
Reduce = Callable[[Values, Values], float]
Post = Callable[[Values], Values]


# -- element-wise on scores --------------------------------------------------------------------


def log_or_zero(x: Values, w: Values | None = None) -> Values:
    """ln x; 0 where x <= 0, as in the released code (which overwrites its input on the way)."""
    inside = x > 0
    return np.where(inside, np.log(np.where(inside, x, 1.0)), 0.0)


def log_of_abs(x: Values, w: Values | None = None) -> Values:
    """ln |x|, and 0 at 0: the released code's ABSLOG (the paper's formula reads |ln x|)."""
    return log_or_zero(np.abs(x))


def normalize(x: Values, w: Values) -> Values:
    """(x - mean) / std; NaN for a constant."""
    mean = _mean(x, w)
    return (x - mean) / np.sqrt(_mean(np.square(x - mean), w))


def min_max(x: Values, w: Values) -> Values:
    """(x - min) / (max - min); NaN for a constant."""
    return (x - x.min()) / (x.max() - x.min())


PRE: dict[str, Pre] = {
    "NO_OP": lambda x, w: x,
    "ABS": lambda x, w: np.abs(x),
    "LOG": log_or_zero,
    "ABSLOG": log_of_abs,
    "LOGABS": lambda x, w: np.abs(log_or_zero(x)),
    "POW": lambda x, w: np.square(x),
    "EXP": lambda x, w: np.exp(x),
    "NORMALIZE": normalize,
    "MMS": min_max,
    "SIGMOID": lambda x, w: expit(x),
    "TANH": lambda x, w: np.tanh(x),
}


# -- a block to a number -----------------------------------------------------------------------


def _mean(x: Values, w: Values) -> float:
    return float(np.dot(x, w) / w.sum())


def variance(x: Values, w: Values) -> float:
    """Mean squared distance from the mean (over n, the formula's; torch.var divides by n - 1)."""
    return _mean(np.square(x - _mean(x, w)), w)


def geometric_mean(x: Values, w: Values) -> float:
    """exp(mean ln |x|); 0 if any x is 0.

    The released code takes the n-th root of the product of all scores, which for the size of
    any real block is 0, infinite or NaN.
    """
    size = np.abs(x)
    return 0.0 if bool((size == 0).any()) else float(np.exp(_mean(np.log(size), w)))


def entropy(x: Values, w: Values) -> float:
    """Shannon entropy, nats, of |x| / sum |x|."""
    size = np.abs(x)
    total = float(np.dot(size, w))
    share = size[size > 0] / total
    return float(-np.dot(share * np.log(share), w[size > 0]))


def outlier_ratio(x: Values, w: Values, multiple: float = 5.0) -> float:
    """Share of |x| above ``multiple`` times its mean: OWL's statistic as an operator."""
    size = np.abs(x)
    return float(w[size > multiple * _mean(size, w)].sum() / w.sum())


REDUCE: dict[str, Reduce] = {
    "MEAN": _mean,
    "VAR": variance,
    "STD": lambda x, w: float(np.sqrt(variance(x, w))),
    "L1_NORM": lambda x, w: _mean(np.abs(x), w),  # a mean, as in the released code
    "FROBENIUS_NORM": lambda x, w: float(np.sqrt(np.dot(np.square(x), w))),
    "GRAM": lambda x, w: float(np.dot(np.square(x), w)),  # of a vector: its product with itself
    "GEOMETRIC_MEAN": geometric_mean,
    "ENTROPY": entropy,
    "OUTLIER": outlier_ratio,
}
PARAMETER = {"OUTLIER": 5.0}
"""Operators that take a number after a colon, and what it is when left out."""

REFUSED = {
    "NO_OP": "leaves a block more than one number",
    "CORREF": "of one vector is 1 for every block",
    "DIAGONAL": "needs a matrix, and a block's scores are one vector",
    "DETERMINANT": "needs a matrix, and a block's scores are one vector",
    "SLOGDET": "needs a matrix, and a block's scores are one vector",
    "RANK": "needs a matrix, and a block's scores are one vector",
}
"""Reductions the paper lists but that cannot work on what they are given, and why."""


# -- numbers of all blocks ---------------------------------------------------------------------

POST: dict[str, Post] = {
    "NO_OP": lambda v: v,
    "NEG": lambda v: -v,
    "ABS": lambda v: np.abs(v),
    "SIN": lambda v: np.sin(v),
    "COS": lambda v: np.cos(v),
    "TAN": lambda v: np.tan(v),
    "ASIN": lambda v: np.arcsin(v),
    "ACOS": lambda v: np.arccos(v),
    "ATAN": lambda v: np.arctan(v),
    "EXP": lambda v: np.exp(v),
    "LOG": lambda v: np.log(v),  # strict here: a block below 0 is a failure, not a 0
    "SIGMOID": lambda v: expit(v),
    "TANH": lambda v: np.tanh(v),
    "SOFTPLUS": lambda v: np.logaddexp(0.0, v),
    "SOFTMAX": lambda v: softmax(v),
}
