"""DSA as an allocator: a function of the blocks' scores, given, published, found or searched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, cast

from secateur.allocation.base import Allocator, Problem, make_plan_of
from secateur.allocation.dsa.expression import Expression
from secateur.allocation.dsa.function import phi
from secateur.allocation.dsa.presets import PRESETS, find_preset
from secateur.allocation.dsa.reference import reference_phi, reference_ratios
from secateur.allocation.mapping import around_mean, width_of
from secateur.allocation.owl import checked_lambda, note_if_constant, scores_reading, summaries
from secateur.allocation.plan import Plan
from secateur.allocation.search.engine import Evolution, SearchSettings, trace
from secateur.allocation.search.executors import Serial
from secateur.allocation.search.spaces import FunctionSpace
from secateur.allocation.search.trial import one_rung, require_trial
from secateur.errors import UsageError
from secateur.evidence.readings import Reading
from secateur.evidence.score_summary import ScoreSummary, Values

Scores = Literal["wanda", "magnitude", "method"]
DEFAULT = "paper"
LAMBDA = 0.08
SEEDS = {name: Expression.parse(PRESETS[name]) for name in ("uniform", "owl", "paper", "released")}
"""Where a search starts, so that it never ends worse than uniform or OWL."""


@dataclass(frozen=True)
class DSA(Allocator):
    """s_l = S + 2 lambda (m_l - mean m), m the min-max scaled phi_l = post(reduce(pre(A_l))).

    Li, Dong et al., "Discovering Sparsity Allocation for Layer-wise Pruning of Large Language
    Models", NeurIPS 2024. A_l are the scores of all of a block's matrices, and the function phi
    is searched once and used again: by default the one printed in the paper. The mean over
    blocks is weighted by their sizes. A function that is not finite for some block is refused.

    Attributes:
        preset: ``paper``, ``released``, ``owl``, ``uniform``, or the found.json of a search.
        expression: a function as text, ``W:(PRE)-(REDUCE)-(POST)``, instead of a preset.
        lam: half the range of the ratios; null: what the function says, or 0.08.
        search: plans tried in searching a function on this model first; 0: none.
        seed: of that search.
        scores: ``wanda``; ``magnitude``, which needs no data; ``method``: of the run's own
            method, whose outliers are then counted from the histogram. null: those a found
            function was found on, or ``wanda``.
        compat: ``reference`` repeats the released code: values that are not finite become 0
            or -1, plain means, lambda 0.08 whatever the text says.
    """

    name = "dsa"
    summary = "a searched function of each block's scores"
    paper = "Li, Dong et al. 2024, DSA, NeurIPS 2024"
    searches = True

    preset: str | None = None
    expression: str | None = None
    lam: float | None = None
    search: int = 0
    seed: int = 0
    scores: Scores | None = None
    compat: Literal["", "reference"] = ""

    def __post_init__(self) -> None:
        if self.lam is not None:
            checked_lambda(self.lam)
        if self.preset is not None and self.expression is not None:
            raise UsageError(
                "the function is given twice",
                field="expression",
                value=self.expression,
                fix="drop preset or expression",
            )
        if self.search < 0:
            raise UsageError("a number of plans is not negative", field="search", value=self.search)
        if self.search and (self.preset or self.expression):
            raise UsageError(
                "a function is given, so there is nothing to search",
                field="search",
                value=self.search,
                fix="drop search, or preset and expression",
            )
        self._given()  # what does not parse is refused now, not in the middle of a run

    @property
    def tries(self) -> bool:
        """See ``Allocator.tries``."""
        return self.search > 0

    def _given(self) -> tuple[Expression, str | None]:
        if self.expression is not None:
            return Expression.parse(self.expression), None
        return find_preset(self.preset or DEFAULT)

    @property
    def function(self) -> Expression:
        """The function given, or the default."""
        return self._given()[0]

    @property
    def kind_of_scores(self) -> Scores:
        """``scores``, or those a found function was found on, or Wanda's."""
        return self.scores or cast(Scores, self._given()[1] or "wanda")

    def readings(self) -> tuple[Reading, ...]:
        """See ``Allocator.readings``."""
        kind = self.kind_of_scores
        if kind == "method":
            return ()
        multiple = None if self.search else self.function.parameter
        return (scores_reading(kind, *(() if multiple is None else (multiple,))),)

    def blocks(self, problem: Problem) -> list[ScoreSummary]:
        """The summary of every block's scores."""
        if readings := self.readings():
            return summaries(problem.read(readings[0]))
        if problem.scores is None:
            raise UsageError(
                "there is no method whose scores could be read", field="scores", value="method"
            )
        return summarise_stream(problem)

    def wishes(self, problem: Problem) -> dict[str, float]:
        """See ``Allocator.wishes``: of the function given."""
        return self.wishes_of(self.function, self.blocks(problem), problem)

    def wishes_of(
        self, function: Expression, blocks: Sequence[ScoreSummary], problem: Problem
    ) -> dict[str, float]:
        """Ratios by ``function``, whose lambda yields to the ``lam`` given."""
        reference = self.compat == "reference"
        values = (reference_phi if reference else phi)(function, blocks).tolist()
        _note_zeros(function, blocks, problem)
        note_if_constant(values, problem, "the function's value")
        if reference and width_of(values):
            return problem.by_block(reference_ratios(values, problem.sparsity))
        lam = LAMBDA if function.hundredths is None else function.hundredths / 100
        lam = lam if self.lam is None else self.lam
        return problem.by_block(around_mean(values, problem.block_sizes, problem.sparsity, lam))

    def plan(self, problem: Problem) -> Plan:
        """See ``Allocator.plan``."""
        if not self.search:
            return super().plan(problem)
        blocks = self.blocks(problem)
        if len(blocks) == 1:
            problem.notes.append("the model has one block: there is nothing to search")
            return make_plan_of(self, problem, problem.by_block([problem.sparsity]))
        trial = require_trial(self, problem)
        search = Evolution(
            function_space(self, problem, blocks),
            Serial(one_rung(trial, problem.shapes, problem.target)),
            settings=SearchSettings(budget=self.search, seed=self.seed),
            seeds=list(SEEDS.values()),
            progress=problem.progress,
        ).run()
        found = search.best.candidate
        problem.notes.append(
            f"{found}, the best of {len(search.history)} plans tried on the search split"
        )
        # The function's own lambda: that of uniform is 0, whatever the others may use.
        wishes = replace(self, search=0, lam=None).wishes_of(found, blocks, problem)
        plan = make_plan_of(self, problem, wishes, self.bounds(problem))
        made = {
            "space": "dsa",
            "start": search.history[0]["value"],
            "history": trace(search.history),
        }
        more = {"expression": str(found), "search": made}
        return replace(plan, provenance={**plan.provenance, **more})


