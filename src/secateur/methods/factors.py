"""The factor of a module's second moments, shared by those that share an input."""

from __future__ import annotations

import weakref

from secateur.evidence.statistics import Evidence, InputMoments
from secateur.solvers.obs import Factor, factorise

Key = tuple[int, float]


class _Last:
    """The one factor made last: q, k and v (gate and up) come one after another.

    Holds the moments weakly, so nothing outlives the block it belongs to for long.
    """

    moments: weakref.ref[InputMoments] | None = None
    key: Key | None = None
    factor: Factor | None = None


_last = _Last()


def factor_of(evidence: Evidence, damping: float) -> Factor:
    """``solvers.obs.factorise`` of the evidence's second moments, remembered for the next call.

    Raises:
        NumericsError: as ``factorise``.
    """
    moments = evidence.moments()
    key = (moments.tokens, damping)
    known = _last.moments is not None and _last.moments() is moments and _last.key == key
    if not known or _last.factor is None:
        moment = moments.second_moment()
        _last.factor = factorise(moment, damping, name=evidence.name, tokens=moments.tokens)
        _last.moments, _last.key = weakref.ref(moments), key
    return _last.factor
