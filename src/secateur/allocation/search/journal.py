"""Results of evaluations, noted one line each as they come, so that none is ever lost.

A search draws everything else from its seed: run again with the same journal it makes the same
proposals, finds their results here, and goes on where the killed one stood.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import IO

from secateur.files import told_plainly

Job = tuple[tuple[int, ...], int]
Outcome = tuple[float, float]


class Journal:
    """``journal[plan, rung]`` is an outcome; ``note`` adds one, to the file too if there is one.

    Args:
        path: a file of JSON lines, read if it exists; None keeps all in memory. A last line
            cut short by a kill is dropped.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._known: dict[Job, Outcome] = {}
        self._file: IO[bytes] | None = None
        self.read = 0
        if path is None:
            return
        whole = b""
        if path.exists():
            whole = path.read_bytes()
            whole = whole[: whole.rfind(b"\n") + 1]
        for line in whole.decode().splitlines():
            entry = json.loads(line)
            job = (tuple(entry["plan"]), int(entry["rung"]))
            self._known[job] = (float(entry["sum"]), float(entry["weight"]))
        self.read = len(self._known)
        with told_plainly(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "ab+")  # noqa: SIM115
            self._file.truncate(len(whole))

    def __contains__(self, job: object) -> bool:
        return job in self._known

    def __getitem__(self, job: Job) -> Outcome:
        return self._known[job]

    def __len__(self) -> int:
        return len(self._known)

    def note(self, job: Job, outcome: Outcome) -> None:
        """Remember ``outcome`` of ``job``."""
        self._known[job] = outcome
        if self._file is not None:
            plan, rung = job
            entry = {"plan": list(plan), "rung": rung, "sum": outcome[0], "weight": outcome[1]}
            self._file.write(json.dumps(entry).encode() + b"\n")
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
