"""From a sup error to weight errors, and from weight errors to pool sizes. Nothing is searched.

All bounds here are our own re-derivation of the ideas of Orseau, Hutter and Rivasplata (2020) and
Malach et al. (2020); the constants are ours, not the papers'. Proofs are in docs/lottery.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from secateur.errors import UsageError
from secateur.lottery.decomposition import slot_probability
from secateur.lottery.folded import FoldedNetwork, pruned_network
from secateur.lottery.intervals import propagate
from secateur.lottery.network import Box, Layer, TargetNetwork

EpsRule = Literal["theorem", "box", "actual"]


def check_eps(value: float, name: str) -> float:
    """A positive finite accuracy, or a clear refusal."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (number and math.isfinite(value) and value > 0):
        raise UsageError("an accuracy is a positive number", field=name, value=value, fix="0.01")
    return float(value)


def check_delta(value: float) -> float:
    """A failure probability strictly between 0 and 1."""
    if not (isinstance(value, int | float) and 0 < value < 1):
        raise UsageError(
            "a failure probability lies strictly between 0 and 1",
            field="delta",
            value=value,
            fix="0.05",
        )
    return float(value)


def check_whole(name: str, value: object, least: int, most: int | None = None) -> None:
    """A whole number within its range, or a clear refusal."""
    sound = isinstance(value, int) and not isinstance(value, bool) and value >= least
    if not (sound and (most is None or value <= most)):  # type: ignore[operator]
        ends = f"of {least} or more" if most is None else f"between {least} and {most}"
        raise UsageError(f"must be a whole number {ends}", field=name, value=value)


def check_choice(name: str, value: object, known: Sequence[str]) -> None:
    """One of the known words, or a clear refusal."""
    if value not in known:
        raise UsageError("no such choice", field=name, value=value, fix=", ".join(known))


def weight_accuracies(
    target: TargetNetwork, box: Box, eps: float, rule: EpsRule = "box"
) -> tuple[float, ...]:
    """The weight error each layer may have so that the sup error on the box is at most ``eps``.

    ``theorem``: the closed form (spectral norms). ``box`` (and ``actual``, which starts from it):
    the largest errors for which the interval certificate with *every* weight that wrong is still
    at most eps; shared so that each layer is responsible for the same part of eps.
    """
    check_eps(eps, "eps")
    if rule == "theorem":
        return _theorem(target, box, eps)
    check_choice("eps_rule", rule, get_args(EpsRule))
    shares = _sensitivities(target, box)
    share = [eps / (len(shares) * s) if s > 0 else math.inf for s in shares]
    low, high = 0.0, 1.0
    while worst_case(target, box, [high * s for s in share]) <= eps and high < 1e6:
        low, high = high, high * 2
    for _ in range(30):
        middle = (low + high) / 2
        if worst_case(target, box, [middle * s for s in share]) <= eps:
            low = middle
        else:
            high = middle
    return tuple(min(low * s, 1e300) for s in share)


def worst_case(target: TargetNetwork, box: Box, weight_eps: list[float]) -> float:
    """The interval certificate if every weight of layer i were off by ``weight_eps[i]``."""
    return float(propagate(_perturbed(target, weight_eps), box).error.max())


def _perturbed(target: TargetNetwork, weight_eps: list[float]) -> FoldedNetwork:
    """The target itself, every weight of layer i uncertain by ``weight_eps[i]``."""
    exact = pruned_network(target, [layer.matrix for layer in target.layers])
    uncertain = [
        replace(layer, slack=torch.full_like(layer.slack, off if math.isfinite(off) else 0.0))
        for layer, off in zip(exact.layers, weight_eps, strict=True)
    ]
    return FoldedNetwork(target, tuple(uncertain))


def _sensitivities(target: TargetNetwork, box: Box) -> list[float]:
    """Growth of the interval certificate per unit of weight error, one layer at a time."""
    result = []
    for number in range(len(target.layers)):
        probe = 1e-7 * max(float(target.layers[number].matrix.abs().max()), 1e-30)
        weight_eps = [probe if i == number else 0.0 for i in range(len(target.layers))]
        result.append(worst_case(target, box, weight_eps) / probe)
    return result


