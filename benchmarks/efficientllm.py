"""Pruning-aware pretraining against pruning first, and against training the found shape from scratch.

    python -m benchmarks.efficientllm              # stories260k: 30, 50 and 60 % of the parameters go
    python -m benchmarks.efficientllm --rates      # choose the learning rates (before the grid)
    python -m benchmarks.efficientllm --draw       # table and picture from the results

Every arm sees the same windows for the same number of steps and ends with the same number of
parameters (but for a unit's weight). The arms that prune at once look at 64 windows more. Cells
already in the result file are kept, so a stopped grid goes on.
"""

from __future__ import annotations

import copy
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import secateur
from benchmarks.common import RESULTS, arguments, finish
from benchmarks.slimgpt import perplexity
from benchmarks.stories import sampled_windows, stories_folder
from secateur.data.windows import Windows
from secateur.models.loading import load
from secateur.report.charts import Series, line_chart, standalone
from secateur.training.efficientllm import PruneOptions, PruningAware
from secateur.training.loop import fit
from secateur.training.prune_schedule import PruneSchedule
from secateur.training.settings import TrainSettings
from secateur.training.unit_choice import Rules

STEPS, BATCH, LENGTH = 150, 8, 128
SHARES = (0.3, 0.5, 0.6)
SEEDS = (0, 1, 2)
FROM, UNTIL = 0.02, 0.3
CALIBRATION = 8
"""Batches the arms that prune at once look at."""
ARMS: dict[str, dict[str, Any]] = {
    "pruned while it trains": {},
    "the same, first order only": {"second_order": False},
    "the same, raw saliency": {"rules": Rules(normalize="raw")},
    "the same, second-order saliency": {"saliency": "obd"},
    "the same, pruned in 8 % of the steps": {"until": 0.1},
    "pruned at once, then trained": {},
    "the same at once, first order only": {"second_order": False},
    "LLM-Pruner, then trained": {},
    "found shape from scratch": {},
}
ONLY_AT_HALF = (
    "the same, raw saliency",
    "the same, second-order saliency",
    "the same, pruned in 8 % of the steps",
    "the same at once, first order only",
)
RATES = {"inherits": (1e-3, 3e-3, 1e-2), "scratch": (3e-3, 1e-2)}


