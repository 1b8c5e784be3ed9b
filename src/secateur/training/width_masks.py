"""S2HPruner's masks: a distribution over how many of a group's units stay.

A group of C units may keep c_1 < ... < c_n = C of them. Logits u in R^n give::

    p   = softmax(u / tau)                 probability that exactly the c_k first units stay
    w_k = sum_{j >= k} p_j                 soft mask of the units c_{k-1} ... c_k (first ones first)
    E   = sum_k p_k c_k = sum of w         expected width

Units are ranked by importance, so one number says which stay. In closed form::

    dw_i / du_j = p_j ([j >= i] - w_i) / tau        dE / du_j = p_j (c_j - E) / tau

The first step is never cut (w_1 = 1), so no group collapses. Everything is invariant to a
constant added to u.

Source: Lin et al., "S2HPruner: Soft-to-Hard Distillation Bridges the Discretization Gap in
Pruning", NeurIPS 2024 (arXiv 2410.07046), and its published code for the inits.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from secateur.errors import NumericsError, UsageError

Init = Literal["max", "normal", "zeros", "max-entropy", "min-variance", "min-norm"]
Centre = Literal["mean", "mid-range", "none"]
STEPS = 32
"""Candidate widths of a group unless a divisor is given."""
_EXACT = 1e-4
"""An expected width so little above a whole number is that number (float32 sums of p)."""

_DEEPEST = 20.0


def candidate_widths(
    size: int, divisor: int | None = None, at_least: int = 1, name: str = ""
) -> Tensor:
    """Widths a group of ``size`` units may have, (n,) int64, ascending, the last being ``size``.

    Args:
        divisor: units in a step; lowered until it divides ``size``. Default: ``size / 32``.
        at_least: the first width is no smaller.
        name: of the group, for the error.

    Raises:
        UsageError: a divisor below 1, or so large that only the full width is left.

    >>> candidate_widths(12, 5).tolist()
    [4, 8, 12]
    """
    step = max(1, size // STEPS) if divisor is None else divisor
    if step < 1:
        raise UsageError("must be at least 1", field="divisor", value=divisor)
    if size <= step:
        raise UsageError(
            f"a group of {size} units{f', {name!r},' if name else ''} has no narrower width in steps "
            f"of {step}",
            field="divisor",
            value=step,
            fix=f"a divisor below {size}, or protect the group"
            if size > 1
            else "protect the group of one unit",
        )
    while size % step:
        step -= 1
    return torch.arange(step * -(-min(max(at_least, step), size) // step), size + 1, step)


def width_probabilities(logits: Tensor, tau: float = 1.0) -> Tensor:
    """p (n,) of logits (n,), in float32 at least."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return torch.softmax(wide / tau, -1)


def step_masks(p: Tensor) -> Tensor:
    """w (n,): what the units of each step are multiplied by; falls from 1."""
    return p.flip(-1).cumsum(-1).flip(-1)


def unit_masks(p: Tensor, widths: Tensor) -> Tensor:
    """w (C,), one number a unit, most important unit first.

    >>> unit_masks(torch.tensor([0.25, 0.75]), torch.tensor([1, 3])).tolist()
    [1.0, 0.75, 0.75]
    """
    counts = torch.diff(widths, prepend=widths.new_zeros(1)).to(p.device)
    return step_masks(p).repeat_interleave(counts)


def expected_width(p: Tensor, widths: Tensor) -> Tensor:
    """E, a scalar in units."""
    return (p * widths.to(p)).sum(-1)


