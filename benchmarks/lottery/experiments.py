"""All experiments of docs/lottery.md at full size: records for benchmarks/results, pictures for docs.

    python benchmarks/lottery/experiments.py [NAME ...]

The same as ``secateur lottery experiment NAME --out FOLDER``, with every file put in its place:
``benchmarks/results/lottery-NAME.json`` and ``docs/lottery/*.svg``.
"""

from __future__ import annotations

import os
import platform
import sys
import time
from pathlib import Path

from secateur.files import write_json, write_text
from secateur.lottery.experiments import experiments
from secateur.progress import RichProgress
from secateur.report.charts import standalone

ROOT = Path(__file__).parents[2]


def main() -> None:
    for name in sys.argv[1:] or experiments.names():
        clock = time.perf_counter()
        result = experiments[name](False, 0, RichProgress())
        for label, chart in result.charts.items():
            write_text(ROOT / "docs" / "lottery" / f"{label}.svg", standalone(chart))
        write_json(
            ROOT / "benchmarks" / "results" / f"lottery-{name}.json",
            {
                "command": f"secateur lottery experiment {name} --out FOLDER",
                "machine": f"{platform.machine()}, {os.cpu_count()} cores, shared with other work",
                "seconds": time.perf_counter() - clock,
                "findings": result.findings,
                **result.record,
            },
        )
        print(result.title, *result.findings, sep="\n  ", flush=True)


if __name__ == "__main__":
    main()
