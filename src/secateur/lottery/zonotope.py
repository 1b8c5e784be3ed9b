"""A tighter certificate: affine forms for the target and for the difference, side by side.

Intervals forget that errors of different weights come from the same input, so ``|W^| E`` adds
them up as if they conspired. Here both the target's activations z and the difference d = z^ - z
are affine forms ``centre + sum_m g_m e_m``, |e_m| <= 1, over *shared* symbols: the input's
coordinates, and one new symbol per unstable ReLU. Through an unstable ReLU, z follows the DeepZ
relaxation (Singh et al. 2018) and d becomes ``theta d`` with theta in [slope, 1], because (leaky)
ReLU is monotone and 1-Lipschitz. Rounding errors go into an interval ``slack`` beside each form.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.errors import UsageError
from secateur.lottery.folded import UNIT, FoldedLayer, FoldedNetwork
from secateur.lottery.intervals import TINY, inflation, propagate, upper_product
from secateur.lottery.network import Box

LIMIT = 300_000_000
"""Largest number of generator entries (2.4 GB) a layer may need."""


@dataclass(frozen=True)
class Form:
    """``centre + generators . e + slack``: centre (*shape), generators (m, *shape), slack >= 0."""

    centre: Tensor
    generators: Tensor
    slack: Tensor

    def radius(self) -> Tensor:
        """Upper bound on |form - centre|."""
        count = self.generators.shape[0]
        return (self.generators.abs().sum(0) + self.slack) * inflation(count)

    def size(self) -> Tensor:
        """Upper bound on |form|."""
        return (self.centre.abs() + self.radius()) * inflation(2)

    def scaled(self, factor: Tensor) -> Form:
        """Elementwise product with ``factor`` (its rounding goes into the slack)."""
        rounding = 4 * UNIT * self.size() * factor.abs()
        return Form(
            self.centre * factor,
            self.generators * factor,
            (self.slack * factor.abs() + rounding) * inflation(2),
        )

    def with_symbols(self, radius: Tensor, where: Tensor) -> Form:
        """Add a new symbol of the given radius at every True of ``where``."""
        index = where.flatten().nonzero()[:, 0]
        fresh = torch.zeros(len(index), where.numel(), dtype=torch.float64)
        fresh[torch.arange(len(index)), index] = radius.flatten()[index]
        fresh = fresh.view(len(index), *where.shape)
        return Form(self.centre, torch.cat([self.generators, fresh]), self.slack)

    def padded(self, count: int) -> Form:
        """Zero generators in front of and behind the own ones, so that symbols line up."""
        gap = torch.zeros(count, *self.centre.shape, dtype=torch.float64)
        return Form(self.centre, torch.cat([self.generators, gap]), self.slack)


def zonotope_error(network: FoldedNetwork, box: Box) -> Tensor:
    """Upper bound on |stand-in - target| for every output over the box; (outputs,).

    Never looser than ``intervals.propagate``: the smaller of the two is returned.
    """
    plain = propagate(network, box)
    value, gap = _start(box)
    rectified = False
    for folded, seen in zip(network.layers, plain.layers, strict=True):
        entries = value.generators.shape[0] * seen.low.numel()
        if entries > LIMIT:
            raise UsageError(
                f"the zonotope needs {entries:,} generator entries in one layer",
                field="method",
                value="zonotope",
                fix="method='interval' has no such limit",
            )
        single_sided = (seen.low >= 0).all(0) if rectified or folded is network.layers[0] else None
        value, gap = _affine(folded, value, gap, single_sided)
        value, gap = _activate(folded.reference.slope, value, gap, folded)
        rectified = folded.reference.slope == 0
    return torch.minimum(gap.size().reshape(-1), plain.error)


def _start(box: Box) -> tuple[Form, Form]:
    centre = (box.low + box.high) / 2
    radius = torch.maximum(box.high - centre, centre - box.low) * inflation(4)
    moving = radius > 0
    still = torch.zeros_like(centre)
    value = Form(centre, torch.zeros(0, *centre.shape, dtype=torch.float64), still)
    value = value.with_symbols(radius, moving)
    slack = 4 * UNIT * centre.abs() + TINY
    value = Form(value.centre, value.generators, slack * moving)
    return value, Form(still, torch.zeros_like(value.generators), still)


def _columns(folded: FoldedLayer, form: Form, constant: float) -> Form:
    """The form in front of the matrix: (positions, columns)."""
    return Form(
        folded.columns(form.centre[None], constant)[0],
        folded.columns(form.generators, 0.0),
        folded.columns(form.slack[None], 0.0)[0],
    )


def _affine(
    folded: FoldedLayer, value: Form, gap: Form, single_sided: Tensor | None
) -> tuple[Form, Form]:
    """Target and difference after the matrix, (positions, rows).

    With A = (P + N) / 2 and H = (P - N) / 2 the stand-in's layer is ``A t + H |t|``, so the
    difference becomes ``(A - W) x + A d + H |x + d|``; H vanishes where t cannot be negative.
    """
    layer = folded.reference
    x = _columns(folded, _lift(folded, value), 1.0)
    d = _columns(folded, gap, 0.0)
    average, half = (folded.positive + folded.negative) / 2, folded.positive - folded.negative
    half = half / 2
    if single_sided is not None:
        average = torch.where(single_sided, folded.positive, average)
        half = torch.where(single_sided, 0.0, half)
    error = average - folded.intended
    reach = (x.size() + d.size()) * inflation(2)
    unsure = upper_product(half.abs(), reach)
    rounding = 8 * (error.shape[1] + 8) * UNIT
    new_gap = Form(
        x.centre @ error.T + d.centre @ average.T + unsure_centre(half, reach),
        x.generators @ error.T + d.generators @ average.T,
        upper_product(error.abs(), x.slack)
        + upper_product(average.abs(), d.slack)
        + unsure / 2 * inflation(4)
        + upper_product(folded.slack + 4 * UNIT * (average.abs() + folded.intended.abs()), reach)
        + rounding * upper_product(error.abs() + average.abs() + half.abs(), reach),
    )
    own = _plain_columns(folded, value)
    new_value = Form(
        own.centre @ layer.matrix.T,
        own.generators @ layer.matrix.T,
        upper_product(layer.matrix.abs(), own.slack + rounding * own.size()),
    )
    return new_value, new_gap


def unsure_centre(half: Tensor, reach: Tensor) -> Tensor:
    """Centre of ``H |t|`` for |t| in [0, reach]."""
    return (reach @ half.T) / 2


def _lift(folded: FoldedLayer, form: Form) -> Form:
    if not folded.carried:
        return form
    return Form(
        folded.lift(form.centre[None])[0],
        folded.lift(form.generators),
        folded.lift(form.slack[None])[0],
    )


def _plain_columns(folded: FoldedLayer, form: Form) -> Form:
    layer = folded.reference
    return Form(
        layer.columns(form.centre[None], 1.0)[0],
        layer.columns(form.generators, 0.0),
        layer.columns(form.slack[None], 0.0)[0],
    )


def _activate(slope: float, value: Form, gap: Form, folded: FoldedLayer) -> tuple[Form, Form]:
    """Both forms after the activation, back in the shape the next layer takes."""
    geometry, count = folded.reference.geometry, value.generators.shape[0]
    copies = folded.copies

    def back(form: Form, assemble: object) -> Form:
        return Form(
            assemble(form.centre[None])[0],  # type: ignore[operator]
            assemble(form.generators),  # type: ignore[operator]
            assemble(form.slack[None])[0],  # type: ignore[operator]
        )

    if slope == 1:
        return back(value, geometry.assemble), back(gap, folded.assemble)
    low, high = value.centre - value.radius(), value.centre + value.radius()
    wide_low, wide_high = (x.repeat_interleave(copies, 1) for x in (low, high))
    off = gap.size()
    on = torch.minimum(wide_low, wide_low - off) > 0
    out = torch.maximum(wide_high, wide_high + off) < 0
    new_value = _relax(slope, value, low, high)
    mixed = ~(on | out)
    # Filled in float64: two scalars in torch.where would make a float32 slope.
    middle = torch.full_like(wide_low, (1 + slope) / 2)
    middle = middle.masked_fill(on, 1.0).masked_fill(out, slope)
    symbols = new_value.generators.shape[0] - count
    new_gap = gap.scaled(middle).padded(symbols)
    new_gap = new_gap.with_symbols((1 - slope) / 2 * off * inflation(2), mixed)
    new_value = new_value.padded(new_gap.generators.shape[0] - new_value.generators.shape[0])
    return back(new_value, geometry.assemble), back(new_gap, folded.assemble)


def _relax(slope: float, value: Form, low: Tensor, high: Tensor) -> Form:
    """DeepZ: ``act(z) = lambda z + mu + mu e`` where the sign of z is open."""
    open_sign = (low < 0) & (high > 0)
    spread = torch.where(open_sign, high - low, 1.0)
    tilt = (high - slope * low) / spread
    factor = torch.where(open_sign, tilt, torch.ones_like(low).masked_fill(low < 0, slope))
    mu = torch.where(open_sign, (1 - slope) * (-low * high) / spread / 2, 0.0)
    scaled = value.scaled(factor)
    slack = scaled.slack + 16 * UNIT * (mu + torch.maximum(low.abs(), high.abs())) * open_sign
    shifted = Form(scaled.centre + mu, scaled.generators, slack)
    return shifted.with_symbols(mu * inflation(8), open_sign)
