"""SlimGPT on real models: its time against its own forwards, and quality by variant.

    python -m benchmarks.slimgpt stories      # quality on stories260k, three calibration seeds
    python -m benchmarks.slimgpt time         # SmolLM2-135M, its first three blocks: half a minute
    python -m benchmarks.slimgpt smollm2      # time and quality on all of SmolLM2-135M (many minutes)

Whole units go: key-value groups with their query heads, and MLP channels. Perplexity is that of
the model as it comes out, nothing is trained afterwards.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import secateur
from benchmarks.common import RESULTS, arguments, finish, verdict
from benchmarks.stories import sampled_windows, stories_folder
from secateur.data.windows import calibration_windows, evaluation_windows
from secateur.evidence.replay import Replay
from secateur.methods.slimgpt import SlimGPT
from secateur.methods.structured_base import UnitDecision, UnitProblem
from secateur.models.anatomy import ModelView
from secateur.models.loading import load

LIMIT = 2.0
FIRST = {"name": "incremental", "first": 0.0625}
VARIANTS: dict[str, dict[str, Any]] = {
    "slimgpt": {},
    "exact": {"options": {"head_score": "exact"}},
    "initial_diag": {"options": {"head_score": "initial_diag"}},
    "exact + local search": {"options": {"head_score": "exact", "local_search": 20}},
    "no compensation": {"options": {"compensate": False}},
    "all channels at once": {"options": {"group_size": "1/1"}},
    "channels one by one": {"options": {"group_size": 1}},
    "log increase, r0 = 0.0625": {"allocation": FIRST},
    "linear increase, r0 = 0.0625": {"allocation": {**FIRST, "shape": "linear"}},
    "log decrease, last = 0.0625": {"allocation": {**FIRST, "direction": "decrease"}},
    "dense target": {"reconstruct": "dense"},
    "unit-magnitude": {"method": "unit-magnitude"},
    "unit-random": {"method": "unit-random"},
}
SMOLLM2 = ("slimgpt", "unit-magnitude", "no compensation", "exact")


@torch.no_grad()
def perplexity(model: nn.Module, ids: Tensor) -> float:
    """exp of the mean cross-entropy of each next token."""
    total = 0.0
    for rows in ids.split(16):
        logits = model(input_ids=rows).logits[:, :-1]
        total += float(
            nn.functional.cross_entropy(
                logits.flatten(0, 1).float(), rows[:, 1:].flatten(), reduction="sum"
            )
        )
    return float(torch.tensor(total / (ids.shape[0] * (ids.shape[1] - 1))).exp())


def stories(seeds: int) -> dict[str, Any]:
    """Perplexity of every variant at 25 % and 50 %, over calibration texts of several seeds."""
    held_out = sampled_windows(128, 1000, 128)
    folder = str(stories_folder())
    table: dict[str, Any] = {"dense": round(perplexity(load(folder).model, held_out), 3)}
    for share in (0.25, 0.5):
        for name, settings in VARIANTS.items():
            found = []
            for seed in range(seeds):
                model = load(folder).model
                result = secateur.prune(
                    model,
                    calibration=sampled_windows(64, seed, 128),
                    **{"method": "slimgpt", "sparsity": share, "samples": 64, **settings},
                )
                found.append(perplexity(model, held_out))
            table.setdefault(name, {})[str(share)] = {
                "mean": round(statistics.mean(found), 3),
                "each": [round(p, 3) for p in found],
                "delivered": round(result.report["totals"]["delivered"], 4),
            }
            print(f"{share:.0%} {name:30} {statistics.mean(found):8.3f}", flush=True)
    return table


class _Timed:
    """CPU seconds spent in ``SlimGPT.decide`` while it lasts."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.plain = SlimGPT.decide

    def __enter__(self) -> _Timed:
        def decide(method: SlimGPT, problem: UnitProblem) -> UnitDecision:
            start = time.process_time()
            decision = self.plain(method, problem)
            self.seconds += time.process_time() - start
            return decision

        SlimGPT.decide = decide  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        SlimGPT.decide = self.plain  # type: ignore[method-assign]


