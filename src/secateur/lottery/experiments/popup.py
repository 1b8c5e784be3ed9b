"""Edge-popup on digits: a trained mask against random masks and against no mask at all."""

from __future__ import annotations

from typing import Any

import torch

from secateur.lottery.edge_popup import EdgePopup, shuffle_masks
from secateur.lottery.experiments.base import Experiment, Table
from secateur.lottery.targets import load_digits, mlp
from secateur.progress import Progress
from secateur.report.charts import Series, line_chart

SIZES = (64, 256, 256, 10)


def run(quick: bool, seed: int, progress: Progress) -> Experiment:
    """Test accuracy for several kept fractions; three seeds each."""
    digits = load_digits()
    keeps = (0.1, 0.5, 1.0) if quick else (0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
    seeds = range(seed, seed + (1 if quick else 3))
    rows: list[dict[str, Any]] = []
    with progress.stage("edge-popup", total=len(keeps) * len(seeds), unit="nets") as advance:
        for keep in keeps:
            for number in seeds:
                finder = EdgePopup(keep=keep, epochs=15 if quick else 40, seed=number)
                model = finder.fit(mlp(SIZES), digits.x_train, digits.y_train)
                with torch.no_grad():
                    trained = digits.accuracy(model(digits.x_test))
                    shuffle_masks(model, number)
                    shuffled = digits.accuracy(model(digits.x_test))
                rows.append({"keep": keep, "seed": number, "trained": trained, "random": shuffled})
                advance(1)
    means = [_mean(rows, keep) for keep in keeps]
    best = max(means, key=lambda m: m["trained"])
    return Experiment(
        "Edge-popup against random masks",
        (
            f"best at keep={best['keep']:g}: {best['trained']:.1%} with the trained mask, "
            f"{best['random']:.1%} with a random mask of the same size",
            f"keep=1 (the random network itself): {means[-1]['trained']:.1%}",
        ),
        (
            Table(
                f"Test accuracy on digits, MLP {'-'.join(map(str, SIZES))}, weights never trained",
                ("keep", "trained mask", "random mask"),
                tuple(
                    (f"{m['keep']:g}", f"{m['trained']:.1%}", f"{m['random']:.1%}") for m in means
                ),
            ),
        ),
        {"popup": _chart(means)},
        {"sizes": SIZES, "rows": rows, "means": means},
    )


def _mean(rows: list[dict[str, Any]], keep: float) -> dict[str, float]:
    group = [r for r in rows if r["keep"] == keep]
    return {
        "keep": keep,
        "trained": sum(r["trained"] for r in group) / len(group),
        "random": sum(r["random"] for r in group) / len(group),
    }


def _chart(means: list[dict[str, float]]) -> Any:
    return line_chart(
        [
            Series("trained mask", [(m["keep"], m["trained"]) for m in means], tone=0),
            Series("random mask", [(m["keep"], m["random"]) for m in means], tone=1),
        ],
        title="Accuracy of masked random networks",
        x_label="fraction of weights kept",
        y_label="test accuracy",
        from_zero=True,
        reference=(0.1, "chance"),
    )
