"""What every construction shares: read, size, refuse or search, grow what failed, hand back.

A construction says how large its pools are (``plan``) and how it picks neurons from them
(``search``). Everything else, and above all the rule that no failure is silent, is here.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from secateur.errors import SecateurError, UsageError
from secateur.lottery.intervals import propagate
from secateur.lottery.laws import Law
from secateur.lottery.network import Box, Layer, TargetNetwork
from secateur.lottery.philox import check_seed
from secateur.lottery.reading import from_module
from secateur.lottery.search import Engine, Floats, Ints, Pools, resolve
from secateur.lottery.sizing import (
    EpsRule,
    SizeEstimate,
    check_choice,
    check_delta,
    check_eps,
    check_whole,
    demands,
    signs_of_inputs,
    weight_accuracies,
)
from secateur.lottery.ticket import Ticket, TicketLayer
from secateur.progress import SILENT, Progress

FINEST = 2.0**-46
"""Relative to the largest weight, the finest accuracy the searches' float64 sums resolve."""


@dataclass(frozen=True)
class Plan:
    """How one layer's random weights are laid out.

    Attributes:
        law: of both factors.
        size: neurons in each pool at first.
        tolerance: largest |demand - sum| a half may be left with.
        bits: intervals k of the decomposition (0 where there are none).
        per_weight: one pool per (output, column) instead of one per column.
        products: products per subset (subset-sum constructions).
        copies, carried: see ``TicketLayer``.
    """

    law: Law
    size: int
    tolerance: float
    bits: int = 0
    per_weight: bool = False
    products: int = 0
    copies: int = 1
    carried: int = 0


@dataclass(frozen=True)
class Found:
    """Edges of some pools: indices into the pools searched, output offsets, neurons; what is left."""

    pool: Ints
    output: Ints
    neuron: Ints
    residual: Floats
    empty: Ints


@dataclass(frozen=True)
class Task:
    """One layer to be found."""

    number: int
    layer: Layer
    rises: Tensor
    falls: Tensor
    weight_eps: float

    @cached_property
    def tolerance(self) -> float:
        """What each half may be off by, so that both together stay within ``weight_eps``."""
        both = bool((self.rises & self.falls).any())
        return self.weight_eps / (1 + self.layer.inner_slope * both)

    @cached_property
    def halves(self) -> list[tuple[int, NDArray[np.float64]]]:
        """See ``sizing.demands``."""
        return demands(self.layer, self.rises, self.falls)

    def demands(self, plan: Plan) -> list[tuple[int, NDArray[np.float64]]]:
        """``halves``, or the whole matrix where copies carry the input with its sign."""
        return [(1, self.layer.matrix.numpy())] if plan.carried else self.halves

    @cached_property
    def w_max(self) -> float:
        """Largest sum any half has to reach."""
        return max((float(np.abs(matrix).max()) for _, matrix in self.halves), default=0.0)


