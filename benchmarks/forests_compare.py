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
from secateur.report.charts import Series, line_chart, standalone

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
    parser.add_argument("--publish", action="store_true", help="only the table and the plot")
    arguments = parser.parse_args()
    if arguments.publish:
        publish(json.loads(arguments.out.read_text()), arguments.out)
        return
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
    publish(record, arguments.out)


def show(title: str, entry: dict) -> None:
    """Mean test accuracy at each budget."""
    print(f"\n{title}: {entry['rows']} x {entry['features']}, {entry['seconds']} s")
    print("budget".ljust(20), *(f"{b:5.0%}" for b in entry["budgets"]))
    for method, scores in entry["scores"].items():
        print(method.ljust(20), *(f"{s:5.3f}" for s in np.mean(scores, 0)), flush=True)
    for method, reason in entry["left_out"].items():
        print(f"{method}: left out, {reason}")


def publish(record: dict, out: Path) -> None:
    """Beside ``out``: a Markdown table of every set, and a plot of the means over sets."""
    lines = []
    for title, entry in record["sets"].items():
        full = np.mean([score for score, _, _ in entry["unpruned"]])
        lines += [
            f"\n**{title}**: {entry['rows']} x {entry['features']}, {entry['classes']} classes; "
            f"unpruned {full:.3f}\n",
            "| method | " + " | ".join(f"{b:.0%}" for b in entry["budgets"]) + " |",
            "|---" * (len(entry["budgets"]) + 1) + "|",
        ]
        best = np.nanmax([np.mean(s, 0) for s in entry["scores"].values()], axis=0)
        for method, scores in entry["scores"].items():
            mean, deviation = np.mean(scores, 0), np.std(scores, 0)
            cells = [
                "-"
                if np.isnan(m)
                else f"{'**' if m >= top - 5e-4 else ''}{m:.3f}"
                f"{'**' if m >= top - 5e-4 else ''} ±{d:.3f}"
                for m, d, top in zip(mean, deviation, best, strict=True)
            ]
            lines.append(f"| {method} | " + " | ".join(cells) + " |")
    out.with_suffix(".md").write_text(
        "Mean test accuracy (± standard deviation over seeds) within a share of the unpruned\n"
        "forest's cost; the pruning is chosen on validation examples. `-`: some seed had nothing\n"
        f"that cheap. Made by `{record['command'].strip()}`.\n" + "\n".join(lines) + "\n"
    )
    out.with_suffix(".svg").write_text(standalone(plot(record)))


def plot(record: dict) -> str:
    """Accuracy lost against the unpruned forest, mean over sets, seeds and price kinds."""
    entries = list(record["sets"].values())
    series = []
    for tone, method in enumerate(m for m in entries[0]["scores"] if m not in left_out(entries)):
        lost = [
            100 * (np.array(e["scores"][method]) - np.array(e["unpruned"])[:, :1]) for e in entries
        ]
        mean = np.nanmean(np.concatenate(lost), axis=0)
        points = list(zip(entries[0]["budgets"], mean.tolist(), strict=True))
        series.append(Series(method, points, tone=tone))
    return line_chart(
        series,
        title="Accuracy against feature budget",
        x_label="budget as a share of the unpruned forest's cost",
        y_label="accuracy above the unpruned forest, points",
        height=420,
        x_text=lambda x: f"{x:.0%}",
    )


def left_out(entries: list[dict]) -> set[str]:
    return {method for entry in entries for method in entry["left_out"]}


if __name__ == "__main__":
    main()
