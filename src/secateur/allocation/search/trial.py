"""Plans from the whole numbers a search moves in, and the trial an allocator is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from secateur.allocation.base import Allocator, Problem
from secateur.allocation.plan import Plan
from secateur.allocation.search.engine import Outcome, Payload
from secateur.errors import UsageError
from secateur.masks.target import Target


def plan_of_counts(counts: Payload, shapes: Mapping[str, tuple[int, int]], target: Target) -> Plan:
    """The plan that removes ``counts[i]`` weights from the i-th matrix of ``shapes``.

    With an N:M target counts are those of patterns of the same M.
    """
    named = dict(zip(shapes, counts, strict=True))
    if target.group is None:
        return Plan(target, dict(shapes), named)
    group = target.group
    patterns = {
        name: (group - named[name] * group // (rows * columns), group)
        for name, (rows, columns) in shapes.items()
    }
    return Plan(target, dict(shapes), named, patterns=patterns)


def require_trial(allocator: Allocator, problem: Problem) -> Callable[[Plan], float]:
    """The problem's trial.

    Raises:
        UsageError: there is none (a dry run, or no text to try plans on).
    """
    if problem.trial is None:
        raise UsageError(
            f"allocator '{allocator.name}' tries plans on text, and here there is none",
            field="allocation",
            value=allocator.name,
            fix="give the option it would search, or run it with a model and a tokenizer",
        )
    return problem.trial


def one_rung(
    trial: Callable[[Plan], float], shapes: Mapping[str, tuple[int, int]], target: Target
) -> Callable[[Payload, int], Outcome]:
    """A trial as the evaluator of a search with a single rung."""
    return lambda counts, rung: (trial(plan_of_counts(counts, shapes, target)), 1.0)
