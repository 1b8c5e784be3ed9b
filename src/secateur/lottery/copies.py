"""Depth L+1: copies of neurons instead of a layer between all layers.

Burkholz, "Most Activation Functions Can Win the Lottery Without Excessive Depth" (NeurIPS 2022,
arXiv 2205.02321). Only the input gets an intermediate layer. After that the random network holds
``copies`` copies of every hidden neuron; a weight from neuron j is the sum of a subset of the
random weights that leave j's copies. Biases are subset sums over neurons that stand on the constant
input. The published code redraws a layer until it succeeds; here the copies are enlarged for the
whole network, which stays one fixed random network.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from secateur.errors import SecateurError, UsageError
from secateur.lottery.construction import Construction, Found, Plan, Task
from secateur.lottery.laws import Law
from secateur.lottery.network import Box, TargetNetwork
from secateur.lottery.search import Floats, Ints, Pools, subsets
from secateur.lottery.sizing import check_whole
from secateur.lottery.subset_sum import MOST, REACH, default_products, edges_of, pool_for
from secateur.lottery.ticket import Ticket
from secateur.progress import Progress


@dataclass(frozen=True, kw_only=True)
class CopyTicket(Construction):
    """Subset sums over copies; one layer deeper than the target, dense layers only.

    Attributes:
        copies: of every hidden neuron (the published code has 15); by default
            log2(w_max / eps) + 14. Enlarged by two, at most ``growth`` times, if they do not do;
            so are, one by one, the pools in front of the first layer and under the biases.
    """

    name: ClassVar[str] = "copies"
    copies: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.copies is not None:
            check_whole("copies", self.copies, 1, MOST)

    def plan(self, task: Task, tasks: list[Task], plans: list[Plan]) -> Plan:
        """Copies of this layer's rows; the columns are carried after the first layer."""
        if task.layer.geometry.kernel is not None:
            raise UsageError(
                "copies are built for dense layers only",
                field="target",
                value="Conv2d",
                fix="LogTicket or SubsetSumTicket",
            )
        last, first = task.number == len(tasks) - 1, task.number == 0
        wanted = max(default_products(t.w_max, t.tolerance) for t in tasks)
        rho = self.copies or wanted
        weight = np.abs(task.layer.matrix.numpy())
        bias = float(weight[:, -1].max()) if task.layer.bias else 0.0
        body = float(weight[:, :-1].max()) if task.layer.bias else float(weight.max())
        scale = math.sqrt(REACH * (task.w_max if first else bias))
        scale = scale if first else max(scale, body)
        pools = sum(t.layer.matrix.shape[1] for t in tasks)
        return Plan(
            Law("uniform", scale or 1.0),
            pool_for(rho, self.delta / pools) if task.w_max else 0,
            task.tolerance,
            products=rho,
            copies=1 if last else rho,
            carried=0 if first else plans[-1].copies,
        )

    def search(
        self, pools: Pools, plan: Plan, sign: int, demand: Floats, engine: str, attempt: int
    ) -> Found:
        """Nearest subsets; fewest products first."""
        n = min(max(plan.products, plan.carried) + 2 * attempt, MOST)
        return edges_of(subsets(pools, sign, demand, n, 4, plan.tolerance, engine), demand, plan)

    def grow(self, sizes: Ints) -> Ints:
        """Room for two further products; only pools that are no copies grow."""
        return sizes + 8

    def _fit(
        self, target: TargetNetwork, box: Box, seed: int, tasks: list[Task], progress: Progress
    ) -> Ticket:
        """All layers share the number of copies: too few of them enlarge the whole network."""
        rho = self._plans(tasks)[0].products
        for attempt in range(self.growth + 1):
            wider = replace(self, copies=min(rho + 2 * attempt, MOST))
            try:
                ticket = Construction._fit(wider, target, box, seed, tasks, progress)
            except SecateurError as failure:
                if attempt == self.growth or isinstance(failure, UsageError):
                    raise
                progress.note(f"{failure.message}; {rho + 2 * attempt + 2} copies instead")
                continue
            ticket.history["copies"] = wider.copies
            ticket.history["attempts"] = attempt + 1
            return ticket
        raise AssertionError("unreachable: the last attempt returns or raises")
