"""What an allocator is: wished ratios for every matrix, and what it reads to give them.

Its core is a pure function. What the whole must lose is met afterwards, exactly, by
``projection``. Writing one takes a dozen lines::

    @dataclass(frozen=True)
    class MyAllocator(Allocator):
        name = "mine"
        summary = "later blocks give more"

        slope: float = 0.1

        def wishes(self, problem):
            n = len(problem.blocks)
            return problem.by_block([problem.sparsity + self.slope * i / n for i in range(n)])
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

from pydantic import ConfigDict
from torch import Tensor

from secateur.allocation.plan import Plan
from secateur.allocation.projection import Mode, project, round_to_units
from secateur.errors import UsageError
from secateur.evidence.readings import Reading
from secateur.masks.target import Target
from secateur.options import build
from secateur.progress import SILENT, Progress

Stream = Callable[[], Iterator[tuple[str, Tensor]]]
"""(name, (d_out, d_in) float32) of every matrix in the model's order, one in memory at a time."""


@dataclass(frozen=True)
class Problem:
    """What is to be shared out, and what is known about those who share it.

    Attributes:
        target: what was asked of the whole.
        shapes: (d_out, d_in) of every matrix, in the model's order.
        blocks: names of each block's matrices; blocks with none are left out.
        roles: q k v o gate up down ... of each matrix, "" if not known.
        readings: what ``Allocator.readings`` asked for -> one record per block of ``blocks``.
        weights: the dense weights, streamed; None without a model.
        scores: the run's own method's dense scores, streamed; None unless
            ``Allocator.ranks_scores``.
        trial: how bad the model is under a plan (lower is better), on a search split that is
            never evaluated on; None unless ``Allocator.searches``.
        notes: plain words for the report: fallbacks, warnings. Append to it.
        progress: where a search shows how far it is.
    """

    target: Target
    shapes: dict[str, tuple[int, int]]
    blocks: tuple[tuple[str, ...], ...]
    roles: dict[str, str] = field(default_factory=dict)
    readings: Mapping[Reading, Sequence[dict[str, Tensor]]] = field(default_factory=dict)
    weights: Stream | None = None
    scores: Stream | None = None
    trial: Callable[[Plan], float] | None = None
    notes: list[str] = field(default_factory=list)
    progress: Progress = SILENT

    @property
    def sparsity(self) -> float:
        """S, the share of all weights that goes."""
        return self.target.sparsity

    @property
    def sizes(self) -> dict[str, int]:
        """Weights in each matrix."""
        return {name: rows * columns for name, (rows, columns) in self.shapes.items()}

    @property
    def block_sizes(self) -> list[int]:
        """Weights in each block's matrices together."""
        sizes = self.sizes
        return [sum(sizes[name] for name in block) for block in self.blocks]

    def read(self, reading: Reading) -> Sequence[dict[str, Tensor]]:
        """One record per block of a reading that was asked for.

        Raises:
            ValueError: it was not gathered (the allocator forgot to ask for it).
        """
        if reading not in self.readings:
            raise ValueError(f"the reading {reading} was not gathered")
        return self.readings[reading]

    def by_block(self, values: Sequence[float]) -> dict[str, float]:
        """The same value for all matrices of a block."""
        return {
            name: value for block, value in zip(self.blocks, values, strict=True) for name in block
        }


@dataclass(frozen=True)
class Allocator(ABC):
    """Says how much of each matrix should go; subclasses are frozen dataclasses.

    Attributes:
        min_sparsity, max_sparsity: bounds of every matrix's ratio. By default nothing is
            below 0, and no matrix keeps less than a tenth of what the average one keeps.
    """

    name: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    mode: ClassVar[Mode] = "shift"
    """How wishes are moved to the budget; see ``projection.project``."""
    ranks_weights: ClassVar[bool] = False
    """Streams the weights themselves, beside or instead of readings."""
    ranks_scores: ClassVar[bool] = False
    """Needs the scores of the run's own method."""
    searches: ClassVar[bool] = False
    """Can try plans on the model: ``problem.trial`` is there."""
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(arbitrary_types_allowed=True)

    min_sparsity: float | None = field(default=None, kw_only=True)
    max_sparsity: float | None = field(default=None, kw_only=True)

    def readings(self) -> tuple[Reading, ...]:
        """What is to be read off every block of the dense model."""
        return ()

    @property
    def tries(self) -> bool:
        """Whether, with these options, it tries plans on the model."""
        return self.searches

    @abstractmethod
    def wishes(self, problem: Problem) -> dict[str, float]:
        """Sparsity of each matrix before the budget is met; any finite numbers.

        Only their pattern matters: the plan's mean is the target's whatever theirs is.
        """

    def bounds(self, problem: Problem) -> tuple[float, float]:
        """Lowest and highest ratio of a matrix."""
        low = 0.0 if self.min_sparsity is None else self.min_sparsity
        high = 1 - (1 - problem.sparsity) / 10
        return low, high if self.max_sparsity is None else self.max_sparsity

    def refuse_bounds(self, problem: Problem) -> None:
        """Stop before anything is read where the target lies outside the bounds.

        Raises:
            UsageError: naming the bound.
        """
        refuse_target_outside(problem.sparsity, *self.bounds(problem))

    def plan(self, problem: Problem) -> Plan:
        """The wishes, moved to the budget and rounded to whole weights or N of M.

        Raises:
            UsageError: bounds that cannot meet the target, or a pattern that does not divide.
        """
        return make_plan_of(self, problem, self.wishes(problem), self.bounds(problem))

    def provenance(self) -> dict[str, Any]:
        """Name and options that are not at their defaults."""
        options = {f.name: getattr(self, f.name) for f in fields(self)}
        changed = {f.name: options[f.name] for f in fields(self) if options[f.name] != f.default}
        return {"allocator": self.name, **({"options": changed} if changed else {})}

    @classmethod
    def with_options(cls, options: dict[str, Any]) -> Allocator:
        """Build from a recipe's options.

        Raises:
            UsageError: an unknown option, with the known ones named; or one of the wrong type.
        """
        fix = f"see 'secateur allocators' for the options of {cls.name}"
        return build(cls, options, f"allocator '{cls.name}'", fix=fix)