def _note_zeros(function: Expression, blocks: Sequence[ScoreSummary], problem: Problem) -> None:
    """A single score of 0 makes a geometric mean 0, which no other block may have."""
    with_zeros = [i for i, b in enumerate(blocks) if b.zeros]
    if function.reduce == "GEOMETRIC_MEAN" and 0 < len(with_zeros) < len(blocks):
        problem.notes.append(
            f"{len(with_zeros)} of {len(blocks)} blocks (the first: {with_zeros[0]}) hold scores of "
            "exactly 0 (dead inputs or weights), which alone decide their geometric mean; "
            "a function without GEOMETRIC_MEAN does not have that"
        )


def summarise_stream(problem: Problem) -> list[ScoreSummary]:
    """The run's own method's scores of every block, one matrix in memory at a time."""
    assert problem.scores is not None
    place = {name: i for i, block in enumerate(problem.blocks) for name in block}
    out = [ScoreSummary() for _ in problem.blocks]
    for name, score in problem.scores():
        out[place[name]].update(score, name)
    return out


def function_space(
    allocator: Allocator, problem: Problem, blocks: Sequence[ScoreSummary]
) -> FunctionSpace:
    """The space of DSA's functions for a problem; ``allocator`` gives bounds and mode."""
    bounds = allocator.bounds(problem)
    quiet = replace(problem, notes=[])

    def to_plan(ratios: Values) -> tuple[int, ...]:
        wishes = problem.by_block(ratios.tolist())
        return tuple(make_plan_of(allocator, quiet, wishes, bounds).counts.values())

    space = FunctionSpace(blocks, problem.block_sizes, problem.sparsity, to_plan)
    lam: float | None = getattr(allocator, "lam", None)
    if lam is None:
        return space
    return replace(space, lambdas=(whole_hundredths(lam),))


def whole_hundredths(lam: float) -> int:
    """Lambda as a search writes it into its functions.

    Raises:
        UsageError: it lies between two hundredths.
    """
    if abs(100 * lam - round(100 * lam)) > 1e-9:
        near = round(100 * lam) / 100
        raise UsageError(
            "a search takes lambda in whole hundredths", field="lam", value=lam, fix=f"e.g. {near}"
        )
    return round(100 * lam)