@dataclass(frozen=True, kw_only=True)
class Construction(ABC):
    """Options every construction takes.

    Attributes:
        eps: sup error wanted on the domain (max-norm over outputs), or None with ``weight_eps``.
        weight_eps: error allowed for every single weight, instead of ``eps``.
        delta: probability with which the first pools may turn out too small.
        eps_rule: how ``eps`` becomes weight errors: ``box`` (interval certificate in the worst
            case), ``theorem`` (closed form), ``actual`` (``box``, then looser as long as the real
            certificate still allows).
        on_failure: ``raise`` if pools stay too small after growing, or ``accept`` the best found.
        growth: how often a failing pool may be enlarged.
        engine: ``auto``, ``compiled`` (numba), ``torch`` or ``cuda``.
        memory_limit: bytes. draw_limit: random numbers the search may draw.
    """

    name: ClassVar[str] = ""
    eps: float | None = None
    weight_eps: float | None = None
    delta: float = 0.05
    eps_rule: EpsRule = "box"
    on_failure: Literal["raise", "accept"] = "raise"
    growth: int = 4
    engine: str = "auto"
    memory_limit: int = 4_000_000_000
    draw_limit: int = 10**12

    def __post_init__(self) -> None:
        if (self.eps is None) == (self.weight_eps is None):
            raise UsageError(
                "give either the sup error or the weight error",
                field="eps",
                value=self.eps,
                fix="eps=0.1, or weight_eps=0.01",
            )
        if self.eps is not None:
            check_eps(self.eps, "eps")
        if self.weight_eps is not None:
            check_eps(self.weight_eps, "weight_eps")
        check_delta(self.delta)
        check_choice("eps_rule", self.eps_rule, get_args(EpsRule))
        check_choice("on_failure", self.on_failure, ("raise", "accept"))
        check_choice("engine", self.engine, get_args(Engine))
        check_whole("growth", self.growth, 0)
        check_whole("memory_limit", self.memory_limit, 1)
        check_whole("draw_limit", self.draw_limit, 1)

    @abstractmethod
    def plan(self, task: Task, tasks: list[Task], plans: list[Plan]) -> Plan:
        """Lay out one layer, given all layers and the plans of those before it."""

    @abstractmethod
    def search(
        self, pools: Pools, plan: Plan, sign: int, demand: Floats, engine: str, attempt: int
    ) -> Found:
        """Pick neurons for ``demand`` (P, O) from ``pools``."""

    def grow(self, sizes: Ints) -> Ints:
        """Larger pools, for those that failed."""
        return 2 * sizes

    @property
    def attempts(self) -> int:
        """How often pools are searched before it counts as a failure."""
        return self.growth + 1

    def draws(self, task: Task, plan: Plan) -> int:
        """Random numbers the search of one layer may draw (an upper bound)."""
        outputs, columns = task.layer.matrix.shape
        pools = outputs * columns if plan.per_weight else columns
        fed = 1 if plan.per_weight else outputs * plan.copies
        return plan.size * pools * (len(task.halves) + fed)

    def estimate(
        self, model: nn.Module | TargetNetwork, domain: Box | str | tuple[Any, Any] = (0, 1)
    ) -> SizeEstimate:
        """The size of everything, before anything is drawn."""
        target = read_target(model)
        return self._estimate(self._tasks(target, Box.of(domain, target.input_shape)))

    def fit(
        self,
        model: nn.Module | TargetNetwork,
        domain: Box | str | tuple[Any, Any] = (0, 1),
        *,
        seed: int = 0,
        progress: Progress = SILENT,
    ) -> Ticket:
        """Find the ticket.

        Args:
            model: a chain of Linear/Conv2d and (leaky) ReLU, or a ``TargetNetwork``.
            domain: box of inputs, e.g. ``(0, 1)`` for pixels.
            seed: of the random network; unsigned 64 bits.
            progress: told about layers, and about every pool that had to grow.

        Raises:
            UsageError: bad options, unsupported layers, a search that would not fit in memory.
            SecateurError: pools still too small after ``growth`` enlargements.
        """
        target = read_target(model)
        box, seed = Box.of(domain, target.input_shape), check_seed(seed)
        tasks = self._tasks(target, box)
        ticket = self._fit(target, box, seed, tasks, progress)
        for _ in range(3 if self.eps is not None and self.eps_rule == "actual" else 0):
            bound = float(propagate(ticket.fold(), box).error.max())
            if bound <= 0 or self.eps is None or self.eps / bound < 1.25:
                break
            looser = [replace(t, weight_eps=t.weight_eps * 0.9 * self.eps / bound) for t in tasks]
            progress.note(f"certificate {bound:.3g} is below eps {self.eps:.3g}: looser weights")
            attempt = self._fit(target, box, seed, looser, progress)
            if float(propagate(attempt.fold(), box).error.max()) > self.eps:
                break
            tasks, ticket = looser, attempt
        return ticket if self.eps is None else self._held(ticket, self.eps, tasks, progress)

    def _held(self, ticket: Ticket, eps: float, tasks: list[Task], progress: Progress) -> Ticket:
        """A ticket whose interval certificate is within eps; refitted with finer weights if not.

        Copies reach further than the sizing assumes, and the closed form bounds another norm.
        """
        for attempt in range(7):
            bound = float(propagate(ticket.fold(), ticket.box).error.max())
            if bound <= eps * (1 + 1e-9):
                return ticket
            # Weights that were accepted as too far off do not come nearer by asking for more.
            if attempt == 6 or any(r["failed_weights"] for r in ticket.history["layers"]):
                break
            progress.note(f"certificate {bound:.3g} is above eps {eps:.3g}: finer weights")
            tasks = [replace(t, weight_eps=t.weight_eps * 0.8 * eps / bound) for t in tasks]
            ticket = self._fit(ticket.target, ticket.box, ticket.seed, tasks, progress)
        if self.on_failure == "raise":
            raise SecateurError("the certificate exceeds eps", fix="a larger epsilon")
        progress.note(f"certificate {bound:.3g} exceeds eps {eps:.3g}; accepted")
        return ticket

    def options(self) -> dict[str, Any]:
        """Name and options, for the ticket's file."""
        hidden = ("engine", "memory_limit", "draw_limit")
        return {"name": self.name} | {k: v for k, v in asdict(self).items() if k not in hidden}

    def _tasks(self, target: TargetNetwork, box: Box) -> list[Task]:
        if self.weight_eps is not None:
            accuracies: tuple[float, ...] = (self.weight_eps,) * len(target.layers)
        else:
            assert self.eps is not None
            accuracies = weight_accuracies(target, box, self.eps, self.eps_rule)
        signs = signs_of_inputs(target, box)
        tasks = [
            Task(number, layer, rises, falls, accuracy)
            for number, (layer, (rises, falls), accuracy) in enumerate(
                zip(target.layers, signs, accuracies, strict=True)
            )
        ]
        for task in tasks:
            if task.weight_eps < FINEST * task.w_max:
                raise UsageError(
                    f"layer {task.number} would need weights within {task.weight_eps:.1e}, finer "
                    f"than float64 sums of its weights (up to {task.w_max:.3g}) resolve",
                    field="eps" if self.eps is not None else "weight_eps",
                    value=self.eps if self.eps is not None else self.weight_eps,
                    fix="a larger epsilon",
                )
        return tasks

    def _plans(self, tasks: list[Task]) -> list[Plan]:
        plans: list[Plan] = []
        for task in tasks:
            plans.append(self.plan(task, tasks, plans))
        return plans

    def _estimate(self, tasks: list[Task]) -> SizeEstimate:
        plans = self._plans(tasks)
        neurons = random = draws = memory = 0
        for task, plan in zip(tasks, plans, strict=True):
            outputs, columns = task.layer.matrix.shape
            pools = outputs * columns if plan.per_weight else columns
            rows, wide = outputs * plan.copies, plan.carried * columns
            fresh = plan.size * (pools if not plan.carried else int(task.layer.bias))
            neurons += fresh + (rows if plan.copies > 1 else 0)
            random += fresh * (columns if not plan.carried else wide + 1) + rows * (fresh + wide)
            draws += self.draws(task, plan)
            slots = max(plan.bits, plan.products, 1)
            memory += rows * columns * len(task.halves) * (12 * slots + 64)
        sizes, bits = tuple(p.size for p in plans), tuple(p.bits for p in plans)
        accuracy = tuple(t.weight_eps for t in tasks)
        return SizeEstimate(neurons, random, draws, memory, sizes, bits, accuracy)

    def _fit(
        self, target: TargetNetwork, box: Box, seed: int, tasks: list[Task], progress: Progress
    ) -> Ticket:
        self._estimate(tasks).check(self.memory_limit, self.draw_limit)
        engine, started = resolve(self.engine), time.perf_counter()
        layers, history = [], []
        with progress.stage(f"{self.name} ticket", total=len(tasks), unit="layers") as advance:
            for task, plan in zip(tasks, self._plans(tasks), strict=True):
                layer, record = self._fit_layer(task, plan, seed, engine, progress)
                layers.append(layer)
                history.append(record)
                advance(1)
        return Ticket(
            target,
            box,
            seed,
            tuple(layers),
            self.options(),
            tuple(task.weight_eps for task in tasks),
            self.eps,
            {"engine": engine, "seconds": time.perf_counter() - started, "layers": history},
        )

    def _fit_layer(
        self, task: Task, plan: Plan, seed: int, engine: str, progress: Progress
    ) -> tuple[TicketLayer, dict[str, Any]]:
        pools = layout(task, plan, seed)
        todo = np.arange(len(pools.ids))
        kept: list[NDArray[np.int64]] = []
        record: dict[str, Any] = {"empty_slots": 0, "grown_pools": 0, "failed_weights": 0}
        for attempt in range(self.attempts):
            failed = np.zeros(len(pools.ids), bool)
            short = empty = 0
            for sign, matrix in task.demands(plan):
                demand = arrange(matrix.repeat(plan.copies, axis=0), plan)[todo]
                found = self.search(pools.take(todo), plan, sign, demand, engine, attempt)
                misses = found.residual > plan.tolerance
                failed[todo[misses.any(axis=1)]] = True
                short, empty = short + int(misses.sum()), empty + int(found.empty.sum())
                chosen = todo[found.pool]
                output = pools.first_out[chosen] + found.output
                kept.append(np.stack([chosen, output, pools.columns[chosen], found.neuron]))
            record["empty_slots"] += empty
            # Copies of an input are as many as the layer before has.
            if not failed.any() or attempt == self.attempts - 1 or pools.carried[failed].any():
                break
            todo = failed.nonzero()[0]
            record["grown_pools"] += len(todo)
            progress.note(
                f"layer {task.number}: {short} weights not met ({empty} empty slots); "
                f"enlarging {len(todo)} of {len(pools.ids)} pools"
            )
            pools.sizes[todo] = self.grow(pools.sizes[todo])
            kept = [edges[:, ~failed[edges[0]]] for edges in kept]
        if failed.any():
            record["failed_weights"] = short
            self._report_failure(task, short, attempt, progress)
        return self._layer(plan, pools, np.concatenate(kept, axis=1) if kept else None), record

    def _report_failure(self, task: Task, short: int, grown: int, progress: Progress) -> None:
        message = (
            f"layer {task.number}: {short} weights are further than {task.weight_eps:.3g} from their "
            f"target after {grown} enlargements of their pools"
        )
        if self.on_failure == "raise":
            raise SecateurError(
                message,
                fix="another seed, a larger epsilon, more growth, or on_failure='accept' "
                "(the certificate then says what the error is)",
            )
        progress.note(message + "; accepted")

    @staticmethod
    def _layer(plan: Plan, pools: Pools, edges: NDArray[np.int64] | None) -> TicketLayer:
        edges = np.zeros((4, 0), np.int64) if edges is None else edges
        _, output, column, neuron = edges[:, np.lexsort((edges[3], edges[2], edges[1]))]
        sizes = np.where(pools.carried, 0, pools.sizes)
        return TicketLayer(
            plan.law,
            plan.per_weight,
            sizes,
            output.copy(),
            column.copy(),
            neuron.copy(),
            plan.copies,
            plan.carried,
        )


