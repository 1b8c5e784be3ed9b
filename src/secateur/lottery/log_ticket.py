"""Logarithmic Pruning as a program: every weight bit by bit from hyperbolic random products.

Orseau, Hutter, Rivasplata, "Logarithmic Pruning is All You Need" (NeurIPS 2020, arXiv
2006.12156). No code was ever published; decomposition, sampling and constants here are our own
re-derivation (docs/lottery.md).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import numpy as np

from secateur.errors import UsageError
from secateur.lottery import exclusive
from secateur.lottery.construction import Construction, Found, Plan, Task, union_size
from secateur.lottery.decomposition import bits_needed, ratio, slot_probability
from secateur.lottery.laws import KINDS, Law, LawKind
from secateur.lottery.search import Floats, Ints, Pools, bitwise
from secateur.lottery.sizing import batch_size, check_choice, check_whole

PoolKind = Literal["shared", "independent", "batch", "matching"]


@dataclass(frozen=True, kw_only=True)
class LogTicket(Construction):
    """Golden-ratio decomposition over random products (see ``decomposition``).

    Attributes:
        base: ``golden`` (1.618) or ``3/2`` (the paper's); any number between 1 and 1.618.
        pools: ``shared``: one pool per input, every neuron may serve all outputs;
            ``independent``: one pool per weight; ``batch``: one pool per input, every neuron serves
            one slot, first come first served; ``matching``: the same by maximum matching, and only
            for the bits that are needed.
        law: ``hyperbolic``; ``uniform`` and ``normal`` show why it has to be (they need
            about 1/epsilon neurons).
        refine: candidates kept per bit (1: the plain greedy rule); more than one are swapped to
            bring the error below what was asked for, at no cost in size.
    """

    name: ClassVar[str] = "log"
    base: str | float = "golden"
    pools: PoolKind = "shared"
    law: LawKind = "hyperbolic"
    refine: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        ratio(self.base)
        check_choice("pools", self.pools, get_args(PoolKind))
        check_choice("law", self.law, KINDS)
        check_whole("refine", self.refine, 1, 64)
        if self.law != "hyperbolic" and self.pools in ("batch", "matching"):
            raise UsageError(
                "only shared and independent pools are sized for this law",
                field="law",
                value=self.law,
                fix="pools='shared'",
            )

    def plan(self, task: Task, tasks: list[Task], plans: list[Plan]) -> Plan:
        """Pools by the union bound over all slots of all layers; see docs/lottery.md."""
        gamma, w_max = ratio(self.base), task.w_max
        bits = self._bits(task)
        law = self._law(bits, w_max or 1.0)
        total = sum(self._slots(other) for other in tasks)
        share = self.delta * self._slots(task) / max(total, 1)
        columns = task.layer.matrix.shape[1]
        if w_max == 0:
            size = 0
        elif self.pools in ("shared", "independent"):
            size = union_size(total, self.delta, self._chance(bits, gamma))
        else:
            slots = math.ceil(self._slots(task) / columns)
            size = batch_size(slots, bits, share / columns)
            if self.pools == "matching":  # only the bits greedy takes; grown until it suffices
                size = math.ceil(size / 8)
        return Plan(law, size, task.tolerance, bits, self.pools == "independent")

    def search(
        self, pools: Pools, plan: Plan, sign: int, demand: Floats, engine: str, attempt: int
    ) -> Found:
        """See ``search.bitwise`` and ``exclusive``."""
        edges = interval_ends(plan, ratio(self.base))
        if self.pools in ("batch", "matching"):
            picks = exclusive.bitwise(pools, sign, demand, edges, self.pools, engine)
        else:
            picks = bitwise(pools, sign, demand, edges, self.refine, engine)
        pool, output, slot = (picks.neurons >= 0).nonzero()
        neuron = picks.neurons[pool, output, slot].astype(np.int64)
        return Found(pool, output, neuron, picks.residual, picks.empty)

    def grow(self, sizes: Ints) -> Ints:
        """Matching grows gently: its first size is a guess, not a bound."""
        return np.ceil(sizes * 1.25).astype(np.int64) if self.pools == "matching" else 2 * sizes

    @property
    def attempts(self) -> int:
        """Matching starts small on purpose, so growing is its normal course."""
        return super().attempts + (12 if self.pools == "matching" else 0)

    def _bits(self, task: Task) -> int:
        return bits_needed(max(task.w_max, 1e-300), task.tolerance, ratio(self.base))

    def _slots(self, task: Task) -> int:
        outputs = task.layer.matrix.shape[0]
        halves = int(task.rises.sum() + task.falls.sum())
        return self._bits(task) * outputs * halves if task.w_max else 0

    def _law(self, bits: int, w_max: float) -> Law:
        span = bits * math.log(1 / ratio(self.base)) if self.law == "hyperbolic" else 0.0
        return Law(self.law, math.sqrt(w_max), span)

    def _chance(self, bits: int, gamma: float) -> float:
        """Least probability that one neuron fills one slot."""
        if self.law == "hyperbolic":
            return slot_probability(bits)
        return float(product_probabilities(self._law(bits, 1.0), gamma, bits).min()) / 4


def interval_ends(plan: Plan, gamma: float) -> Floats:
    """``w_max gamma^i``, i = 0..k, from the law's scale."""
    return np.asarray(plan.law.scale**2 * gamma ** np.arange(plan.bits + 1), np.float64)


def product_probabilities(law: Law, gamma: float, bits: int) -> Floats:
    """P(|ab| falls into interval i) for a law without a closed form, by quadrature."""
    import torch

    grid = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    size = law.magnitude(grid).numpy() * law.scale
    ends = law.scale**2 * gamma ** np.arange(bits + 1)
    below = np.stack([np.searchsorted(size, end / size) / size.size for end in ends]).mean(axis=1)
    return np.asarray(np.maximum(below[:-1] - below[1:], 1e-12))
