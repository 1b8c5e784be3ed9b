"""Evolution of candidates whose only cost is evaluating the plans they stand for.

The loop is DSA's (Li, Dong et al. 2024, algorithm 1): from a random share of the population
take the best few, mutate one, cross it with another, add both children, keep the best. Around
it stands what makes such a search affordable and trustworthy: plans are evaluated once however
many candidates lead to them; evaluation goes in rungs, and only the best of a
generation go on to the next (successive halving); every draw is fixed by the seed and the
generation's number, so a journal of results alone resumes a search exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, Generic, Protocol, TypeVar

from secateur.allocation.search.journal import Journal
from secateur.errors import UsageError
from secateur.progress import SILENT, Progress

G = TypeVar("G")
Payload = tuple[int, ...]
"""A rounded plan: what is evaluated and what results are remembered by."""
Job = tuple[Payload, int]
Outcome = tuple[float, float]
"""Sum and weight: a candidate's value is the sum over rungs divided by the weight over rungs."""


class Space(Protocol[G]):
    """What is searched: candidates, how they vary, and the plan each stands for."""

    def draw(self, random: Random) -> G:
        """Any candidate."""

    def mutate(self, one: G, random: Random) -> G:
        """A neighbour."""

    def cross(self, one: G, other: G, random: Random) -> G:
        """A mixture of two."""

    def plan(self, one: G) -> Payload | None:
        """The plan it stands for, rounded to whole weights; None: not valid, never evaluated."""

    def text(self, one: G) -> str:
        """For the record."""


class Executor(Protocol):
    """Evaluates jobs, one after another or many at a time."""

    def map(self, jobs: Sequence[Job]) -> Iterator[Outcome]:
        """Outcomes in the order of the jobs."""

    def close(self) -> None:
        """Let workers go."""


@dataclass(frozen=True)
class SearchSettings:
    """How a search goes.

    Attributes:
        budget: distinct plans evaluated, whatever the rung.
        population: candidates kept (the paper: 20).
        pool: share of the population drawn before the best are taken (0.9).
        top: parents are among so many best of the pool (5).
        offspring: children of one generation, which can be evaluated in parallel (2).
        eta: of a generation the best 1 in ``eta`` go on to the next rung.
        seed: fixes everything.
        attempts: proposals for one child before the space counts as exhausted.
    """

    budget: int = 100
    population: int = 20
    pool: float = 0.9
    top: int = 5
    offspring: int = 2
    eta: int = 3
    seed: int = 0
    attempts: int = 200

    def __post_init__(self) -> None:
        for name in ("budget", "population", "top", "offspring", "attempts"):
            if getattr(self, name) < 1:
                raise UsageError("must be at least 1", field=name, value=getattr(self, name))
        if not 0 < self.pool <= 1:
            raise UsageError("a share lies in (0, 1]", field="pool", value=self.pool)
        if self.eta < 2:
            raise UsageError("one in ETA goes on, so ETA >= 2", field="eta", value=self.eta)


@dataclass(eq=False)
class Member(Generic[G]):
    """A candidate with a plan of its own and what is known of its value (lower is better)."""

    number: int
    generation: int
    candidate: G
    plan: Payload
    sums: list[Outcome] = field(default_factory=list)
    full: bool = False

    @property
    def value(self) -> float:
        """Mean over the rungs evaluated; infinite if anything is not finite."""
        return self.value_at(len(self.sums) - 1)

    def value_at(self, rung: int) -> float:
        """The same after the stages up to ``rung``."""
        total = sum(s for s, _ in self.sums[: rung + 1])
        weight = sum(w for _, w in self.sums[: rung + 1])
        return total / weight if weight > 0 and math.isfinite(total) else math.inf


@dataclass
class Search(Generic[G]):
    """A finished search: ``best``, and in ``history`` every distinct plan in order."""

    best: Member[G]
    population: list[Member[G]]
    history: list[dict[str, Any]]
    invalid: int = 0
    repeated: int = 0
    exhausted: bool = False


