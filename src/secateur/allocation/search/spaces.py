"""What can be searched: DSA's functions, the ratios themselves, ATP's slope.

A space turns a candidate into ratios per block and, by ``to_plan``, into a plan of whole
weights exact to the budget; two candidates with the same plan are one to the search.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random

import numpy as np

from secateur.allocation.dsa.expression import Expression
from secateur.allocation.dsa.function import phi
from secateur.allocation.dsa.operators import PARAMETER, POST, PRE, REDUCE
from secateur.allocation.mapping import around_mean, width_of
from secateur.allocation.search.engine import Payload
from secateur.errors import NumericsError
from secateur.evidence.score_summary import ScoreSummary, Values

ToPlan = Callable[[Values], Payload]
"""Ratios per block -> removed weights per matrix."""

_PRE = tuple(name for name in PRE if name != "NO_OP")
_MULTIPLES = (2.0, 3.0, 5.0, 7.0, 10.0)


@dataclass(frozen=True)
class FunctionSpace:
    """DSA's: functions of the blocks' scores, and lambda.

    Attributes:
        blocks: the scores' summaries.
        sizes: weights in each block.
        sparsity: the target.
        to_plan: see above.
        lambdas: in hundredths, those tried (the released code draws 7 to 10).
    """

    blocks: Sequence[ScoreSummary]
    sizes: Sequence[int]
    sparsity: float
    to_plan: ToPlan
    lambdas: Sequence[int] = (2, 4, 6, 8, 10)

    def draw(self, random: Random) -> Expression:
        """See ``Space.draw``."""
        pre = tuple(random.choice(_PRE) for _ in range(random.randrange(3)))
        reduce, parameter = self._reduction(random)
        post = tuple(random.choice(list(POST)) for _ in range(random.randint(1, 2)))
        return Expression(pre, reduce, post, random.choice(self.lambdas), parameter)

    def mutate(self, one: Expression, random: Random) -> Expression:
        """One part changes: an operator added, dropped or replaced, the reduction, or lambda."""
        part = random.randrange(4)
        if part == 0:
            return replace(one, pre=_edited(one.pre, _PRE, 0, random))
        if part == 1:
            reduce, parameter = self._reduction(random)
            return replace(one, reduce=reduce, parameter=parameter)
        if part == 2:
            return replace(one, post=_edited(one.post, tuple(POST), 1, random))
        return replace(one, hundredths=random.choice(self.lambdas))

    def cross(self, one: Expression, other: Expression, random: Random) -> Expression:
        """Each part from one of the two."""
        pre, reduce, post, lam = (random.choice((one, other)) for _ in range(4))
        return Expression(pre.pre, reduce.reduce, post.post, lam.hundredths, reduce.parameter)

    def ratios(self, one: Expression) -> Values | None:
        """Ratios per block; None when the function is not finite or the same for every block."""
        lam = (one.hundredths or 0) / 100
        if lam == 0:
            return np.full(len(self.blocks), self.sparsity)
        try:
            values = phi(one, self.blocks)
        except NumericsError:
            return None
        if width_of(values.tolist()) == 0:
            return None
        return np.array(around_mean(values.tolist(), self.sizes, self.sparsity, lam))

    def plan(self, one: Expression) -> Payload | None:
        """See ``Space.plan``."""
        ratios = self.ratios(one)
        return None if ratios is None else self.to_plan(ratios)

    def text(self, one: Expression) -> str:
        """See ``Space.text``."""
        return str(one)

    @staticmethod
    def _reduction(random: Random) -> tuple[str, float | None]:
        name = random.choice(list(REDUCE))
        return name, random.choice(_MULTIPLES) if name in PARAMETER else None


def _edited(
    names: tuple[str, ...], known: Sequence[str], least: int, random: Random
) -> tuple[str, ...]:
    """``names`` (at most two) with one added, dropped or replaced."""
    edits = [e for e, able in (("add", len(names) < 2), ("drop", len(names) > least)) if able]
    edit = random.choice([*edits, "replace"] if names else edits)
    place = random.randrange(len(names) + (edit == "add"))
    new = () if edit == "drop" else (random.choice(known),)
    return names[:place] + new + names[place + (edit != "add") :]


Offsets = tuple[float, ...]


@dataclass(frozen=True)
class RatioSpace:
    """The ratios themselves: no function between search and plan (as in EvoPress).

    A candidate is how far each block's ratio lies from the target.

    Attributes:
        blocks: how many.
        sparsity: the target.
        to_plan: see above; it shifts and clips to the budget.
        step: by multiples of it ratios move.
        reach: most steps up or down at the start.
    """

    blocks: int
    sparsity: float
    to_plan: ToPlan
    step: float = 0.01
    reach: int = 8

    def draw(self, random: Random) -> Offsets:
        """See ``Space.draw``."""
        steps = [random.randint(-self.reach, self.reach) for _ in range(self.blocks)]
        return _balanced([self.step * s for s in steps])

    def mutate(self, one: Offsets, random: Random) -> Offsets:
        """Some steps move from one block to another."""
        out = list(one)
        if self.blocks > 1:
            giver, taker = random.sample(range(self.blocks), 2)
            amount = self.step * random.randint(1, max(1, self.reach // 2))
            out[giver] -= amount
            out[taker] += amount
        return tuple(out)

    def cross(self, one: Offsets, other: Offsets, random: Random) -> Offsets:
        """Each block from one of the two, then balanced."""
        return _balanced([random.choice(pair) for pair in zip(one, other, strict=True)])

    def candidate(self, ratios: Values) -> Offsets:
        """The candidate of given ratios."""
        return tuple((ratios - self.sparsity).tolist())

    def ratios(self, one: Offsets) -> Values:
        """Ratios per block, before projection onto the bounds."""
        return self.sparsity + np.array(one, dtype=np.float64)

    def plan(self, one: Offsets) -> Payload | None:
        """See ``Space.plan``."""
        return self.to_plan(self.ratios(one))

    def text(self, one: Offsets) -> str:
        """See ``Space.text``."""
        return " ".join(f"{r:.3g}" for r in self.ratios(one))


def _balanced(offsets: list[float]) -> Offsets:
    """``offsets`` shifted to a mean of 0."""
    mean = sum(offsets) / len(offsets)
    return tuple(o - mean for o in offsets)


@dataclass(frozen=True)
class SlopeSpace:
    """ATP's only freedom: the difference beta between one block's ratio and the next one's.

    Attributes:
        betas: the grid.
        ratios_of: beta -> ratios per block.
        to_plan: see above.
    """

    betas: Sequence[float]
    ratios_of: Callable[[float], Values]
    to_plan: ToPlan

    def draw(self, random: Random) -> float:
        """See ``Space.draw``."""
        return random.choice(self.betas)

    def mutate(self, one: float, random: Random) -> float:
        """The next of the grid, up or down."""
        place = min(range(len(self.betas)), key=lambda i: abs(self.betas[i] - one))
        place += random.choice((-1, 1))
        return self.betas[min(max(place, 0), len(self.betas) - 1)]

    def cross(self, one: float, other: float, random: Random) -> float:
        """The grid's value nearest to the middle."""
        return min(self.betas, key=lambda b: abs(b - (one + other) / 2))

    def plan(self, one: float) -> Payload | None:
        """See ``Space.plan``."""
        return self.to_plan(self.ratios_of(one))

    def text(self, one: float) -> str:
        """See ``Space.text``."""
        return f"beta {one:g}"
