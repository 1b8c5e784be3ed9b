"""Accuracy against the share of attention heads removed, on an encoder and an encoder-decoder.

    python -m benchmarks.head_pruning [encoder] [seq2seq]     # JSON here, charts in docs/methods

No retraining, as in the paper (Michel et al. 2019). Removal is by closed gates, which is what
surgery does to the function (tested), so a curve costs one model. Orders: by gate gradients
scored once, by gate gradients scored anew at each step, by single-head ablation, and random.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import RESULTS, arguments, finish
from benchmarks.head_data import Task, seq2seq_task, spam_task
from secateur.evidence.ablation import ablate
from secateur.evidence.gates import GateSite, gate_gradients, gate_sites, gated
from secateur.evidence.objectives import Objective, classification, sequence_to_sequence
from secateur.files import write_text
from secateur.methods.head_selection import HeadRules, normalised
from secateur.methods.heads import HeadCut, head_schedule, of_kind
from secateur.report.charts import Series, line_chart, standalone
from tools.train_seq2seq import token_errors

CHARTS = Path(__file__).parents[1] / "docs" / "methods"
SHARES = tuple(n / 10 for n in range(1, 10))
FEW = SHARES[1::2]
"""For the orders the first is compared with."""
SEEDS = (0, 1, 2)
CLIFF = 0.05
"""A curve has fallen off when it has lost so much accuracy."""


def class_errors(model: nn.Module, batch: Any) -> Tensor:
    """1 where the class is wrong, (B,)."""
    logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    return (logits.argmax(-1) != batch["labels"]).float()


@torch.no_grad()
def accuracy(
    task: Task, errors: Objective, sites: Sequence[GateSite], cut: HeadCut | None
) -> float:
    """Share right on the test data with the cut's heads closed."""
    wrong = samples = 0.0
    with gated(sites, cut.gates() if cut else {}):
        for batch in task.test:
            found = errors(task.model, batch)
            wrong += float(found.sum())
            samples += len(found)
    return round(1 - wrong / samples, 4)


class Study:
    """Curves of one task, each order's scores made once."""

    def __init__(self, task: Task, objective: Objective, errors: Objective) -> None:
        self.task, self.objective, self.errors = task, objective, errors
        self.sites = gate_sites(task.model)
        self.dense = accuracy(task, errors, self.sites, None)

    def curve(
        self,
        scorer: Callable[..., list[Tensor]],
        sites: Sequence[GateSite] | None = None,
        rescore: bool = False,
        at_least: int = 1,
        shares: Sequence[float] = FEW,
    ) -> list[tuple[float, float]]:
        """(share removed of the sites' heads, accuracy), the dense model first."""
        sites = sites or self.sites
        total = sum(s.units for s in sites)
        most = sum(max(0, s.units - at_least) for s in sites) / total
        possible = [s for s in shares if s <= most]
        points = [(0.0, self.dense)]
        for cut in head_schedule(sites, scorer, possible, HeadRules(at_least), rescore=rescore):
            value = accuracy(self.task, self.errors, self.sites, cut)
            points.append((round(cut.removed / cut.total, 4), value))
        return points

    def gradient(self, sites: Sequence[GateSite]) -> Callable[..., list[Tensor]]:
        """Scores by gate gradients, normalised by layer."""

        def scorer(gates: Any) -> list[Tensor]:
            found = gate_gradients(
                self.task.model, sites, self.task.calibration, self.objective, gates=gates
            )
            return normalised([found[s.name] for s in sites])

        return scorer

    def random(self, sites: Sequence[GateSite], seed: int) -> Callable[..., list[Tensor]]:
        """A random order."""
        generator = torch.Generator().manual_seed(seed)
        return lambda gates: [torch.rand(s.units, generator=generator) for s in sites]

    def ablations(self) -> dict[str, Any]:
        """Every head alone away, and every head alone left: changes of the objective, nats."""
        without = ablate(self.task.model, self.sites, self.task.calibration, self.objective)
        alone = ablate(
            self.task.model, self.sites, self.task.calibration, self.objective, alone=True
        )
        self.without = without.changes()
        rows = []
        for site in self.sites:
            change, left = self.without[site.name], alone.changes()[site.name]
            rows.append(
                {
                    "layer": site.name,
                    "kind": site.kind,
                    "without": [round(float(c), 4) for c in change],
                    "best_head_alone": round(float(left.min()), 4),
                }
            )
        every = torch.cat([self.without[s.name] for s in self.sites])
        return {
            "unit": "change of the calibration loss, nats; lower is better",
            "dense_loss": round(without.baseline, 4),
            "heads": len(every),
            "heads_whose_removal_helps": int((every < 0).sum()),
            "largest_harm": round(float(every.max()), 4),
            "layers": rows,
        }


def mean_curve(curves: Sequence[list[tuple[float, float]]]) -> list[tuple[float, float]]:
    """Point by point."""
    return [
        (points[0][0], round(sum(y for _, y in points) / len(points), 4))
        for points in zip(*curves, strict=True)
    ]


