"""How fast pruned forests predict, side by side with the forests they were pruned from.

    python benchmarks/forests_predict.py        # into benchmarks/results/forests_predict.json

Both are scikit-learn forests. Pruned and unpruned predict in turn, on the same rows, on one
thread; the median of the ratios of neighbouring runs is recorded.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path

import numpy as np
from sklearn.datasets import make_classification
from sklearn.ensemble import (
    ExtraTreesClassifier,
    RandomForestClassifier,
    RandomForestRegressor,
)

from secateur.forests import BudgetPruner
from secateur.forests.flat import flatten

RESULTS = Path(__file__).parent / "results" / "forests_predict.json"
SHARES = (0.9, 0.5, 0.2)


def in_turn(before, after, x: np.ndarray, rounds: int) -> tuple[float, float, float]:
    """Median processor seconds of both models' ``predict``, and the median of the ratios of neighbours."""
    seconds: list[list[float]] = [[], []]
    for turn in range(rounds + 1):
        # Who goes first changes, so that nobody always runs on the other's warm caches.
        for which in (0, 1) if turn % 2 else (1, 0):
            start = time.process_time()
            (before, after)[which].predict(x)
            if turn:  # the first round warms up
                seconds[which].append(time.process_time() - start)
    ratios = [b / a for a, b in zip(*seconds, strict=True)]
    return (*map(statistics.median, seconds), statistics.median(ratios))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    x, y = make_classification(12_000, n_features=30, n_informative=12, flip_y=0.1, random_state=0)
    x = x.astype(np.float32)
    grow, prune, rows = slice(0, 6000), slice(6000, 9000), x[9000:]
    kinds = {
        "random forest": RandomForestClassifier(100, random_state=0),
        "extra trees": ExtraTreesClassifier(100, random_state=0),
        "random forest regressor": RandomForestRegressor(60, max_features=0.4, random_state=0),
    }
    entries = []
    for name, forest in kinds.items():
        forest.fit(x[grow], y[grow])
        pruner = BudgetPruner(forest, lam=0.0, error_source="train", prefit=True)
        pruner.fit(x[grow], y[grow], X_val=x[prune], y_val=y[prune])
        path = pruner.prune_path(points=12)
        points = [int(np.abs(path.cost - share * path.cost[-1]).argmin()) for share in SHARES]
        for point in dict.fromkeys(points):
            pruned = pruner.forest_at(path, point)
            for batch in (1, len(rows)):
                turns = arguments.rounds * (8 if batch == 1 else 1)
                before, after, ratio = in_turn(forest, pruned, rows[:batch], turns)
                entries.append(
                    {
                        "forest": name,
                        "rows": batch,
                        "share_of_cost": float(path.cost[point] / path.cost[-1]),
                        "nodes_before": flatten(forest).n_nodes,
                        "nodes_after": flatten(pruned).n_nodes,
                        "seconds_before": before,
                        "seconds_after": after,
                        "ratio": ratio,
                    }
                )
                print(entries[-1], flush=True)
    record = {
        "command": "python benchmarks/forests_predict.py",
        "python": platform.python_version(),
        "load": os.getloadavg()[0],
        "rounds": arguments.rounds,
        "worst_ratio_one_row": max(e["ratio"] for e in entries if e["rows"] == 1),
        "worst_ratio_3000_rows": max(e["ratio"] for e in entries if e["rows"] > 1),
        "entries": entries,
    }
    arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
