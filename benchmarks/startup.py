"""How long the library and its command line take to be there.

    python -m benchmarks.startup

Fresh processes in turns with an empty Python program, which is paid in any case and included.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import Any

from benchmarks.common import arguments, finish, spread, verdict

EMPTY = [sys.executable, "-c", "pass"]
CASES: tuple[tuple[str, list[str], str, float], ...] = (
    ("import secateur", [sys.executable, "-c", "import secateur"], "wall", 0.3),
    ("secateur --help", [sys.executable, "-m", "secateur", "--help"], "cpu", 0.5),
)


def once(command: list[str]) -> dict[str, float]:
    """Wall and CPU seconds of one process."""
    before, start = os.times(), time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    wall, after = time.perf_counter() - start, os.times()
    used = after.children_user + after.children_system
    return {"wall": wall, "cpu": used - before.children_user - before.children_system}


def main() -> None:
    """Medians over the rounds."""
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    commands = {"python": EMPTY, **{name: command for name, command, *_ in CASES}}
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
    for _ in range(given.rounds):
        for name, command in commands.items():
            taken[name].append(once(command))
    cases: list[dict[str, Any]] = []
    for name, _, clock, limit in CASES:
        record = {c: spread([t[c] for t in taken[name]]) for c in ("wall", "cpu")}
        empty = spread([t[clock] for t in taken["python"]])
        cases.append({"case": name, "clock": clock, "limit": limit, "empty": empty, **record})
        figure = record[clock]["median"]
        print(f"{name:18} {figure:.3f} s {clock} (python alone {empty['median']:.3f} s)  ", end="")
        print(verdict(figure, limit), flush=True)
    finish("startup", {"rounds": given.rounds, "cases": cases}, given.json)


if __name__ == "__main__":
    main()
