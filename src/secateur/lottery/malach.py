"""One neuron per weight: the first strong-lottery-ticket proof, as a program.

Malach, Yehudai, Shalev-Shwartz, Shamir, "Proving the Lottery Ticket Hypothesis: Pruning is All
You Need" (ICML 2020, arXiv 2002.00585). A weight is met by a single product a b; wanting the
product near needs about 1/eps samples, wanting each factor near (the original argument) 1/eps^2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from secateur.lottery.construction import Construction, Found, Plan, Task, union_size
from secateur.lottery.laws import Law
from secateur.lottery.search import Floats, Pools, single
from secateur.lottery.sizing import check_choice


@dataclass(frozen=True, kw_only=True)
class MalachTicket(Construction):
    """Each weight a single random product.

    Attributes:
        match: ``product``: |ab - w| <= eps; ``factors``: a and b each within eps/2 of sqrt|w|.
        pools: ``independent`` (one pool per weight) or ``shared`` (one per input).
    """

    name: ClassVar[str] = "malach"
    match: Literal["product", "factors"] = "product"
    pools: Literal["independent", "shared"] = "independent"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("match", self.match, ("product", "factors"))
        check_choice("pools", self.pools, ("independent", "shared"))

    def plan(self, task: Task, tasks: list[Task], plans: list[Plan]) -> Plan:
        """Pools by the union bound over all weights."""
        w_max = task.w_max
        if w_max == 0:
            return Plan(Law("uniform", 1.0), 0, task.tolerance, per_weight=True)
        weights = sum(t.layer.matrix.shape[0] * int(t.rises.sum() + t.falls.sum()) for t in tasks)
        # Both factors on [-s, s] with s^2 = 2 w_max: at the very edge the product's density is 0.
        law = Law("uniform", math.sqrt(2 * w_max))
        chance = hit_probability(w_max, task.tolerance, law.scale, self.match)
        size = union_size(max(weights, 1), self.delta, chance)
        return Plan(law, size, task.tolerance, per_weight=self.pools == "independent")

    def search(
        self, pools: Pools, plan: Plan, sign: int, demand: Floats, engine: str, attempt: int
    ) -> Found:
        """See ``search.single``."""
        both = self.match == "factors"
        picks = single(pools, sign, demand, plan.tolerance, both, engine)
        pool, output, _ = (picks.neurons >= 0).nonzero()
        neuron = picks.neurons[pool, output, 0].astype(np.int64)
        return Found(pool, output, neuron, picks.residual, picks.empty)


def hit_probability(weight: float, eps: float, scale: float, match: str = "product") -> float:
    """P(one neuron with uniform factors on [-scale, scale] has the right signs and is near enough).

    Decreases with |weight|, so its value at w_max serves all weights. For ``product`` it is exact:
    |a b| / scale^2 has the distribution function t (1 - ln t).
    """
    if match == "factors":
        return (0.5 * min(eps / scale**2, 1.0)) ** 2

    def below(t: float) -> float:
        t = min(max(t, 0.0), 1.0)
        return t * (1 - math.log(t)) if t > 0 else 0.0

    return (below((weight + eps) / scale**2) - below((weight - eps) / scale**2)) / 4
