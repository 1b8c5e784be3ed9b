"""How building, solving and the price path grow: trees of ~20k nodes, 30k examples, 50 features.

    python benchmarks/forests_scale.py        # into benchmarks/results/forests_scale.json

Each size runs in a process of its own, so that peak memory is its own. The data are synthetic
(Covertype and MiniBooNE cannot be had): 50 features of falling usefulness, noisy labels.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from sklearn.ensemble import RandomForestClassifier

from secateur.forests.checks import feature_costs
from secateur.forests.flat import flatten
from secateur.forests.path import grid_path
from secateur.forests.programme import ErrorExamples, build_programme
from secateur.forests.routing import first_uses, over_trees
from secateur.forests.solvers import solve
from secateur.forests.solvers.interface import PrimalDualOptions
from secateur.forests.store import load_forest, save_forest

RESULTS = Path(__file__).parent / "results" / "forests_scale.json"
EXAMPLES, FEATURES, TRAIN = 30_000, 50, 80_000


def data() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((TRAIN + EXAMPLES, FEATURES)).astype(np.float32)
    weight = 0.9 ** np.arange(FEATURES)
    margin = (np.sin(2 * x) * weight).sum(1) + (x[:, :-1] * x[:, 1:] * weight[1:]).sum(1)
    return x, (margin + rng.logistic(size=len(x)) > 0).astype(int)


def peak_gb() -> float:
    """The most memory this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def measure(
    trees: int, solvers: list[str], lams: list[float], grid: int, forest_file: Path
) -> dict:
    x, y = data()
    forest = load_forest(forest_file)
    forest.estimators_ = forest.estimators_[:trees]
    flat = flatten(forest)
    record: dict = {"trees": trees, "nodes": flat.n_nodes, "load": os.getloadavg()[0]}
    costs = feature_costs(None, None, [f"x{i}" for i in range(FEATURES)])
    # Training errors: every split pays, so nothing is pruned away before the solver.
    errors = ErrorExamples(x[:TRAIN], y[:TRAIN], np.ones(TRAIN), "error")
    build_programme(flatten_one(forest), errors, costs, x[TRAIN : TRAIN + 10])  # compile first
    start, cpu = time.perf_counter(), time.process_time()
    over_trees(first_uses, flat, x[TRAIN:], costs.priced_group, FEATURES, n_jobs=2)
    record["first_uses_s"] = time.perf_counter() - start
    record["first_uses_cpu_s"] = time.process_time() - cpu
    start, cpu = time.perf_counter(), time.process_time()
    programme = build_programme(flat, errors, costs, x[TRAIN:], n_jobs=2)
    record["build_s"] = time.perf_counter() - start
    record["build_cpu_s"] = time.process_time() - cpu
    record["build_peak_gb"] = peak_gb()
    record["first_uses"] = len(programme.full.key)
    record["pairs"] = programme.full.n_keys
    record["solve"] = []
    for lam in lams:
        price = programme.price(lam)
        for solver in solvers:
            start, cpu = time.perf_counter(), time.process_time()
            # "published": the primal-dual with the authors' steps.
            steps = "published" if solver == "published" else "averaged"
            name = "primal_dual" if solver == "published" else solver
            options = PrimalDualOptions(n_jobs=2, steps=steps)
            cut = solve(programme.reduced, price, name, options)
            error, cost = programme.measure(programme.lift(cut.kept))
            row = {
                "lam": lam,
                "solver": solver,
                "seconds": time.perf_counter() - start,
                "cpu_seconds": time.process_time() - cpu,
                "objective": error + lam * cost,
                "relative_gap": float(cut.gap * programme.unit / (error + lam * cost)),
                "rounds": cut.iterations,
                "kept": int(cut.kept.sum()),
                "peak_gb_so_far": peak_gb(),
            }
            print(trees, row, flush=True)
            record["solve"].append(row)
    if grid:
        prices = [programme.price(lam) for lam in np.geomspace(5e-4, 2e-2, grid)]
        start, cpu = time.perf_counter(), time.process_time()
        path = grid_path(programme.reduced, prices, solver=solvers[0])
        print("grid done", flush=True)
        record["grid"] = {
            "points": grid,
            "cuts": path.cuts,
            "seconds": time.perf_counter() - start,
            "cpu_seconds": time.process_time() - cpu,
            "solver": solvers[0],
            "cost": path.cost.tolist(),
        }
    record["peak_gb"] = peak_gb()
    return record


def flatten_one(forest: RandomForestClassifier):
    from secateur.forests.flat import flatten_estimators

    return flatten_estimators(forest.estimators_[:1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trees", nargs="*", type=int, default=[5, 10, 20, 40])
    parser.add_argument("--solvers", nargs="*")
    parser.add_argument("--lams", nargs="*", type=float, default=[0.002, 0.005, 0.008])
    parser.add_argument("--grid", type=int, default=20, help="points of the path, largest size")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    exact = ["ortools", "push_relabel"] if find_spec("ortools") else ["push_relabel"]
    solvers = arguments.solvers or [*exact, "primal_dual"]
    forest_file = arguments.out.with_suffix(".npz")
    if arguments.one:
        grid = arguments.grid if arguments.one == max(arguments.trees) else 0
        record = measure(arguments.one, solvers, arguments.lams, grid, forest_file)
        arguments.out.with_suffix(".part").write_text(json.dumps(record))
        return
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    if not forest_file.exists():  # left over from an interrupted run
        x, y = data()
        forest = RandomForestClassifier(max(arguments.trees), random_state=0, n_jobs=2)
        save_forest(forest.fit(x[:TRAIN], y[:TRAIN]), forest_file)
    sizes = []
    for trees in arguments.trees:
        command = [sys.executable, __file__, "--one", str(trees), *sys.argv[1:]]
        subprocess.run(command, check=True)
        sizes.append(json.loads(arguments.out.with_suffix(".part").read_text()))
        record = {
            "command": "python benchmarks/forests_scale.py " + " ".join(sys.argv[1:]),
            "python": platform.python_version(),
            "cores": os.cpu_count(),
            "examples": EXAMPLES,
            "features": FEATURES,
            "note": "load is the machine's one-minute load average when a size began; with other "
            "work on the two cores wall seconds overstate, cpu_seconds do not",
            "sizes": sizes,
        }
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    forest_file.unlink()
    arguments.out.with_suffix(".part").unlink()


if __name__ == "__main__":
    main()
