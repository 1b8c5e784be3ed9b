"""All quick benchmarks, one after another, and a table of what they found.

make bench        # or: python -m benchmarks [NAME ...]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from benchmarks.common import RESULTS

QUICK = ("startup", "kernels", "whole_run", "gradients", "streaming", "resume")


def rows(name: str, record: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """What was measured, the figure, and what was wanted."""
    if name == "startup":
        for case in record["cases"]:
            yield case["case"], f"{case[case['clock']]['median']:.2f} s", f"< {case['limit']} s"
    elif name == "kernels":
        for case in record["kernels"]:
            shape = "x".join(map(str, case["shape"]))
            wanted = "" if case["wanted"] is None else f">= {case['wanted']:g}x"
            yield f"{case['kernel']} {shape}", f"{case['ratio']}x", wanted
    elif name == "whole_run":
        for case in record["cases"]:
            figure = f"{case['times_two_forwards']['median']:.2f} x 2 forwards"
            wanted = "" if case["limit"] is None else f"<= {case['limit']:g}"
            yield f"whole run, {case['method']}", figure, wanted
    elif name == "gradients":
        for model, case in record["models"].items():
            figure = f"{case['time']['times_a_forward']['median']:.2f} forwards"
            yield f"gradient pass, {model}", figure, f"<= {case['time']['limit']:g}"
            share = case["memory"]["ours_of_allowed"]
            yield f"  its memory / {case['memory']['wanted']}", f"{share:.3f}", "<= 1.01"
    elif name == "streaming":
        for case in record["depth"]:
            label = f"peak memory, 64 / 16 blocks, {case['method']}"
            yield label, f"{case['growth']:.3f}x", f"<= {case['limit']:g}x"
    elif name == "structured_speed":
        for phase in ("prefill", "decode"):
            label = f"half the heads and channels gone: {phase} speed-up / FLOPs ratio"
            yield label, f"{record[phase]['reached']:.2f}", ">= 0.85"
    elif name == "resume":
        yield (
            "run in a folder / in memory (CPU)",
            f"{record['cpu']['folder_over_memory']['median']:.2f}x",
            "",
        )


def main() -> int:
    """Run each in its own process; 1 if any failed."""
    parser = argparse.ArgumentParser(description="Run the quick benchmarks.")
    parser.add_argument("names", nargs="*", default=list(QUICK), metavar="NAME")
    failed = []
    table: list[tuple[str, str, str]] = []
    for name in parser.parse_args().names:
        print(f"== {name}", flush=True)
        target = RESULTS / f"{name}.json"
        command = [sys.executable, "-m", f"benchmarks.{name}", "--json", str(target)]
        if subprocess.run(command).returncode:
            failed.append(name)
            continue
        table += rows(name, json.loads(target.read_text()))
    width = max((len(label) for label, *_ in table), default=0)
    print(f"\n{'measured':{width}}  {'figure':>18}  wanted")
    for label, figure, wanted in table:
        print(f"{label:{width}}  {figure:>18}  {wanted}")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