class Evolution(Generic[G]):
    """One search.

    Args:
        space: what is searched.
        executor: evaluates plans.
        rungs: stages of an evaluation; a job (plan, i) gives the outcome of stage i alone.
        settings: how.
        seeds: candidates that enter first and are evaluated in full, so that the result is
            never worse than any of them.
        journal: results of earlier attempts, and where new ones are noted.
        progress: shows evaluations done and the best so far.
        observe: called after each generation with the search so far.
    """

    def __init__(
        self,
        space: Space[G],
        executor: Executor,
        *,
        rungs: int = 1,
        settings: SearchSettings | None = None,
        seeds: Sequence[G] = (),
        journal: Journal | None = None,
        progress: Progress = SILENT,
        observe: Callable[[Search[G]], None] | None = None,
    ) -> None:
        self.space, self.executor = space, executor
        self.settings = settings or SearchSettings()
        self.rungs, self.seeds = rungs, list(seeds)
        self.journal = Journal() if journal is None else journal
        self.progress, self.observe = progress, observe
        self.members: dict[Payload, Member[G]] = {}
        self.population: list[Member[G]] = []
        self.history: list[dict[str, Any]] = []
        self.invalid = self.repeated = 0
        self.promised: set[Payload] = set()

    def run(self) -> Search[G]:
        """Search until the budget is spent or no new plan is found.

        Raises:
            UsageError: no candidate at all is valid, or the budget is too small for the seeds.
        """
        budget = self.settings.budget
        label = "searching"
        exhausted = False
        with self.progress.stage(label, total=budget, unit="plans") as advance:
            generation = 0
            while len(self.members) < budget:
                random = Random(f"{self.settings.seed}/{generation}")
                fresh = self._first(random) if generation == 0 else self._children(random)
                batch = [
                    Member(len(self.members) + i, generation, candidate, plan)
                    for i, (candidate, plan) in enumerate(fresh)
                ][: budget - len(self.members)]
                if not batch:
                    exhausted = True
                    break
                best_before = self.population[0].value if self.population else math.inf
                self._evaluate(batch, advance)
                self._select(batch)
                if self.population and self.population[0].value < best_before:
                    best = self.population[0]
                    self.progress.note(
                        f"best {best.value:.6g} after {len(self.members)} plans: "
                        f"{self.space.text(best.candidate)}"
                    )
                if self.observe is not None and self.population:
                    self.observe(self._outcome(False))
                generation += 1
        if not self.population:
            raise UsageError(
                "no candidate is valid: none gives a finite plan",
                field="search",
                value=f"{self.invalid} tried",
                fix="check the scores, or search another space",
            )
        return self._outcome(exhausted)

    def _outcome(self, exhausted: bool) -> Search[G]:
        return Search(
            self.population[0],
            list(self.population),
            self.history,
            self.invalid,
            self.repeated,
            exhausted,
        )

    # -- proposing -----------------------------------------------------------------------------

    def _first(self, random: Random) -> list[tuple[G, Payload]]:
        """The seeds, then random candidates until the population is full."""
        fresh = self._new(iter(self.seeds))
        if len(fresh) > self.settings.budget:
            raise UsageError(
                f"the {len(fresh)} plans a search starts from are more than its budget",
                field="budget",
                value=self.settings.budget,
                fix=f"at least {len(fresh)}",
            )
        self.promised = {plan for _, plan in fresh}
        wanted = self.settings.population - len(fresh)
        drawn = (self.space.draw(random) for _ in range(self.settings.attempts * max(0, wanted)))
        return fresh + self._new(drawn, self.promised, wanted)

    def _children(self, random: Random) -> list[tuple[G, Payload]]:
        """Mutants and crossings of the best; strangers when these only repeat what is known."""
        s = self.settings

        def offered() -> Iterator[G]:
            for _ in range(s.attempts * s.offspring // 2):
                count = max(1, round(s.pool * len(self.population)))
                pool = random.sample(self.population, count)
                parents = sorted(pool, key=_rank)[: s.top]
                parent = random.choice(parents)
                yield self.space.mutate(parent.candidate, random)
                others = [p for p in parents if p is not parent]
                if others:
                    other = random.choice(others)
                    yield self.space.cross(parent.candidate, other.candidate, random)
            for _ in range(s.attempts):
                yield self.space.draw(random)

        return self._new(offered(), wanted=s.offspring)

    def _new(
        self, candidates: Iterable[G], known: Iterable[Payload] = (), wanted: int | None = None
    ) -> list[tuple[G, Payload]]:
        """Valid candidates whose plan nobody has had, at most ``wanted``."""
        taken = set(known)
        out: list[tuple[G, Payload]] = []
        for candidate in candidates:
            if wanted is not None and len(out) >= wanted:
                break
            plan = self.space.plan(candidate)
            if plan is None:
                self.invalid += 1
            elif plan in taken or plan in self.members:
                self.repeated += 1
            else:
                taken.add(plan)
                out.append((candidate, plan))
        return out

    # -- evaluating ----------------------------------------------------------------------------

    def _evaluate(self, batch: list[Member[G]], advance: Callable[[float], None]) -> None:
        going = batch
        for rung in range(self.rungs):
            outcomes = self._outcomes([(member.plan, rung) for member in going])
            for member, outcome in zip(going, outcomes, strict=True):
                member.sums.append(outcome)
                if rung == 0:
                    self.members[member.plan] = member
                    advance(1)
            if rung + 1 < self.rungs:
                going = self._promoted(going, rung)
        for member in going:
            member.full = True
        for member in batch:
            self.history.append(self._record(member))

    def _promoted(self, going: list[Member[G]], rung: int) -> list[Member[G]]:
        """Seeds, and the best 1 in ``eta`` of the others that could still enter the population."""
        others = sorted((m for m in going if not self._seeded(m)), key=_rank)
        chosen = others[: math.ceil(len(others) / self.settings.eta)]
        if len(self.population) == self.settings.population:
            worst = max(m.value_at(rung) for m in self.population)
            chosen = [m for m in chosen if m.value <= worst]
        return [m for m in going if self._seeded(m) or m in chosen]

    def _seeded(self, member: Member[G]) -> bool:
        return member.generation == 0 and member.plan in self.promised

    def _outcomes(self, jobs: list[Job]) -> list[Outcome]:
        """Known results from the journal, the rest from the executor, noted as they come."""
        missing = [job for job in jobs if job not in self.journal]
        for job, outcome in zip(missing, self.executor.map(missing), strict=True):
            self.journal.note(job, outcome)
        return [self.journal[job] for job in jobs]

    def _record(self, member: Member[G]) -> dict[str, Any]:
        """One line of the history; ``best`` is the best full value so far, this one included."""
        before = self.history[-1]["best"] if self.history else math.inf
        return {
            "n": member.number,
            "generation": member.generation,
            "candidate": self.space.text(member.candidate),
            "value": member.value,
            "rungs": len(member.sums),
            "full": member.full,
            "best": min(before, member.value) if member.full else before,
        }

    def _select(self, batch: list[Member[G]]) -> None:
        """The best of the population and of those evaluated in full."""
        whole = self.population + [m for m in batch if m.full]
        self.population = sorted(whole, key=_rank)[: self.settings.population]


def _rank(member: Member[Any]) -> tuple[float, int]:
    return (member.value, member.number)


def trace(history: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The plans evaluated in full, candidates named only where they were the best so far."""
    out: list[dict[str, Any]] = []
    best = math.inf
    for line in history:
        if line["full"]:
            better = line["value"] < best
            best = min(best, line["value"])
            named = {"candidate": line["candidate"]} if better else {}
            out.append({k: line[k] for k in ("n", "value", "best", "full")} | named)
    return out
