"""SlimGPT on real models: its time against its own forwards, and quality by variant.

    python -m benchmarks.slimgpt stories      # quality on stories260k, three calibration seeds
    python -m benchmarks.slimgpt smollm2      # time and quality on SmolLM2-135M (many minutes)

Whole units go: key-value groups with their query heads, and MLP channels. Perplexity is that of
the model as it comes out, nothing is trained afterwards.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn

import secateur
from benchmarks.common import arguments, finish, verdict
from benchmarks.stories import sampled_windows, stories_folder
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
SMOLLM2 = (
    "slimgpt",
    "exact",
    "initial_diag",
    "no compensation",
    "log increase, r0 = 0.0625",
    "unit-magnitude",
)


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
                result = secateur.prune(
                    load(folder).model,
                    calibration=sampled_windows(64, seed, 128),
                    **{"method": "slimgpt", "sparsity": share, "samples": 64, **settings},
                )
                assert result.model is not None
                found.append(perplexity(result.model, held_out))
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


def smollm2(samples: int, length: int) -> dict[str, Any]:
    """Time at 50 %, and quality of some variants."""
    text = {"calibration": "wikitext-2:train", "samples": samples, "length": length}
    loaded = load("demo")
    from secateur.data.windows import calibration_windows

    windows = calibration_windows(
        "wikitext-2:train",
        loaded.tokenizer,
        samples=samples,
        length=length,
        seed=0,
        vocabulary=loaded.vocabulary,
    )
    view = ModelView.of(loaded.model)
    start = time.process_time()
    Replay(view, windows.ids, batch_size=max(1, 2048 // length)).start().to_end()
    forward = time.process_time() - start
    clock, begin = _Timed(), time.process_time()
    with clock:
        secateur.prune(
            loaded.model,
            loaded.tokenizer,
            calibration=windows.ids,
            method="slimgpt",
            sparsity=0.5,
            samples=samples,
        )
    whole = time.process_time() - begin
    forwards = whole - clock.seconds
    times = whole / forwards
    print(
        f"SmolLM2, 50 %: {whole:.0f} s CPU, {clock.seconds:.0f} s of it solving: {times:.2f} x its "
        f"calibration forwards {verdict(times, LIMIT)}; {whole / forward:.2f} x one plain forward"
    )
    table: dict[str, Any] = {}
    for share in (0.25, 0.5):
        for name in SMOLLM2:
            settings = VARIANTS[name]
            report = secateur.prune(
                "demo",
                **{"method": "slimgpt", "sparsity": share, **text, **settings},
                evaluation={
                    "text": "wikitext-2:test",
                    "length": 512,
                    "windows": 8,
                    "speed": False,
                },
            ).report
            quality = report["quality"]
            table["dense"] = round(quality["dense"]["perplexity"], 3)
            table.setdefault(name, {})[str(share)] = {
                "perplexity": round(quality["pruned"]["perplexity"], 3),
                "kl": round(quality["kl"], 4),
                "parameters": report["structure"]["parameters"],
                "delivered": round(report["totals"]["delivered"], 4),
            }
            print(f"{share:.0%} {name:30} {quality['pruned']['perplexity']:9.3f}", flush=True)
    return {
        "calibration": text,
        "cpu_seconds": {
            "whole": round(whole, 1),
            "solving": round(clock.seconds, 1),
            "plain_forward": round(forward, 1),
        },
        "times_its_forwards": round(times, 3),
        "limit": LIMIT,
        "perplexity": table,
    }


def main() -> None:
    """One part."""
    parser = arguments(__doc__)
    parser.add_argument("part", choices=["stories", "smollm2"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.part == "stories":
        figures: dict[str, Any] = {"perplexity": stories(given.seeds), "seeds": given.seeds}
    else:
        figures = smollm2(given.samples, given.length)
    path = given.json
    if path is None:
        from benchmarks.common import RESULTS

        path = RESULTS / f"slimgpt_{given.part}.json"
    finish("slimgpt", figures, path)


if __name__ == "__main__":
    main()
