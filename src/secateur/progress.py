"""Progress that library code reports to, and that the command line draws.

Library functions take ``progress: Progress = SILENT`` and never print.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Advance(Protocol):
    """Moves a bar on; ``detail`` is shown beside it (a loss, a speed) until the next one."""

    def __call__(self, steps: float = 1.0, detail: str = "") -> None: ...


def _nothing(steps: float = 1.0, detail: str = "") -> None:
    """Advance no bar."""


class Progress:
    """Says nothing; the base of every other kind."""

    @contextmanager
    def stage(self, label: str, total: float | None = None, unit: str = "") -> Iterator[Advance]:
        """A named stretch of work of ``total`` steps; call the yielded function to advance.

        >>> with SILENT.stage("blocks", total=2) as advance:
        ...     advance(1)
        """
        yield _nothing

    def note(self, message: str) -> None:
        """Something worth a line to the user."""


class RichProgress(Progress):
    """A bar with elapsed time and ETA on standard error (standard output stays for results)."""

    def __init__(self) -> None:
        from rich.console import Console

        self.console = Console(stderr=True)

    @contextmanager
    def stage(self, label: str, total: float | None = None, unit: str = "") -> Iterator[Advance]:
        """See ``Progress.stage``."""
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.progress import Progress as Bars

        counted = (MofNCompleteColumn(), TextColumn(unit), TimeElapsedColumn())
        left = (TextColumn("left"), TimeRemainingColumn())
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            # Without a total there is nothing to count down: only the clock runs.
            *((TimeElapsedColumn(),) if total is None else (*counted, *left)),
        )
        columns += (TextColumn("{task.fields[detail]}"),)
        with Bars(*columns, console=self.console) as bars:
            task = bars.add_task(label, total=total, detail="")

            def advance(steps: float = 1.0, detail: str = "") -> None:
                if detail:
                    bars.update(task, detail=detail)
                bars.advance(task, steps)

            yield advance

    def note(self, message: str) -> None:
        """See ``Progress.note``."""
        self.console.print(message, highlight=False, markup=False)


SILENT = Progress()