def _theorem(target: TargetNetwork, box: Box, eps: float) -> tuple[float, ...]:
    """``eps / (e L lambda_i sqrt(n_i n_(i-1)) X_(i-1) prod_(j>i) rho_j)``, dense layers only."""
    if any(layer.geometry.kernel for layer in target.layers):
        raise UsageError(
            "the closed form is stated for dense layers",
            field="eps_rule",
            value="theorem",
            fix="eps_rule='box'",
        )
    count = len(target.layers)
    norms = [float(torch.linalg.matrix_norm(layer.matrix, 2)) for layer in target.layers]
    rho = [max(1.0, norm) for norm in norms]
    reach = float(torch.maximum(box.low.abs(), box.high.abs()).norm())
    result = []
    for i, layer in enumerate(target.layers):
        outputs, columns = layer.matrix.shape
        root = math.sqrt(outputs * columns)
        with_bias = math.hypot(reach, 1.0) if layer.bias else reach
        tail = math.prod(rho[i + 1 :])
        first = eps / (math.e * count * root * max(with_bias, 1e-300) * tail)
        result.append(min(first, rho[i] / (count * root)))
        reach = norms[i] * with_bias
    return tuple(result)


def signs_of_inputs(target: TargetNetwork, box: Box) -> list[tuple[Tensor, Tensor]]:
    """Per layer and column: can the input be positive, can it be negative (over the box)."""
    seen = propagate(pruned_network(target, [x.matrix for x in target.layers]), box).layers
    return [((b.high > 0).any(0), (b.low < 0).any(0)) for b in seen]


def demands(layer: Layer, rises: Tensor, falls: Tensor) -> list[tuple[int, np.ndarray]]:
    """What each half of a layer's pools must sum to: ``(in-sign, (outputs, columns))`` pairs.

    A column that is never negative needs only neurons with a > 0. Where both halves are needed,
    a leaky slope s makes each half see the other's side, and ``t = (act(t) - act(-t)) / (1 + s)``.
    """
    shared = 1 + layer.inner_slope * (rises & falls)
    weight = layer.matrix / shared
    result = []
    for sign, needed in ((1, rises), (-1, falls)):
        if bool(needed.any()):
            result.append((sign, (sign * weight * needed).numpy()))
    return result


def slots(target: TargetNetwork, box: Box, bits: list[int]) -> int:
    """S_tot: number of (output, column, half, bit) slots a ticket may have to fill."""
    total = 0
    for layer, (rises, falls), k in zip(
        target.layers, signs_of_inputs(target, box), bits, strict=True
    ):
        total += k * layer.matrix.shape[0] * int(rises.sum() + falls.sum())
    return max(total, 1)


def batch_size(slots_of_pool: int, bits: int, delta: float) -> int:
    """Neurons that fill ``slots_of_pool`` slots, each neuron serving one, with probability 1 - delta.

    A new neuron meets one of r open slots with probability at least
    ``q_r = k p_min / 2 (1 - exp(-r / 2k))`` (given its in-weight, every slot has chance at most
    1/(2k), on average at least p_min/2, and outputs are independent). So the number drawn is at
    most a sum of geometric variables, and Janson's tail bound (2018, Thm 2.1),
    P(T >= x mu) <= exp(-q_1 mu (x - 1 - ln x)), gives the size x mu.
    """
    if slots_of_pool == 0:
        return 0
    r = np.arange(1, slots_of_pool + 1)
    met = 2 * bits * slot_probability(bits) * -np.expm1(-r / (2 * bits))
    mean = float((1 / met).sum())
    low, high = 1.0, 2.0
    while met[0] * mean * (high - 1 - math.log(high)) < math.log(1 / delta):
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        if met[0] * mean * (middle - 1 - math.log(middle)) < math.log(1 / delta):
            low = middle
        else:
            high = middle
    return math.ceil(high * mean)


@dataclass(frozen=True)
class SizeEstimate:
    """What a construction is about to build, before anything is drawn.

    Attributes:
        neurons, random: of the random network (see ``TicketSize``).
        draws: random numbers the search may have to draw (pools are streamed, never stored).
        bytes: peak memory of the search.
        pool: per layer, neurons in each pool.
        bits: per layer, intervals k (0 where the construction has none).
        weight_eps: per layer.
    """

    neurons: int
    random: int
    draws: int
    bytes: int
    pool: tuple[int, ...]
    bits: tuple[int, ...]
    weight_eps: tuple[float, ...]

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def check(self, memory_limit: int, draw_limit: int) -> None:
        """Refuse a search that would not fit or not end."""
        if self.bytes > memory_limit:
            raise UsageError(
                f"the search needs about {self.bytes / 1e9:.1f} GB, the limit is "
                f"{memory_limit / 1e9:.1f} GB",
                field="memory_limit",
                value=memory_limit,
                fix="raise memory_limit, or ask for a larger epsilon",
            )
        if self.draws > draw_limit:
            raise UsageError(
                f"the search may draw {self.draws:.3g} random numbers, the limit is {draw_limit:.3g}"
                f" ({self.neurons:.3g} random neurons)",
                field="draw_limit",
                value=draw_limit,
                fix="raise draw_limit, ask for a larger epsilon, or use LogTicket or SubsetSumTicket",
            )
