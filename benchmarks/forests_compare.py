"""Accuracy against feature cost, all methods, real data, several seeds.

    python benchmarks/forests_compare.py            # everything, into benchmarks/results/forests.json
    python benchmarks/forests_compare.py --sets spambase --seeds 1

Every set is run with uniform prices and with prices drawn per seed from {1, 5, 20, 50} / 10.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
from sklearn.ensemble import RandomForestClassifier

sys.path.insert(0, str(Path(__file__).parent))
from forests_data import BUILT_IN, KEEL, load

from secateur.forests.compare import METHODS, compare

RESULTS = Path(__file__).parent / "results" / "forests.json"


def prices(kind: str, d: int, seed: int) -> np.ndarray:
    if kind == "uniform":
        return np.ones(d)
    return np.random.default_rng(seed).choice([0.1, 0.5, 2.0, 5.0], size=d)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sets", nargs="*", default=[*BUILT_IN, *KEEL])
    parser.add_argument("--methods", nargs="*", default=METHODS.names())
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--trees", type=int, default=40)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    record: dict = {
        "command": "python benchmarks/forests_compare.py " + " ".join(sys.argv[1:]),
        "python": platform.python_version(),
        "trees": arguments.trees,
        "sets": {},
    }
    for name in arguments.sets:
        x, y = load(name)
        for kind in ("uniform", "heterogeneous"):
            start = time.perf_counter()
            result = compare(
                x,
                y,
                RandomForestClassifier(arguments.trees, n_jobs=1),
                lambda seed, kind=kind, d=x.shape[1]: prices(kind, d, seed),
                methods=arguments.methods,
                seeds=range(arguments.seeds),
            )
            entry = asdict(result)
            del entry["curves"]  # the table is what is published; curves are made again in minutes
            entry |= {"rows": len(y), "features": x.shape[1], "classes": len(np.unique(y))}
            entry["seconds"] = round(time.perf_counter() - start, 1)
            record["sets"][f"{name}, {kind}"] = entry
            show(f"{name}, {kind}", entry)
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps(record, indent=1) + "\n")


def show(title: str, entry: dict) -> None:
    """Mean test accuracy at each budget."""
    print(f"\n{title}: {entry['rows']} x {entry['features']}, {entry['seconds']} s")
    print("budget".ljust(20), *(f"{b:5.0%}" for b in entry["budgets"]))
    for method, scores in entry["scores"].items():
        print(method.ljust(20), *(f"{s:5.3f}" for s in np.mean(scores, 0)), flush=True)
    for method, reason in entry["left_out"].items():
        print(f"{method}: left out, {reason}")


if __name__ == "__main__":
    main()
