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
from secateur.forests.reduction import BITS
from secateur.forests.solvers.interface import Cut


@dataclass(frozen=True)
class IntegerNetwork:
    """Capacities of the closure network.

    Attributes:
        supply: (n,) int64, from the source to a node.
        drain: (n,) int64, from a node to the sink.
        toll: (n_keys,) int64, from a key to the sink.
        unlimited: more than can ever flow.
    """

    problem: ClosureProblem
    supply: NDArray[np.int64]
    drain: NDArray[np.int64]
    toll: NDArray[np.int64]
    unlimited: int

    @property
    def total(self) -> int:
        """All that the source could send."""
        return int(self.supply.sum())

    def cut_value(self, kept: NDArray[np.bool_]) -> int:
        """Capacity of the cut that has ``kept`` on the source side."""
        paid = keys_of(self.problem.ptr, self.problem.key, kept, self.problem.n_keys)
        return int(self.supply[~kept].sum() + self.drain[kept].sum() + self.toll[paid].sum())


def integer_network(problem: ClosureProblem) -> IntegerNetwork:
    """The network of a problem in whole numbers (see ``in_whole_units``), at price 1.

    Sums of tolls and charges that outgrew the total gain are cut off above it once more.
    """
    net = problem.net(1.0)
    most = 2.0 ** (BITS + 1)
    supply = np.maximum(net, 0)
    drain = np.minimum(np.maximum(-net, 0), most)
    toll = np.minimum(problem.charge, most)
    supply, drain, toll = (x.astype(np.int64) for x in (supply, drain, toll))
    return IntegerNetwork(problem, supply, drain, toll, unlimited=4 << BITS)


def solve_maxflow(problem: ClosureProblem, backend: str = "push_relabel") -> Cut:
    """The smallest optimal closure of a problem in whole numbers, with the flow as the proof.

    Args:
        backend: ``ortools`` or ``push_relabel``, our own.

    Raises:
        NumericsError: the cut and the flow disagree, which would be a fault of the backend.
    """
    network = integer_network(problem)
    if backend == "ortools":
        from secateur.forests.solvers.flow_ortools import minimum_cut
    else:
        from secateur.forests.solvers.push_relabel import minimum_cut
    kept, flow, rounds = minimum_cut(network)
    if network.cut_value(kept) != flow:
        raise NumericsError(
            f"the cut ({network.cut_value(kept)}) and the flow ({flow}) disagree; "
            "the answer would not be optimal",
            fix="try the other backend: solver='push_relabel' or solver='ortools'",
        )
    return Cut(kept, problem.profit(kept, 1.0), float(network.total - flow), rounds, backend)