def read_target(model: nn.Module | TargetNetwork) -> TargetNetwork:
    """A target from either kind of argument."""
    return model if isinstance(model, TargetNetwork) else from_module(model)


def layout(task: Task, plan: Plan, seed: int) -> Pools:
    """The pools of one layer, in the order of ``arrange``."""
    outputs, columns = task.layer.matrix.shape
    count = outputs * columns if plan.per_weight else columns
    ids = np.arange(count)
    carried = np.zeros(count, bool)
    sizes = np.full(count, plan.size)
    if plan.carried:
        carried[: columns - task.layer.bias] = True
        sizes[carried] = plan.carried
    return Pools(
        seed,
        task.number,
        plan.law,
        ids,
        ids % columns,
        ids // columns if plan.per_weight else np.zeros(count, np.int64),
        sizes,
        carried,
    )


def arrange(matrix: NDArray[np.float64], plan: Plan) -> NDArray[np.float64]:
    """(outputs, columns) demands as (pools, outputs fed by each)."""
    return matrix.reshape(-1, 1) if plan.per_weight else np.ascontiguousarray(matrix.T)


def union_size(slots: int, delta: float, chance: float) -> int:
    """``ceil(ln(S / delta) / c)`` neurons: every one of S slots of chance c is filled."""
    return math.ceil(math.log(slots / delta) / chance)
