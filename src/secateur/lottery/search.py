"""Searching pools for the neurons a ticket keeps: one interface, two engines.

``Pools`` says which random neurons stand where; ``bitwise``, ``subsets`` and ``single`` look for
the ones that meet a demand. The compiled engine (numba, all cores) serves CPUs; the torch engine
serves GPUs and machines without numba. Both draw the same weights and follow the same rules.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from secateur.errors import MissingExtra, UsageError
from secateur.lottery.drawing import have_numba
from secateur.lottery.laws import Law

Engine = Literal["auto", "compiled", "torch", "cuda"]
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Pools:
    """P pools of random neurons and the O outputs each may feed.

    A neuron keeps one in-edge, from input ``columns[p]``. Its out-edges go to the outputs
    ``first_out[p] + o``. Only the first ``sizes[p]`` neurons of pool ``ids[p]`` exist. Where
    ``carried[p]`` they are copies of the input itself, whose in-weight is 1 (depth L+1).
    """

    seed: int
    layer: int
    law: Law
    ids: Ints
    columns: Ints
    first_out: Ints
    sizes: Ints
    carried: NDArray[np.bool_]

    def take(self, chosen: Ints, sizes: Ints | None = None) -> Pools:
        """A selection of the pools, with other sizes if given."""
        return Pools(
            self.seed,
            self.layer,
            self.law,
            self.ids[chosen],
            self.columns[chosen],
            self.first_out[chosen],
            self.sizes[chosen] if sizes is None else sizes,
            self.carried[chosen],
        )

    def compiled_head(self) -> tuple[Any, ...]:
        """The first arguments of every compiled kernel."""
        law = (self.law.code, float(self.law.scale), float(self.law.span))
        return law, np.uint64(self.seed), self.layer


def on_all_cores(kernel: Any, head: tuple[Any, ...], rows: list[Any], rest: list[Any]) -> None:
    """Run a compiled kernel on slices of the pools, one thread per core.

    ``head`` goes in front. ``rows`` are the arguments in order: arrays over pools, which are sliced,
    and ``...`` where the next of ``rest`` goes unsliced.
    """
    count = len(next(array for array in rows if isinstance(array, np.ndarray)))
    workers = max(1, torch.get_num_threads())
    # More slices than threads: pools differ in cost.
    step = count if workers == 1 else max(1, math.ceil(count / (4 * workers)))

    def part(begin: int) -> None:
        others = iter(rest)
        kernel(
            *head,
            *(next(others) if row is ... else row[begin : begin + step] for row in rows),
        )

    if workers == 1:
        part(0)
        return
    with ThreadPoolExecutor(workers) as threads:
        list(threads.map(part, range(0, count, step)))


@dataclass(frozen=True)
class Picks:
    """What a bitwise or single search chose: neurons (P, O, slots), -1 for none.

    ``residual`` (P, O) is |demand - sum of the chosen products|; ``empty`` (P,) counts the slots
    that were needed and for which the pool had no neuron.
    """

    neurons: Ints
    residual: Floats
    empty: Ints


@dataclass(frozen=True)
class Subsets:
    """What a subset-sum search chose: ``masks`` (P, O) over ``neurons`` (P, n), -1 padded."""

    neurons: Ints
    masks: NDArray[np.uint64]
    residual: Floats


def resolve(engine: str) -> str:
    """``auto`` made concrete: compiled where numba is, else torch (on the CPU).

    The CUDA engine has not been run on a GPU yet, so it is taken only when asked for by name.
    """
    if engine == "auto":
        return "compiled" if have_numba() else "torch"
    if engine == "compiled" and not have_numba():
        raise MissingExtra("numba", "lottery", "engine='compiled'")
    if engine == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            "this machine has no CUDA device", field="engine", value=engine, fix="engine='auto'"
        )
    if engine not in ("compiled", "torch", "cuda"):
        raise UsageError(
            "unknown engine", field="engine", value=engine, fix="auto, compiled, torch or cuda"
        )
    return engine


def bitwise(
    pools: Pools, sign: int, demand: Floats, edges: Floats, depth: int, engine: str
) -> Picks:
    """Greedy golden-ratio decomposition of every demand from the neurons of its pool.

    Args:
        pools: the pools; only neurons whose in-weight has ``sign`` are used.
        demand: (P, O) sums wanted; 0 keeps nothing.
        edges: (k + 1,) interval ends, descending: interval i is [edges[i+1], edges[i]].
        depth: candidates kept per interval; above 1 the result is refined by swapping them.
        engine: concrete engine name.
    """
    if engine == "compiled":
        from secateur.lottery import compiled

        shape = (*demand.shape, len(edges) - 1)
        picks = np.empty(shape, np.int32)
        residual = np.empty(demand.shape)
        empty = np.zeros(len(demand), np.int64)
        head = (*pools.compiled_head(), sign)
        rows: list[Any] = [pools.ids, pools.columns, pools.first_out, pools.sizes]
        rows += [np.ascontiguousarray(demand), ..., ..., picks, residual, empty]
        on_all_cores(compiled.bitwise, head, rows, [edges, depth])
        return Picks(picks, residual, empty)
    from secateur.lottery import search_torch

    return search_torch.bitwise(pools, sign, demand, edges, depth, engine)


def subsets(
    pools: Pools, sign: int, demand: Floats, n: int, start: int, tolerance: float, engine: str
) -> Subsets:
    """The subset of (the first n usable) products nearest to every demand.

    Tries ``start`` products first and two more at a time while the rest exceeds ``tolerance``;
    ``tolerance=0`` with ``start=n`` is the exact optimum over all n.
    """
    if engine == "compiled":
        from secateur.lottery import compiled

        neurons = np.empty((len(demand), n), np.int32)
        masks = np.empty(demand.shape, np.uint64)
        residual = np.empty(demand.shape)
        head = (*pools.compiled_head(), sign)
        rows: list[Any] = [pools.ids, pools.columns, pools.sizes, pools.carried]
        rows += [np.ascontiguousarray(demand), ..., ..., ..., neurons, masks, residual]
        on_all_cores(compiled.subsets, head, rows, [n, min(start, n), tolerance])
        return Subsets(neurons.astype(np.int64), masks, residual)
    from secateur.lottery import search_torch

    return search_torch.subsets(pools, sign, demand, n, start, tolerance, engine)


def single(
    pools: Pools, sign: int, demand: Floats, tolerance: float, both: bool, engine: str
) -> Picks:
    """The first neuron whose one product (or, with ``both``, whose two factors) is near enough."""
    if engine == "compiled":
        from secateur.lottery import compiled

        picks = np.empty(demand.shape, np.int64)
        residual = np.empty(demand.shape)
        head = (*pools.compiled_head(), sign)
        rows: list[Any] = [pools.ids, pools.columns, pools.first_out, pools.sizes]
        rows += [np.ascontiguousarray(demand), ..., ..., picks, residual]
        on_all_cores(compiled.single, head, rows, [tolerance, both])
    else:
        from secateur.lottery import search_torch

        picks, residual = search_torch.single(pools, sign, demand, tolerance, both, engine)
    empty = ((picks < 0) & (np.abs(demand) > tolerance)).sum(axis=1)
    return Picks(picks[..., None], residual, empty)