class Bench:
    """The model, its windows, and cells of (share, arm, seed)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.dense = load(str(stories_folder())).model
        self.initial = sum(p.numel() for p in self.dense.parameters())
        self.train = sampled_windows(STEPS * BATCH, 0, LENGTH)
        self.choice = sampled_windows(64, 2000, LENGTH)
        self.held = sampled_windows(256, 1000, LENGTH)
        self.record: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        self.record.setdefault("cells", {})
        self.record.setdefault("rates", {})
        self.record["model"] = "stories260k"
        self.record["parameters"] = self.initial
        self.record["settings"] = {
            "steps": STEPS, "batch": BATCH, "length": LENGTH, "tokens": STEPS * BATCH * LENGTH,
            "prune_from": FROM, "prune_until": UNTIL, "calibration_batches": CALIBRATION,
        }  # fmt: skip

    def save(self) -> None:
        finish("efficientllm", {k: v for k, v in self.record.items() if k != "command"}, self.path)

    # -- arms ----------------------------------------------------------------------------------

    def model(
        self, arm: str, share: float, seed: int, lr: float
    ) -> tuple[nn.Module, dict[str, Any]]:
        """The trained model of an arm, and what is worth keeping of how it came about."""
        budget = round((1 - share) * self.initial)
        data = Windows(self.train)
        options: dict[str, Any] = dict(ARMS[arm])
        until = options.pop("until", UNTIL)
        settings = TrainSettings(
            steps=STEPS, batch=BATCH, lr=lr, warmup=0.05, schedule="cosine", seed=seed,
            checkpoint_every=None,
        )  # fmt: skip
        if arm == "found shape from scratch":
            model = self._shape(share, seed)
            fit(model, data, settings)
            return model, {}
        model = copy.deepcopy(self.dense).train().requires_grad_(True)
        if arm == "LLM-Pruner, then trained":
            secateur.prune(
                model,
                calibration=self._looked_at(seed),
                samples=CALIBRATION * BATCH,
                method="llm-pruner",
                sparsity=share,
                structure={"kinds": ["head", "ffn"], "target_kind": "parameters", "uniform": True},
            )
            model.train().requires_grad_(True)
            fit(model, data, settings)
            return model, {"shape": shape(model)}
        if "at once" in arm:
            # The rate is 0: gradients of unchanged weights, then everything goes in one event.
            still = TrainSettings(
                steps=CALIBRATION + 1, batch=BATCH, lr=0.0, seed=seed, checkpoint_every=None
            )
            schedule = PruneSchedule(start=CALIBRATION, stop=CALIBRATION + 1)
            hook = PruningAware(
                PruneOptions(budget, schedule, memory=None, context=LENGTH, **options)
            )
            fit(model, Windows(self._looked_at(seed)), still, hooks=[hook])
            fit(model, data, settings)
            return model, {"shape": shape(model), "types": types(hook)}
        schedule = PruneSchedule(start=max(1, round(FROM * STEPS)), stop=round(until * STEPS))
        hook = PruningAware(PruneOptions(budget, schedule, context=LENGTH, **options))
        fit(model, data, settings, hooks=[hook])
        return model, {"shape": shape(model), "types": types(hook), "seconds": hook.seconds}

    def _looked_at(self, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randperm(len(self.train), generator=generator)[: CALIBRATION * BATCH]
        return self.train[rows]

    def _shape(self, share: float, seed: int) -> nn.Module:
        """A model of the shape that pruning while training found, newly initialised."""
        found = self.record["cells"][f"{share}/pruned while it trains/{seed}"]["shape"]
        config = copy.deepcopy(self.dense.config)
        config.hidden_size, config.intermediate_size = found["width"], found["ffn"]
        config.head_dim = self.dense.config.hidden_size // self.dense.config.num_attention_heads
        config.num_attention_heads, config.num_key_value_heads = found["heads"], found["kv"]
        from transformers import MistralConfig, MistralForCausalLM

        words = {
            k: v for k, v in config.to_dict().items() if k not in ("model_type", "architectures")
        }
        torch.manual_seed(seed)
        # Llama's config refuses widths that heads do not divide; Mistral's is the same computation.
        return MistralForCausalLM(MistralConfig(**{**words, "sliding_window": None}))

    # -- cells ---------------------------------------------------------------------------------

    def rate(self, arm: str) -> float:
        kind = "scratch" if "scratch" in arm else "inherits"
        return float(self.record["rates"][kind]["chosen"])

    def choose_rates(self) -> None:
        """Each kind's rate, by perplexity on windows of their own at 50 %, seed 0."""
        for kind, arms in (
            ("inherits", ("pruned while it trains", "pruned at once, then trained")),
            ("scratch", ("found shape from scratch",)),
        ):
            tried = self.record["rates"].setdefault(kind, {"tried": {}})["tried"]
            for lr in RATES[kind]:
                for arm in arms:
                    key = f"{arm}, {lr:g}"
                    if key not in tried:
                        cell, model = self.cell(arm, 0.5, 0, lr)
                        tried[key] = {
                            "choice": round(perplexity(model, self.choice), 4),
                            "cell": cell,
                        }
                        print(key, tried[key]["choice"], flush=True)
                        self.save()
            means = {
                lr: statistics.mean(tried[f"{arm}, {lr:g}"]["choice"] for arm in arms)
                for lr in RATES[kind]
            }
            chosen = min(means, key=lambda lr: means[lr])
            self.record["rates"][kind]["chosen"] = chosen
            for arm in arms:  # the same training as the grid's
                self.record["cells"].setdefault(f"0.5/{arm}/0", tried[f"{arm}, {chosen:g}"]["cell"])
            self.save()

    def cell(
        self, arm: str, share: float, seed: int, lr: float
    ) -> tuple[dict[str, Any], nn.Module]:
        """An arm trained and measured."""
        start = time.process_time()
        model, kept = self.model(arm, share, seed, lr)
        model.eval()
        return {
            **kept,
            "perplexity": round(perplexity(model, self.held), 4),
            "parameters": sum(p.numel() for p in model.parameters()),
            "cpu_seconds": round(time.process_time() - start, 1),
        }, model

    def run(self, seeds: tuple[int, ...]) -> None:
        """Every cell that is not there yet, seed by seed."""
        self.record.setdefault("dense", round(perplexity(self.dense, self.held), 4))
        for seed in seeds:
            for share in SHARES:
                for arm in ARMS:
                    key = f"{share}/{arm}/{seed}"
                    if "perplexity" in self.record["cells"].get(key, {}):
                        continue
                    if arm in ONLY_AT_HALF and share != 0.5:
                        continue
                    cell, _ = self.cell(arm, share, seed, self.rate(arm))
                    self.record["cells"][key] = cell
                    print(key, self.record["cells"][key]["perplexity"], flush=True)
                    self.save()