def study(name: str, task: Task, objective: Objective, errors: Objective) -> dict[str, Any]:
    """All curves of one task."""
    clock = time.perf_counter()
    s = Study(task, objective, errors)
    print(f"{name}: dense accuracy {s.dense}", flush=True)
    table = s.ablations()
    print(f"  ablations {time.perf_counter() - clock:.0f} s", flush=True)
    curves = {
        "gradient": s.curve(s.gradient(s.sites), shares=SHARES),
        "gradient, re-scored": s.curve(s.gradient(s.sites), rescore=True),
        "ablation": s.curve(lambda gates: [s.without[x.name] for x in s.sites]),
    }
    seeds = [s.curve(s.random(s.sites, seed)) for seed in SEEDS]
    curves["random, mean of 3"] = mean_curve(seeds)
    print(f"  curves {time.perf_counter() - clock:.0f} s", flush=True)
    by_kind: dict[str, Any] = {}
    for kind in sorted({site.kind for site in s.sites} - {"self"}):
        sites = of_kind(s.sites, [kind])
        by_kind[kind] = {
            "gradient": s.curve(s.gradient(sites), sites, at_least=0, shares=SHARES),
            "random, mean of 3": mean_curve(
                [s.curve(s.random(sites, seed), sites, at_least=0) for seed in SEEDS]
            ),
        }
    return {
        **task.record,
        "dense_accuracy": s.dense,
        "chance_of_error_of_an_accuracy": round(
            (s.dense * (1 - s.dense) / sum(len(b["labels"]) for b in task.test)) ** 0.5, 4
        ),
        "curves": curves,
        "random_by_seed": seeds,
        "by_kind": by_kind,
        "ablation": table,
        "findings": findings(curves, by_kind),
        "seconds": round(time.perf_counter() - clock, 1),
    }


def findings(curves: dict[str, Any], by_kind: dict[str, Any]) -> dict[str, Any]:
    """The paper's qualitative claims, as found here."""
    dense = curves["gradient"][0][1]

    def flat(points: list[tuple[float, float]], loss: float) -> float:
        """Largest share up to which no more than ``loss`` accuracy is ever lost."""
        held = 0.0
        for share, value in points:
            if dense - value > loss:
                break
            held = share
        return held

    chance = curves["random, mean of 3"][1:]
    gradient = [y for x, y in curves["gradient"] if any(x == share for share, _ in chance)]
    pairs = [(g, y) for g, (_, y) in zip(gradient, chance, strict=True)]
    out: dict[str, Any] = {
        "removed_within_1_point": {n: flat(c, 0.01) for n, c in curves.items()},
        "removed_within_5_points": {n: flat(c, CLIFF) for n, c in curves.items()},
        "gradient_against_random": {
            f"{share:.0%}": [g, y] for (g, y), (share, _) in zip(pairs, chance, strict=True)
        },
        "gradient_beats_random_everywhere": all(g > y for g, y in pairs),
    }
    if by_kind:
        fall = {
            kind: round(sum(y for _, y in c["gradient"]) / len(c["gradient"]), 4)
            for kind, c in by_kind.items()
        }
        out["mean_accuracy_over_shares_by_kind"] = fall
        out["most_fragile_kind"] = min(fall, key=lambda kind: fall[kind])
    return out


def charts(name: str, record: dict[str, Any], folder: Path) -> None:
    """``head_pruning_NAME.svg``, and ``..._by_kind.svg`` where there are kinds."""
    level = (record["dense_accuracy"], "dense")
    lines = {f"head_pruning_{name}": record["curves"]}
    if record["by_kind"]:
        lines[f"head_pruning_{name}_by_kind"] = {
            f"{kind}, {order.split(',')[0]}": points
            for kind, orders in record["by_kind"].items()
            for order, points in orders.items()
        }
    for file, curves in lines.items():
        svg = line_chart(
            [Series(label, points, tone=n) for n, (label, points) in enumerate(curves.items())],
            title=f"Accuracy against heads removed ({name})",
            x_label="share of heads removed",
            y_label="test accuracy",
            height=340,
            reference=level,
            description=f"{record['task']}; no retraining",
        )
        write_text(folder / f"{file}.svg", standalone(svg))


def main() -> None:
    """Run the studies named, and keep the figures of the others."""
    parser = arguments(__doc__)
    parser.add_argument("names", nargs="*", choices=["encoder", "seq2seq", []])
    parser.add_argument("--seq2seq", type=Path, help="folder of tools/train_seq2seq.py")
    parser.add_argument(
        "--mails",
        type=int,
        nargs=3,
        default=(800, 64, 250),
        metavar=("FITTED", "CALIBRATION", "TEST"),
        help="how many the encoder's classifier, its ranking and its accuracy are made of",
    )
    given = parser.parse_args()
    names = given.names or ["encoder", "seq2seq"]
    target = given.json or RESULTS / "head_pruning.json"
    for name in names:
        record = (
            study(name, spam_task(*given.mails), classification, class_errors)
            if name == "encoder"
            else study(name, seq2seq_task(folder=given.seq2seq), sequence_to_sequence, token_errors)
        )
        sys.argv[1:] = [name]  # the record says what was measured, not where files lay
        if name == "encoder":
            sys.argv += ["--mails", *map(str, given.mails)]
        own = target.with_name(f"{target.stem}_{name}.json")
        finish("head_pruning", {name: record}, own)
        charts(name, record, CHARTS)
        print(record["findings"], flush=True)


if __name__ == "__main__":
    main()
