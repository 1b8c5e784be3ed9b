"""The exact optimum by one minimum cut, in integers.

Network: source -> node with its positive net gain, node -> sink with its loss, node -> parent
and node -> key without limit, key -> sink with its charge. The nodes on the source side of the
smallest minimum cut are the smallest optimal closure.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from secateur.errors import NumericsError
from secateur.forests.closure import ClosureProblem, keys_of
from secateur.forests.solvers.interface import Cut

BITS = 46
"""Capacities are rounded to ``2**-BITS`` of the total gain: below what float64 sums resolve,
and far from the end of int64 whatever is added up."""


@dataclass(frozen=True)
class IntegerNetwork:
    """Capacities of the closure network as exact int64 multiples of ``unit``.

    Attributes:
        supply: (n,) from the source to a node.
        drain: (n,) from a node to the sink.
        toll: (n_keys,) from a key to the sink.
        unlimited: more than can ever flow.
        unit: what one stands for, in raw loss units.
    """

    problem: ClosureProblem
    supply: NDArray[np.int64]
    drain: NDArray[np.int64]
    toll: NDArray[np.int64]
    unlimited: int
    unit: float

    @property
    def total(self) -> int:
        """All that the source could send."""
        return int(self.supply.sum())

    def cut_value(self, kept: NDArray[np.bool_]) -> int:
        """Capacity of the cut that has ``kept`` on the source side."""
        paid = keys_of(self.problem.ptr, self.problem.key, kept, self.problem.n_keys)
        return int(self.supply[~kept].sum() + self.drain[kept].sum() + self.toll[paid].sum())


def integer_network(problem: ClosureProblem, price: float) -> IntegerNetwork:
    """Scale by a power of two, which keeps whole error counts whole.

    Charges beyond the total gain can never be worth paying and are cut off there.

    Raises:
        NumericsError: the price, a gain or a charge is not finite.
    """
    if not np.isfinite(price):
        raise NumericsError(f"the price must be finite, not {price}", fix="give a finite lambda")
    net = problem.net(price)
    charge = price * problem.charge
    if not (np.isfinite(net).all() and np.isfinite(charge).all()):
        raise NumericsError(
            "gains and costs must be finite", fix="look for NaN in targets or costs"
        )
    supply = np.maximum(net, 0)
    total = float(supply.sum())
    exponent = BITS - int(np.ceil(np.log2(total))) if total > 0 else BITS
    scale = 2.0**exponent

    def whole(x: NDArray[np.float64]) -> NDArray[np.int64]:
        return np.rint(np.minimum(x, 2 * total + 1 / scale) * scale).astype(np.int64)

    return IntegerNetwork(
        problem, whole(supply), whole(np.maximum(-net, 0)), whole(charge), 4 << BITS, 1.0 / scale
    )


def solve_maxflow(problem: ClosureProblem, price: float, backend: str = "scipy") -> Cut:
    """The smallest optimal closure, with the flow as the proof.

    Args:
        backend: ``ortools`` (push-relabel in int64) or ``scipy`` (Dinic in int32, refined digit
            by digit until the flow in int64 is maximal).

    Raises:
        NumericsError: the cut and the flow disagree, which would be a fault of the backend.
    """
    network = integer_network(problem, price)
    if backend == "ortools":
        from secateur.forests.solvers.flow_ortools import minimum_cut
    else:
        from secateur.forests.solvers.flow_scipy import minimum_cut
    kept, flow, rounds = minimum_cut(network)
    if network.cut_value(kept) != flow:
        raise NumericsError(
            f"the cut ({network.cut_value(kept)}) and the flow ({flow}) disagree; "
            "the answer would not be optimal",
            fix="try the other backend: solver='scipy' or solver='ortools'",
        )
    profit = problem.profit(kept, price)
    # Rounding moves any cut by at most half a unit for each node and key.
    slack = 0.5 * network.unit * (problem.n_nodes + problem.n_keys)
    bound = (network.total - flow) * network.unit + slack
    return Cut(kept, profit, max(profit, bound), rounds, backend)