def smollm2(samples: int, length: int, path: Path) -> None:
    """Quality of some variants and SlimGPT's time at 50 %; written after every cell."""
    table: dict[str, Any] = {}
    figures: dict[str, Any] = {
        "calibration": {"text": "wikitext-2:train", "samples": samples, "length": length},
        "evaluation": {"text": "wikitext-2:test", "windows": 8, "length": 512},
        "perplexity": table,
    }
    for name in SMOLLM2:
        for share in (0.5, 0.25):
            loaded = load("demo")
            drawn = {"length": length, "vocabulary": loaded.vocabulary}
            ids = calibration_windows(
                "wikitext-2:train", loaded.tokenizer, samples=samples, seed=0, **drawn
            ).ids
            test = evaluation_windows(
                "wikitext-2:test", loaded.tokenizer, 512, limit=8, vocabulary=loaded.vocabulary
            ).ids
            if not table:
                table["dense"] = round(perplexity(loaded.model, test), 3)
                start = time.process_time()
                view = ModelView.of(loaded.model)
                Replay(view, ids, batch_size=max(1, 2048 // length)).start().to_end()
                plain = time.process_time() - start
            with _Timed() as clock:
                begin = time.process_time()
                result = secateur.prune(
                    loaded.model,
                    loaded.tokenizer,
                    calibration=ids,
                    **{"method": "slimgpt", "sparsity": share, **VARIANTS[name]},
                    samples=samples,
                )
                whole = time.process_time() - begin
            table.setdefault(name, {})[str(share)] = {
                "perplexity": round(perplexity(loaded.model, test), 3),
                "parameters": result.report["structure"]["parameters"],
                "delivered": round(result.report["totals"]["delivered"], 4),
            }
            print(f"{share:.0%} {name:20} {table[name][str(share)]['perplexity']:9.3f}", flush=True)
            if name == "slimgpt" and share == 0.5:
                times = whole / (whole - clock.seconds)
                figures["time"] = {
                    "cpu_seconds": round(whole, 1),
                    "of_which_solving": round(clock.seconds, 1),
                    "plain_forward": round(plain, 1),
                    "times_its_forwards": round(times, 3),
                    "times_a_plain_forward": round(whole / plain, 3),
                    "limit": LIMIT,
                }
                print(f"{times:.2f} x its calibration forwards {verdict(times, LIMIT)}", flush=True)
            finish("slimgpt", figures, path)


def first_blocks(blocks: int, samples: int, length: int) -> dict[str, Any]:
    """SlimGPT's time against its forwards at 25 % and 50 %, on the first blocks of SmolLM2.

    Forwards and solves both go block by block, so the ratio of a few blocks is that of all.
    """
    figures: dict[str, Any] = {"blocks": blocks, "samples": samples, "length": length}
    for share in (0.25, 0.5):
        loaded = load("demo")
        model: Any = loaded.model
        model.model.layers = model.model.layers[:blocks]
        model.config.num_hidden_layers = blocks
        ids = calibration_windows(
            "pydoc",
            loaded.tokenizer,
            samples=samples,
            length=length,
            seed=0,
            vocabulary=loaded.vocabulary,
        ).ids
        with _Timed() as clock:
            begin = time.process_time()
            result = secateur.prune(
                model, loaded.tokenizer, calibration=ids, method="slimgpt", sparsity=share,
                samples=samples,
            )  # fmt: skip
        whole = time.process_time() - begin
        times = whole / (whole - clock.seconds)
        figures[str(share)] = {
            "cpu_seconds": round(whole, 2),
            "of_which_solving": round(clock.seconds, 2),
            "times_its_forwards": round(times, 3),
            "limit": LIMIT,
            "delivered": round(result.report["totals"]["delivered"], 4),
        }
        print(f"{share:.0%}: {times:.2f} x its calibration forwards {verdict(times, LIMIT)}")
    return figures


def main() -> None:
    """One part."""
    parser = arguments(__doc__)
    parser.add_argument("part", choices=["stories", "time", "smollm2"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--blocks", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    path = given.json or RESULTS / f"slimgpt_{given.part}.json"
    if given.part == "smollm2":
        smollm2(given.samples, given.length, path)
    elif given.part == "time":
        finish("slimgpt", first_blocks(given.blocks, given.samples, given.length), path)
    else:
        finish("slimgpt", {"perplexity": stories(given.seeds), "seeds": given.seeds}, path)


if __name__ == "__main__":
    main()
