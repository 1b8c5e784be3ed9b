"""Oracle on the authors' own MiniBooNE sample: BudgetPrune against its baselines.

    git clone https://github.com/fnan/FeatureBudgetedRandomForest
    python benchmarks/forests_mbne.py FeatureBudgetedRandomForest

Reads ``mbne_tiny_tr``, ``_tv`` and ``_te`` (2000, 1000, 2000 rows, 50 features); the data are not
part of this repository. Two readings of each curve: the best test accuracy within a cost, as
such curves are usually drawn and as optimistic as that is, and the accuracy of the pruning that
is best on validation rows. Ends with an error if what is robust does not hold.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from sklearn.datasets import load_svmlight_files
from sklearn.ensemble import RandomForestClassifier

from secateur.forests.checks import feature_costs
from secateur.forests.compare import METHODS, Split
from secateur.forests.metrics import best_within, expected_feature_cost

RESULTS = Path(__file__).parent / "results" / "forests_mbne.json"
COSTS = (3, 5, 8, 12, 16, 20, 25, 30, 35, 40, 45)
MIDDLE = slice(2, 7)  # 17 to 53 per cent of the unpruned forest's 47 features
NAMES = ("budgetprune", "budgetprune-train", "budgetprune-filled", "greedy", "ccp", "depth")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    files = [str(arguments.folder / f"mbne_tiny_{part}") for part in ("tr", "tv", "te")]
    loaded = load_svmlight_files(files, n_features=50)
    x_tr, x_val, x_te = (np.ascontiguousarray(m.toarray(), dtype=np.float32) for m in loaded[::2])
    y_tr, y_val, y_te = loaded[1::2]
    prices = np.ones(50)
    on_test: dict[str, list] = {name: [] for name in NAMES}
    chosen: dict[str, list] = {name: [] for name in NAMES}
    unpruned = []
    for seed in range(arguments.seeds):
        # The rows are sorted by class; a bag does not mind, and nothing else is subsampled.
        forest = RandomForestClassifier(40, criterion="entropy", random_state=seed)
        split = Split(
            forest.fit(x_tr, y_tr), x_tr, y_tr, x_val, y_val, x_te, y_te,
            feature_costs(prices, None, [f"x{i}" for i in range(50)]), seed,
        )  # fmt: skip
        unpruned.append((forest.score(x_te, y_te), cost(forest, split, x_te)))
        for name in NAMES:
            forests = [pruned for _, pruned in METHODS[name](split)]
            test = np.array([(cost(f, split, x_te), f.score(x_te, y_te)) for f in forests])
            val = np.array([(cost(f, split, x_val), f.score(x_val, y_val)) for f in forests])
            on_test[name].append(best_within(*test.T, COSTS).tolist())
            best = [
                max(np.flatnonzero(val[:, 0] <= c), key=lambda i: val[i, 1], default=-1)
                for c in COSTS
            ]
            chosen[name].append([test[i, 1] if i >= 0 else float("nan") for i in best])
            print(seed, name, np.round(on_test[name][-1], 3), flush=True)
    record = {
        "command": "python benchmarks/forests_mbne.py FOLDER",
        "seeds": arguments.seeds,
        "costs": COSTS,
        "unpruned": unpruned,
        "best_on_test": {name: np.mean(rows, 0).tolist() for name, rows in on_test.items()},
        "chosen_on_validation": {name: np.mean(rows, 0).tolist() for name, rows in chosen.items()},
    }
    means = {name: np.array(row) for name, row in record["best_on_test"].items()}
    accuracy, full_cost = np.mean(unpruned, 0)
    record["margin_over_ccp"] = {
        name: (means[name] - means["ccp"])[MIDDLE].tolist()
        for name in ("budgetprune", "budgetprune-train")
    }
    at_most = max(i for i, c in enumerate(COSTS) if c <= 0.9 * full_cost)
    record["lost_at_90_percent"] = float(accuracy - means["budgetprune-train"][at_most])
    arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    for rows in (record["best_on_test"], record["chosen_on_validation"]):
        print("\n" + "cost at most".ljust(20), *(f"{c:6d}" for c in COSTS))
        for name, row in rows.items():
            print(name.ljust(20), *(f"{v:6.3f}" for v in row))
    print(record["margin_over_ccp"], record["lost_at_90_percent"])
    margins = np.max(list(record["margin_over_ccp"].values()), axis=0)
    if not ((margins >= 0.01).all() and record["lost_at_90_percent"] <= 0.005):
        sys.exit("the robust ordering does not hold")


def cost(forest: RandomForestClassifier, split: Split, x: np.ndarray) -> float:
    """Mean price an example pays."""
    return expected_feature_cost(forest, split.costs, x)


if __name__ == "__main__":
    main()
