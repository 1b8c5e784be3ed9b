"""What the benchmarks share: measuring in turns, memory of a fresh process, records."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
MIB = 2**20


def alternate(
    ways: Mapping[str, Callable[[], object]],
    rounds: int,
    clock: Callable[[], float] = time.process_time,
) -> dict[str, list[float]]:
    """Seconds of each way, measured in turns, every other round in reverse order.

    Process CPU time by default: other people's work on the machine costs wall time only, and
    with one thread CPU time is what wall time would be on a quiet machine.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds):
        for name in list(ways) if turn % 2 == 0 else reversed(ways):
            start = clock()
            ways[name]()
            seconds[name].append(clock() - start)
    return seconds


def spread(values: Sequence[float], digits: int = 3) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = (
        statistics.quantiles(values, n=4, method="inclusive")
        if len(values) > 1
        else [values[0]] * 3
    )
    return {
        "median": round(middle, digits),
        "low": round(low, digits),
        "high": round(high, digits),
    }


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> dict[str, float]:
    """Median and quartiles of the ratios, turn by turn."""
    return spread([n / d for n, d in zip(numerator, denominator, strict=True)])


def in_fresh_process(
    module: str, *arguments: object, environment: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The JSON object that ``python -m MODULE ARGUMENTS`` prints last.

    Raises:
        RuntimeError: it failed; with what it said.
    """
    command = [sys.executable, "-m", module, *map(str, arguments)]
    quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        env={**os.environ, **quiet, **(environment or {})},
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[1:])} failed:\n{done.stderr[-2000:]}")
    record: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return record


def memory(field: str) -> int:
    """A figure of this process in bytes: ``VmHWM`` (most resident so far), ``VmRSS``, ``VmData``.

    Not ``getrusage``, whose maximum a process inherits from the one that started it.
    """
    with open("/proc/self/status", encoding="ascii") as lines:
        found = next(line for line in lines if line.startswith(field + ":"))
    return int(found.split()[1]) * 1024


def forget_peak() -> None:
    """Start ``VmHWM`` anew at what is resident now."""
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """A parser with what every benchmark takes."""
    parser = argparse.ArgumentParser(description=(doc or "").strip().splitlines()[0])
    parser.add_argument("--json", type=Path, help="where to write the figures")
    return parser


def finish(name: str, figures: dict[str, Any], path: Path | None) -> None:
    """Write ``figures`` with the command and the machine they come from (no date, no host)."""
    import torch

    from secateur.evaluation.speed import machine
    from secateur.files import write_json

    given = [
        "PATH" if a.startswith("/") else a  # where things lie on one machine says nothing
        for a in sys.argv[1:]
        if path is None or a not in ("--json", str(path))
    ]
    outcome = {
        "command": " ".join(["python -m", f"benchmarks.{name}", *given]),
        "machine": machine(torch.device("cpu")),
        **figures,
    }
    write_json(path or RESULTS / f"{name}.json", outcome)


def verdict(value: float, limit: float) -> str:
    """``<= 1.3x: held``."""
    return f"<= {limit:g}: {'held' if value <= limit else 'MISSED'}"
