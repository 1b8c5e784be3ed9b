"""Where plans are evaluated: here, in processes beside this one, or on a Ray cluster.

All three keep the order of the jobs, so a search's history does not depend on which is used.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from secateur.allocation.search.engine import Executor, Job, Outcome, Payload
from secateur.errors import MissingExtra, SecateurError, UsageError

Evaluate = Callable[[Payload, int], Outcome]
"""(plan, rung) -> (sum, weight)."""
Open = Callable[[], Evaluate]
"""Makes an evaluator where it will work; must be picklable."""

KINDS = ("serial", "processes", "ray")


class Serial:
    """One after another, in this process."""

    def __init__(self, evaluate: Evaluate) -> None:
        self.evaluate = evaluate

    def map(self, jobs: Sequence[Job]) -> Iterator[Outcome]:
        """See ``Executor.map``."""
        for plan, rung in jobs:
            yield self.evaluate(plan, rung)

    def close(self) -> None:
        """Nothing to let go."""


def _opened_when_needed(open_: Open) -> Evaluate:
    """A search whose results are all known already opens nothing."""
    opened: list[Evaluate] = []

    def evaluate(plan: Payload, rung: int) -> Outcome:
        if not opened:
            opened.append(open_())
        return opened[0](plan, rung)

    return evaluate


_here: list[Evaluate | Exception] = []  # the evaluator of a worker process


def _start(open_: Open, threads: int) -> None:
    try:
        _here.append(_opened(open_, threads))
    except Exception as error:  # raised by the first job, where the caller can see it
        _here.append(error)


def _opened(open_: Open, threads: int) -> Evaluate:
    import torch

    torch.set_num_threads(threads)
    return open_()


def _do(job: Job) -> Outcome:
    evaluate = _here[0]
    if isinstance(evaluate, Exception):
        raise evaluate
    return evaluate(*job)


class Processes:
    """A pool of processes on this machine, each with its own evaluator.

    Args:
        open_: makes the evaluator in each process.
        workers: how many processes.
        threads: torch's threads in each.
    """

    def __init__(self, open_: Open, workers: int, threads: int = 1) -> None:
        self.pool = ProcessPoolExecutor(
            workers,
            mp_context=multiprocessing.get_context("spawn"),  # torch's threads do not survive fork
            initializer=_start,
            initargs=(open_, threads),
        )

    def map(self, jobs: Sequence[Job]) -> Iterator[Outcome]:
        """See ``Executor.map``."""
        try:
            yield from self.pool.map(_do, jobs)
        except BrokenProcessPool:
            raise SecateurError(
                "a worker of the search died (perhaps for want of memory)",
                fix="run the same command again with fewer --workers: it goes on where it stopped",
            ) from None

    def close(self) -> None:
        """Stop the processes."""
        self.pool.shutdown(cancel_futures=True)


class _Worker:
    def __init__(self, open_: Open, threads: int) -> None:
        self.evaluate = _opened(open_, threads)

    def run(self, plan: Payload, rung: int) -> Outcome:
        return self.evaluate(plan, rung)


class Ray:
    """Actors on a Ray cluster, each with its own evaluator.

    Args:
        open_: makes the evaluator in each actor; what it reads must be reachable from all nodes.
        workers: how many actors, one CPU each.
        address: of a running cluster; None: a local one is started, and stopped again.

    Raises:
        MissingExtra: ray is not installed.
    """

    def __init__(
        self, open_: Open, workers: int, threads: int = 1, address: str | None = None
    ) -> None:
        try:
            import ray
            from ray.util import ActorPool
        except ImportError:
            raise MissingExtra("ray", "ray", "a search on a Ray cluster") from None
        self.ray: Any = ray
        self.ours = not ray.is_initialized()
        if self.ours:
            local: dict[str, Any] = {"num_cpus": workers, "include_dashboard": False}
            self.ray.init(
                address=address,
                log_to_driver=False,
                logging_level="ERROR",
                **({} if address else local),
            )
        actor = self.ray.remote(num_cpus=1)(_Worker)
        self.pool = ActorPool([actor.remote(open_, threads) for _ in range(workers)])

    def map(self, jobs: Sequence[Job]) -> Iterator[Outcome]:
        """See ``Executor.map``."""
        yield from self.pool.map(lambda actor, job: actor.run.remote(*job), list(jobs))

    def close(self) -> None:
        """Stop the local cluster, if it is ours."""
        if self.ours:
            self.ray.shutdown()


def check_workers(kind: str, workers: int) -> None:
    """Stop before any work is done.

    Raises:
        UsageError: an unknown kind, or no worker.
    """
    if kind not in KINDS:
        raise UsageError(
            "unknown kind of workers", field="executor", value=kind, fix=", ".join(KINDS)
        )
    if workers < 1:
        raise UsageError("must be at least 1", field="workers", value=workers, fix="e.g. 1")


def executor(
    kind: str, open_: Open, workers: int = 1, threads: int = 1, address: str | None = None
) -> Executor:
    """The executor of that name.

    Raises:
        UsageError: an unknown kind, or no worker.
    """
    check_workers(kind, workers)
    if kind == "serial":
        return Serial(_opened_when_needed(open_))
    if kind == "processes":
        return Processes(open_, workers, threads)
    return Ray(open_, workers, threads, address)
