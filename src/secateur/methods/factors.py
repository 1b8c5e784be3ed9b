"""The factor of a module's second moments, shared by those that share an input."""

from __future__ import annotations

from secateur.evidence.statistics import Evidence
from secateur.solvers.obs import Factor, factorise


def factor_of(evidence: Evidence, damping: float) -> Factor:
    """``solvers.obs.factorise`` of the evidence's second moments, remembered for the next call.

    q, k and v (gate and up) have one input, so one factor. It is kept on the moments and goes
    when they go; it is read and replaced as one tuple, so threads at worst do the work twice.

    Raises:
        NumericsError: as ``factorise``.
    """
    moments = evidence.moments()
    tokens, last = moments.tokens, moments.solved
    if last is not None and last[:2] == (tokens, damping):
        return last[2]
    factor = factorise(moments.second_moment(), damping, name=evidence.name, tokens=tokens)
    moments.solved = (tokens, damping, factor)
    return factor


def damping_notes(factor: Factor, asked: float) -> dict[str, float]:
    """The damping really used and, where the moments needed more, what was asked for."""
    used = {"damping": factor.damping}
    return used | {"damping_asked": asked} if factor.damping > asked else used