def shape(model: nn.Module) -> dict[str, int]:
    """Widths of a model whose layers are alike."""
    layer = model.model.layers[0]
    head_dim = layer.self_attn.head_dim
    return {
        "heads": layer.self_attn.q_proj.out_features // head_dim,
        "kv": layer.self_attn.k_proj.out_features // head_dim,
        "ffn": layer.mlp.down_proj.in_features,
        "width": model.model.embed_tokens.embedding_dim,
    }


def types(hook: PruningAware) -> list[list[Any]]:
    """[type, how many in a row, parameters after them] of what went, in order."""
    out: list[list[Any]] = []
    for event in hook.events:
        if out and out[-1][0] == event["type"]:
            out[-1][1] += 1
            out[-1][2] = event["parameters"]
        else:
            out.append([event["type"], 1, event["parameters"]])
    return out


# -- table and picture -----------------------------------------------------------------------------


def table(record: dict[str, Any]) -> list[tuple[str, dict[float, list[float]]]]:
    """Arm -> share -> perplexities over seeds."""
    rows = []
    for arm in ARMS:
        found = {
            share: [
                cell["perplexity"]
                for seed in SEEDS
                if "perplexity" in (cell := record["cells"].get(f"{share}/{arm}/{seed}", {}))
            ]
            for share in SHARES
        }
        rows.append((arm, {share: values for share, values in found.items() if values}))
    return rows


def markdown(record: dict[str, Any]) -> str:
    """Means, and the least and the largest of the seeds."""
    head = "| | " + " | ".join(f"{share:.0%} removed" for share in SHARES) + " |"
    lines = [head, "|---" * (len(SHARES) + 1) + "|"]
    for arm, found in table(record):
        cells = []
        for share in SHARES:
            values = found.get(share, [])
            if not values:
                cells.append("")
                continue
            mean = statistics.mean(values)
            cells.append(f"{mean:.3f} ({min(values):.3f}-{max(values):.3f})")
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def picture(record: dict[str, Any]) -> str:
    """SVG: mean perplexity of the arms that inherit weights over the share removed; seeds as diamonds."""
    series = []
    for arm, found in table(record):
        points = [(share, statistics.mean(values)) for share, values in found.items()]
        if "scratch" in arm or len(points) < 2:
            continue
        each = [(share, v, f"seed {i}") for share, vs in found.items() for i, v in enumerate(vs)]
        series.append(Series(arm, points, each, len(series)))
    return standalone(
        line_chart(
            series,
            title="stories260k: perplexity over the share of parameters removed",
            x_label="parameters removed (diamonds: seeds)",
            y_label="perplexity, held out",
            reference=(record["dense"], "dense"),
            x_text=lambda x: f"{x:.0%}",
        )
    )


def main() -> None:
    """See the module."""
    parser = arguments(__doc__)
    parser.add_argument("--rates", action="store_true", help="choose the learning rates only")
    parser.add_argument("--seeds", type=int, nargs="*", default=list(SEEDS))
    parser.add_argument("--draw", action="store_true", help="table and picture only")
    given = parser.parse_args()
    path = given.json or RESULTS / "efficientllm.json"
    if given.draw:
        record = json.loads(path.read_text())
        print(markdown(record))
        folder = Path(__file__).parents[1] / "docs" / "methods"
        (folder / "efficientllm.svg").write_text(picture(record))
        return
    torch.set_num_threads(1)
    bench = Bench(path)
    bench.choose_rates()
    if not given.rates:
        bench.run(tuple(given.seeds))
        print(markdown(bench.record))


if __name__ == "__main__":
    main()