def chosen_width(expected: float, size: int, multiple: int = 1) -> int:
    """n^: the width the hard network has, the expected one rounded up to ``multiple``.

    >>> chosen_width(9.2, 64, 8), chosen_width(63.5, 64), chosen_width(8.00001, 64)
    (16, 64, 8)
    """
    if not math.isfinite(expected):
        raise NumericsError("the expected width is not finite", field="width", value=expected)
    whole = max(1, math.ceil(expected - _EXACT * max(1.0, expected / 64)))
    return min(-(-whole // multiple) * multiple, size)


def expected_width_gradient(p: Tensor, widths: Tensor, tau: float = 1.0) -> Tensor:
    """dE/du (n,)."""
    return p * (widths.to(p) - expected_width(p, widths)) / tau


def step_mask_gradient(p: Tensor, tau: float = 1.0) -> Tensor:
    """dw_i/du_j, (n, n)."""
    n = p.shape[-1]
    reached = torch.ones(n, n, dtype=p.dtype, device=p.device).triu()
    return p * (reached - step_masks(p)[:, None]) / tau


def lifted(logits: Tensor, tau: float = 1.0) -> Tensor:
    """Logits none of which is so low that its width could never come back.

    A probability of e^-20 changes nothing in the masks (2e-9 a step) and still has a gradient.
    """
    return torch.maximum(logits, logits.max() - _DEEPEST * tau)


def tilted(logits: Tensor, widths: Tensor, wanted: float, tau: float = 1.0) -> Tensor:
    """Logits whose expected width is ``wanted``: the nearest distribution that has it.

    Of all with that mean, p_k exp(s c_k) has the least divergence from p; s by bisection.
    """
    c = widths.double().to(logits.device)
    u = logits.detach().double() / tau
    low, high = -1e3, 1e3
    for _ in range(60):
        slope = (low + high) / 2
        mean = float((torch.softmax(u + slope * c, -1) * c).sum())
        low, high = (slope, high) if mean < wanted else (low, slope)
    return lifted((tau * (u + (low + high) / 2 * c)).to(logits), tau)


def centred(logits: Tensor, how: Centre = "mean") -> Tensor:
    """Logits of the same distribution whose 2-norm (``mean``) or largest one (``mid-range``) is least."""
    if how == "mean":
        return logits - logits.mean()
    if how == "mid-range":
        return logits - (logits.max() + logits.min()) / 2
    return logits


# -- where the logits start ------------------------------------------------------------------------


def first_logits(
    widths: Tensor,
    init: Init = "max",
    *,
    tau: float = 1.0,
    std: float = 0.01,
    share: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Logits u (n,) float32 to start from.

    Args:
        init: ``max``: almost dense, p_n = (C - d)/C and the others equal; ``normal``: spread
            ``std``; ``zeros``: all widths alike; ``max-entropy``, ``min-variance``, ``min-norm``:
            of the distributions with that expected width, the one with the most entropy, the least
            variance, the least sum of squares.
        share: expected width of the last three, as a share of C; default (C - d)/C.

    Raises:
        UsageError: an unknown init; an expected width no distribution has.
    """
    if init not in get_args(Init):
        raise UsageError(
            "unknown start", field="init", value=init, fix=f"one of {', '.join(get_args(Init))}"
        )
    n, size, first = len(widths), int(widths[-1]), int(widths[0])
    if n == 1:
        return torch.zeros(1)
    if init == "normal":
        return torch.randn(n, generator=generator) * std
    if init == "zeros":
        return torch.zeros(n)
    if init == "max":
        logits = torch.zeros(n)
        t = (size - first) / size
        logits[-1] = tau * math.log((n - 1) * t / (1 - t))
        return logits
    wanted = (size - first) if share is None else share * size
    if not first < wanted < size:
        raise UsageError(
            f"the expected width must lie between {first} and {size} units",
            field="init_share",
            value=share,
            fix=f"a share between {first / size:.3f} and 1",
        )
    c = widths.double()
    if init == "max-entropy":
        return (tau * _entropy_slope(c / size, wanted / size) * c / size).float()
    p = _least_variance(c, wanted) if init == "min-variance" else _least_norm(c, wanted)
    # A width of no probability has no gradient either: it keeps a little.
    return tau * ((p + 1e-4) / (p + 1e-4).sum()).log().float()


def _entropy_slope(c: Tensor, wanted: float) -> float:
    """The slope of softmax(slope c), the most entropy for its mean, whose mean is ``wanted``."""
    low, high = -1e4, 1e4
    for _ in range(100):
        slope = (low + high) / 2
        mean = float((torch.softmax(slope * c, -1) * c).sum())
        low, high = (slope, high) if mean < wanted else (low, slope)
    return low


def _least_variance(c: Tensor, wanted: float) -> Tensor:
    """All mass on the two widths around ``wanted``."""
    above = int(torch.searchsorted(c, torch.tensor(wanted, dtype=c.dtype)))
    p = torch.zeros_like(c)
    upper = (wanted - float(c[above - 1])) / float(c[above] - c[above - 1])
    p[above - 1], p[above] = 1 - upper, upper
    return p


def _least_norm(c: Tensor, wanted: float) -> Tensor:
    """min sum p^2 under sum p = 1, sum p c = wanted, p >= 0: p = max(0, a + b c) on a run of c."""
    n = len(c)
    for low in range(n):
        for high in range(n, low + 1, -1):
            # The active widths are a run that touches an end (p is monotone in c).
            if low > 0 and high < n:
                continue
            part = c[low:high]
            m, s1, s2 = len(part), float(part.sum()), float(part.square().sum())
            spread = m * s2 - s1 * s1
            a, b = (s2 - wanted * s1) / spread, (m * wanted - s1) / spread
            inside = a + b * part
            if float(inside.min()) < -1e-12:
                continue
            outside = torch.cat([c[:low], c[high:]])
            if outside.numel() and float((a + b * outside).max()) > 1e-9:
                continue
            p = torch.zeros_like(c)
            p[low:high] = inside.clamp_min(0)
            return p / p.sum()
    return _least_variance(c, wanted)