def refuse_target_outside(sparsity: float, low: float, high: float) -> None:
    """Stop where a target lies outside the bounds of all ratios.

    Raises:
        UsageError: naming the bound.
    """
    for field_, bound, wrong in (
        ("min_sparsity", low, low > sparsity + 1e-12 or not 0 <= low <= 1),
        ("max_sparsity", high, high < sparsity - 1e-12 or not 0 <= high <= 1),
    ):
        if wrong:
            raise UsageError(
                f"the target {sparsity:.6g} cannot be met: it must lie within the bounds, "
                "and those in [0, 1]",
                field=field_,
                value=bound,
                fix=f"min_sparsity <= {sparsity:.6g} <= max_sparsity",
            )


def make_plan_of(
    allocator: Allocator,
    problem: Problem,
    wishes: Mapping[str, float],
    bounds: tuple[float, float] = (0.0, 1.0),
    mode: Mode | None = None,
) -> Plan:
    """A plan exact to the budget from any wishes: what ``Allocator.plan`` and searches use.

    Args:
        wishes: wished sparsity of every matrix of ``problem``.
        bounds: lowest and highest ratio of a matrix.
        mode: how they are moved; default: the allocator's.
    """
    low, high = bounds
    names = list(problem.shapes)
    sizes = problem.sizes
    ratios = project(
        [wishes[n] for n in names],
        [sizes[n] for n in names],
        problem.sparsity,
        low,
        high,
        mode or allocator.mode,
    )
    plan = plan_of_ratios(
        problem.target, problem.shapes, dict(zip(names, ratios, strict=True)), bounds
    )
    return replace(plan, provenance=told_of(allocator, problem, bounds))


def told_of(allocator: Allocator, problem: Problem, bounds: tuple[float, float]) -> dict[str, Any]:
    """What a plan says of its making: allocator, options, bounds, and the problem's notes."""
    return {
        **allocator.provenance(),
        "bounds": list(bounds),
        **({"notes": list(problem.notes)} if problem.notes else {}),
    }


def pattern_limits(common: int, group: int, bounds: tuple[float, float]) -> tuple[int, int]:
    """Fewest and most of every ``group`` weights that may go within the bounds of a ratio.

    Bounds between two steps of 1 / group still leave ``common``, the target's own.
    """
    fewest = min(common, max(0, math.ceil(bounds[0] * group - 1e-9)))
    return fewest, max(common, min(group - 1, math.floor(bounds[1] * group + 1e-9)))


def plan_of_ratios(
    target: Target,
    shapes: Mapping[str, tuple[int, int]],
    ratios: Mapping[str, float],
    bounds: tuple[float, float] = (0.0, 1.0),
) -> Plan:
    """Ratios that meet the target rounded to whole weights, or to N of every M.

    With an N:M target every matrix keeps its own N (at least 1) of the same M.
    """
    names = list(shapes)
    sizes = [shapes[n][0] * shapes[n][1] for n in names]
    wished = [ratios[n] for n in names]
    budget = target.count(sum(sizes))
    if target.keep is None or target.group is None:
        counts = round_to_units(wished, [1] * len(names), sizes, budget)
        return Plan(target, dict(shapes), dict(zip(names, counts, strict=True)))
    group, common = target.group, target.group - target.keep
    for name in names:
        if shapes[name][1] % group:
            raise UsageError(
                f"'{name}' has {shapes[name][1]} inputs, which {group} does not divide",
                field="sparsity",
                value=str(target),
                fix=f"exclude '{name}', or choose a group size that divides {shapes[name][1]}",
            )
    fewest, most = pattern_limits(common, group, bounds)
    steps = round_to_units(
        wished,
        [size // group for size in sizes],
        [group] * len(names),
        budget,
        [fewest] * len(names),
        [most] * len(names),
    )
    return Plan(
        target,
        dict(shapes),
        {n: size // group * k for n, size, k in zip(names, sizes, steps, strict=True)},
        patterns={n: (group - k, group) for n, k in zip(names, steps, strict=True)},
    )
