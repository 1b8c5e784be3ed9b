"""Random subset sums: fewer random neurons, at the price of a search over subsets.

Pensia, Rajput, Nagle, Vishwakarma, Papailiopoulos, "Optimal Lottery Tickets via SubsetSum"
(NeurIPS 2020, arXiv 2006.07990): every weight is the sum of a subset of the pool's products,
and log2(w_max / eps) plus a constant products suffice. The published experiment calls a MIP
solver per weight; here the best subset comes from meeting in the middle, 2^(n/2) steps per weight,
exact.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from scipy.stats import binom

from secateur.errors import UsageError
from secateur.lottery.construction import Construction, Found, Plan, Task
from secateur.lottery.laws import Law, LawKind
from secateur.lottery.search import Floats, Ints, Pools, Subsets, subsets
from secateur.lottery.sizing import check_choice, check_whole

MARGIN = 14
"""Products beyond log2(w_max / eps): measured to meet all of 4e5 weights (benchmarks)."""
MOST = 40
REACH = 3.0
"""Products span [-3 w_max, 3 w_max]: one pool's sums then reach w_max but once in 1e5 pools."""


@dataclass(frozen=True, kw_only=True)
class SubsetSumTicket(Construction):
    """Each weight the nearest subset sum of n random products.

    Attributes:
        products: n per weight; by default log2(w_max / eps) + 14, at most 40.
        exact: search for the best subset of all n; by default stop at the first that is near
            enough among 4, 6, 8, ... products, which keeps fewer and is faster.
        law: ``uniform`` or ``normal``.
    """

    name: ClassVar[str] = "subset-sum"
    products: int | None = None
    exact: bool = False
    law: LawKind = "uniform"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.products is not None:  # 2^(n/2) steps per weight
            check_whole("products", self.products, 1, MOST)
        if not isinstance(self.exact, bool):
            raise UsageError("yes or no", field="exact", value=self.exact, fix="exact=True")
        # Subset sums want a law that is dense around 0.
        check_choice("law", self.law, ("uniform", "normal"))

    def plan(self, task: Task, tasks: list[Task], plans: list[Plan]) -> Plan:
        """Pools large enough to hold n neurons of the right in-sign, all pools together."""
        products = self.products or default_products(task.w_max, task.tolerance)
        pools = sum(int(t.rises.sum() + t.falls.sum()) for t in tasks)
        size = pool_for(products, self.delta / max(pools, 1)) if task.w_max else 0
        law = Law(self.law, math.sqrt(REACH * (task.w_max or 1.0)))
        return Plan(law, size, task.tolerance, products=products)

    def search(
        self, pools: Pools, plan: Plan, sign: int, demand: Floats, engine: str, attempt: int
    ) -> Found:
        """See ``search.subsets``; a failed attempt may use two more products per weight."""
        n = min(plan.products + 2 * attempt, MOST)
        start, tolerance = (n, 0.0) if self.exact else (4, plan.tolerance)
        return edges_of(subsets(pools, sign, demand, n, start, tolerance, engine), demand, plan)

    def grow(self, sizes: Ints) -> Ints:
        """Room for the two further products."""
        return sizes + 8


def default_products(w_max: float, tolerance: float) -> int:
    """log2(w_max / eps) + 14, within [4, 40]."""
    return int(np.clip(math.ceil(math.log2(max(w_max / tolerance, 1.0))) + MARGIN, 4, MOST))


def pool_for(products: int, delta: float) -> int:
    """The smallest pool with at least ``products`` neurons of one sign, with probability 1 - delta."""
    size = 2 * products
    while binom.cdf(products - 1, size, 0.5) > delta:
        size += 1
    return size


def edges_of(found: Subsets, demand: Floats, plan: Plan) -> Found:
    """The chosen subsets as edges."""
    n = found.neurons.shape[1]
    # One product at a time: all at once would be n times the masks, and most of them zero.
    places = [((found.masks >> np.uint64(s)) & np.uint64(1)).nonzero() for s in range(n)]
    pool = np.concatenate([place[0] for place in places])
    output = np.concatenate([place[1] for place in places])
    slot = np.repeat(np.arange(n), [len(place[0]) for place in places])
    neuron = found.neurons[pool, slot].astype(np.int64)
    short = (found.neurons < 0).any(axis=1) & (found.residual > plan.tolerance).any(axis=1)
    return Found(pool, output, neuron, found.residual, np.asarray(short, np.int64))
