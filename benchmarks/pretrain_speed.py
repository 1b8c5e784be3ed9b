"""What pruning-aware pretraining costs beside the training itself, and what shrinking gains.

    python -m benchmarks.pretrain_speed            # SmolLM2-135M from its package: minutes
    python -m benchmarks.pretrain_speed --keep 0.97 --steps 2 3 1 --batch 2
    python -m benchmarks.pretrain_speed --model tiny

One training of a few steps with one thread, in CPU time: dense steps first, then an event after
every step down to ``--keep`` of the parameters, then steps of the small model. Reported as ratios
to a dense step of the same run: saliency, events with second-order compensation, and the speed of
the small model against its FLOPs. Writes benchmarks/results/pretrain_speed.json.
"""

from __future__ import annotations

import argparse
import json
import time
from statistics import median
from typing import Any

import torch

from benchmarks.common import RESULTS, spread
from secateur.data.windows import training_windows
from secateur.models.loading import load
from secateur.training.efficientllm import PruneOptions, PruningAware
from secateur.training.hooks import Training
from secateur.training.loop import fit
from secateur.training.prune_schedule import PruneSchedule
from secateur.training.settings import TrainSettings


class Timed(PruningAware):
    """Notes CPU seconds of each part of each step."""

    def __init__(self, options: PruneOptions) -> None:
        super().__init__(options)
        self.rows: list[dict[str, float]] = []
        self._start: float | None = None
        self._saliency = 0.0

    def before_forward(self, at: Training) -> None:
        """The step begins with its first forward."""
        super().before_forward(at)
        if self._start is None:
            self._start = time.process_time()

    def after_backward(self, at: Training) -> None:
        """Saliency by itself."""
        start = time.process_time()
        super().after_backward(at)
        self._saliency = time.process_time() - start

    def after_step(self, at: Training) -> None:
        """The step, and then the event by itself."""
        now = time.process_time()
        assert self._start is not None
        flops, events = self._now().now().flops, len(self.events)
        super().after_step(at)
        self.rows.append(
            {
                "step": now - self._start - self._saliency,
                "saliency": self._saliency,
                "event": time.process_time() - now,
                "choices": len(self.events) - events,
                "flops": flops,
            }
        )
        print(json.dumps(self.rows[-1]), flush=True)
        self._start = None


def measure(
    name: str, keep: float, batch: int, length: int, saliency: str, counts: tuple[int, int, int]
) -> dict[str, Any]:
    """The run, and its ratios.

    Args:
        counts: dense steps, steps with an event, steps of the small model.
    """
    dense, events, small = counts
    loaded = load(name, dtype="float32")
    model = loaded.model.train()
    model.requires_grad_(True)
    steps = dense + events + small
    data = training_windows("pydoc", loaded.tokenizer, steps * batch * length, length)
    total = sum(p.numel() for p in model.parameters())
    hook = Timed(
        PruneOptions(
            int(keep * total),
            PruneSchedule(start=dense, stop=dense + events),
            saliency=saliency,  # type: ignore[arg-type]
            context=length,
        )
    )
    settings = TrainSettings(steps=steps, lr=1e-5, batch=batch, micro_batch=1)
    fit(model, data, settings, hooks=[hook])
    first = [r["step"] for r in hook.rows[1:dense]]  # the first one allocates
    last = [r["step"] for r in hook.rows[-small + 1 :]]
    step = median(first)
    cuts = [r for r in hook.rows if r["choices"]]
    speed, flops = step / median(last), hook.rows[0]["flops"] / hook.rows[-1]["flops"]
    return {
        "model": loaded.name,
        "parameters": [total, hook.parameters],
        "tokens_per_step": batch * length,
        "saliency_kind": saliency,
        "dense_step_seconds": spread(first),
        "saliency_of_a_step": spread([r["saliency"] / step for r in hook.rows[:dense]], 4),
        "event_of_a_step": spread([r["event"] / step for r in cuts]),
        "choices_in_an_event": [int(r["choices"]) for r in cuts],
        "types": {k: sum(e["type"] == k for e in hook.events) for k in ("head", "ffn", "stem")},
        "small_model": {
            "speed": round(speed, 3),
            "flops_ratio": round(flops, 3),
            "reached": round(speed / flops, 3),
        },
        "wanted": {"saliency": 0.03, "event": 1.0, "reached": 0.8},
    }


def main() -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo", help="'demo' is SmolLM2-135M")
    parser.add_argument("--keep", type=float, default=0.6)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--saliency", default="taylor1")
    parser.add_argument("--steps", type=int, nargs=3, default=(3, 5, 4))
    options = parser.parse_args()
    torch.set_num_threads(1)
    record = measure(
        options.model,
        options.keep,
        options.batch,
        options.length,
        options.saliency,
        tuple(options.steps),
    )
    print(json.dumps(record, indent=1))
    if options.model == "demo":
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / "pretrain_speed.json"
        cases = json.loads(path.read_text()) if path.exists() else {}
        words = f"keep {options.keep:g} in {options.steps[1]} events, batch {options.batch}"
        path.write_text(json.dumps(cases | {words: record}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
