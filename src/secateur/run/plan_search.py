"""Searching a plan for a model: the search split, the sorted scores, the search, its folder.

DIR/found.json      the function found, for ``--allocation dsa -A preset=DIR/found.json``
DIR/plan.json       the best plan, for ``--allocation DIR/plan.json``
DIR/search.json     every plan tried, in order; DIR/search.svg draws it
DIR/secateur/       what a killed search goes on from
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import torch

from secateur import __version__
from secateur.allocation.dsa.allocator import DSA, SEEDS, function_space, whole_hundredths
from secateur.allocation.dsa.presets import save_preset
from secateur.allocation.search.engine import Evolution, Search, SearchSettings, Space, trace
from secateur.allocation.search.executors import check_workers, executor
from secateur.allocation.search.journal import Journal
from secateur.allocation.search.spaces import FunctionSpace, RatioSpace
from secateur.allocation.search.trial import plan_of_counts
from secateur.errors import UsageError
from secateur.evidence.score_summary import ScoreSummary
from secateur.files import write_json, write_text
from secateur.masks.ranking import Ranking
from secateur.progress import SILENT, Progress
from secateur.recipe import Recipe
from secateur.run.folder import RunFolder, writable
from secateur.run.planning import problem_of
from secateur.run.session import Session, prepare
from secateur.run.trial_of import Scores, search_windows, sorted_scores
from secateur.run.trials import Trials
from secateur.run.trials_store import OpenTrials, read_rankings, write_trials

SpaceName = Literal["dsa", "ratios"]
SPACES = ("dsa", "ratios")
G = TypeVar("G")
_REDRAW = 2.0  # seconds between updates of the files a person may look at


@dataclass(frozen=True)
class Workers:
    """Where plans are evaluated.

    Attributes:
        kind: ``serial``, ``processes`` or ``ray``.
        number: of workers.
        address: of a running Ray cluster; None starts a local one.
    """

    kind: str = "serial"
    number: int = 1
    address: str | None = None


def search_plan(
    recipe: Recipe,
    out: Path,
    *,
    space: str = "dsa",
    settings: SearchSettings | None = None,
    first: int | None = None,
    workers: Workers | None = None,
    fresh: bool = False,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Search the plan under which the recipe's method hurts the model least.

    Args:
        recipe: model, method, target, calibration and search text; its evaluation's text must
            not overlap with the search's. Its allocation may be ``dsa`` with options.
        out: folder for the results; a search killed there goes on there.
        space: ``dsa`` (functions of scores) or ``ratios`` (a ratio for each block).
        settings: budget, population, seed ... A larger budget continues a finished search.
        first: windows of the first rung; plans that do badly there go no further. None: a
            quarter.
        workers: where plans are evaluated. The history does not depend on it.
        fresh: throw away what an earlier search left.
        progress: where to report.

    Returns:
        What ``search.json`` holds.

    Raises:
        UsageError: a streamed model, an unknown space, overlapping texts, or a folder that
            holds another search.
    """
    if space not in SPACES:
        raise UsageError("unknown space", field="space", value=space, fix=" or ".join(SPACES))
    if recipe.stream:
        raise UsageError(
            "a search holds the order of all scores in memory",
            field="stream",
            value=True,
            fix="search on a smaller sibling and use its found.json",
        )
    settings, workers = settings or SearchSettings(), workers or Workers()
    check_workers(workers.kind, workers.number)
    allocator = _allocator(recipe)
    writable(out)
    session = prepare(recipe, progress=progress)
    windows = search_windows(session)
    rungs = _rungs(len(windows), first)
    identity = {
        "kind": "search of an allocation",
        "secateur": __version__,
        "model": session.loaded.fingerprint,
        "calibration": None if session.calibration is None else session.calibration.fingerprint,
        "search": windows.fingerprint,
        "target": str(recipe.target),
        "method": recipe.method,
        "options": recipe.options,
        "scope": str(session.scope),
        "matrices": sorted(session.shapes),
        "fitness": recipe.search.fitness,
        "space": space,
        "allocator": allocator.provenance(),
        "rungs": rungs,
        **{k: v for k, v in asdict(settings).items() if k != "budget"},
    }
    with RunFolder(out, identity, fresh=fresh) as folder:
        problem = problem_of(session, (allocator,), folder.inner / "evidence")
        kept = folder.inner / "trials"
        rankings, blocks = _scores(session, allocator, problem.scores, kept)
        if not (kept / "rankings.safetensors").exists():
            write_trials(kept, rankings, windows)
        blocks = blocks or allocator.blocks(problem)
        opener = OpenTrials(
            kept.resolve(),
            recipe.model,
            recipe.dtype,
            recipe.device,
            recipe.trust_remote_code,
            recipe.blocks,
            tuple(recipe.include),
            tuple(recipe.exclude),
            recipe.target,
            rungs,
            recipe.search.fitness,
            recipe.calibration.batch_tokens,
        )

        def here() -> Trials:
            return Trials(
                session.view,
                rankings,
                windows,
                recipe.target,
                rungs=rungs,
                fitness=recipe.search.fitness,
                batch_tokens=recipe.calibration.batch_tokens,
                device=session.device,
                progress=progress,
            )

        threads = max(1, torch.get_num_threads() // workers.number)
        start = time.perf_counter()
        journal = Journal(folder.inner / "evaluations.jsonl")
        pool = executor(
            workers.kind,
            here if workers.kind == "serial" else opener,
            workers.number,
            threads,
            workers.address,
        )
        functions = function_space(allocator, problem, blocks)
        about = {
            "model": session.loaded.name,
            "method": recipe.method,
            "target": str(recipe.target),
            "space": space,
            "fitness": recipe.search.fitness,
            "windows": {"rungs": rungs, "length": windows.length, **windows.record},
            "settings": asdict(settings),
            "resumed_from": journal.read,
        }
        writer: _Writer[Any] = _Writer(out, about, session, allocator)
        try:
            if space == "dsa":
                record = _run(
                    functions,
                    list(SEEDS.values()),
                    pool,
                    rungs,
                    settings,
                    journal,
                    progress,
                    writer,
                )
            else:
                steps = RatioSpace(len(blocks), problem.sparsity, functions.to_plan)
                seeds = _ratio_seeds(steps, functions)
                record = _run(steps, seeds, pool, rungs, settings, journal, progress, writer)
        finally:
            pool.close()
            journal.close()
        record["seconds"] = round(time.perf_counter() - start, 2)
        write_json(out / "search.json", record)
        folder.event("finished", plans=len(record["history"]), best=record["best"]["value"])
    return record


def _run(
    space: Space[G],
    seeds: list[G],
    pool: Any,
    rungs: list[int],
    settings: SearchSettings,
    journal: Journal,
    progress: Progress,
    writer: _Writer[G],
) -> dict[str, Any]:
    evolution = Evolution(
        space,
        pool,
        rungs=len(rungs),
        settings=settings,
        seeds=seeds,
        journal=journal,
        progress=progress,
        observe=lambda search: writer.update(space, search),
    )
    return writer.write(space, evolution.run(), final=True)


class _Writer(Generic[G]):
    """Keeps the result files up to date while the search goes on."""

    def __init__(self, out: Path, about: dict[str, Any], session: Session, allocator: DSA) -> None:
        self.out, self.about, self.session, self.allocator = out, about, session, allocator
        self.last = 0.0

    def update(self, space: Space[G], search: Search[G]) -> None:
        """The files now and then while the search goes on."""
        if time.monotonic() - self.last >= _REDRAW:
            self.write(space, search, final=False)

    def write(self, space: Space[G], search: Search[G], *, final: bool) -> dict[str, Any]:
        """All files."""
        from secateur.report.search_chart import search_chart, standalone

        best = search.best
        record = {
            **self.about,
            "finished": final,
            "best": {
                "candidate": space.text(best.candidate),
                "value": best.value,
                "n": best.number,
            },
            "start": search.history[0]["value"],
            "invalid": search.invalid,
            "repeated": search.repeated,
            "exhausted": search.exhausted,
            "history": search.history,
        }
        provenance = {k: v for k, v in record.items() if k not in ("history", "finished")}
        made = {**provenance, "history": trace(search.history)}
        plan = plan_of_counts(best.plan, self.session.shapes, self.session.recipe.target)
        name = f"search of {self.about['space']}"
        plan = replace(plan, provenance={"allocator": name, "search": made})
        write_json(self.out / "search.json", record)
        write_json(self.out / "plan.json", plan.record())
        if self.about["space"] == "dsa":
            expression: Any = best.candidate
            scores = self.allocator.kind_of_scores
            save_preset(self.out / "found.json", expression, scores, provenance)
        write_text(self.out / "search.svg", standalone(search_chart(record)))
        self.last = time.monotonic()
        return record


def _allocator(recipe: Recipe) -> DSA:
    """The DSA allocator with the recipe's options; what it searches is not given."""
    name, options = recipe.allocator
    if name != "dsa":
        raise UsageError(
            "a search is DSA's, with its bounds and scores",
            field="allocation",
            value=name,
            fix="allocation: dsa, or {name: dsa, max_sparsity: 0.9}",
        )
    for key in ("preset", "expression", "search", "compat"):
        if key in options:
            raise UsageError(
                "does not go with a search", field=key, value=options[key], fix="leave it out"
            )
    allocator = DSA.with_options(options)
    assert isinstance(allocator, DSA)
    if allocator.lam is not None:
        whole_hundredths(allocator.lam)  # refused before anything is read
    return allocator


def _rungs(windows: int, first: int | None) -> list[int]:
    count = max(1, windows // 4) if first is None else first
    if not 1 <= count <= windows:
        raise UsageError(
            f"the first rung looks at 1 to {windows} windows", field="first", value=count
        )
    return [count] if count == windows else [count, windows - count]


def _scores(
    session: Session, allocator: DSA, scores: Scores | None, kept: Path
) -> tuple[dict[str, Ranking], list[ScoreSummary]]:
    """Sorted scores, and their summaries when it is the method's own scores that are wanted."""
    own = allocator.kind_of_scores == "method"
    rankings = None if own else read_rankings(kept)
    if rankings is not None:
        return rankings, []
    assert scores is not None
    return sorted_scores(session, scores, summaries=own)


def _ratio_seeds(steps: RatioSpace, functions: FunctionSpace) -> list[tuple[float, ...]]:
    """The plans of DSA's starting functions, uniform first."""
    seeds = []
    for expression in SEEDS.values():
        ratios = functions.ratios(expression)
        if ratios is not None:
            seeds.append(steps.candidate(ratios))
    return seeds
