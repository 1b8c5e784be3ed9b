"""A 2:4 mask of SmolLM2-135M learned from a one-shot mask: the curve, and what it is worth.

python -m benchmarks.maskllm_smollm                  # goes on where it stopped
python -m benchmarks.maskllm_smollm --minutes 12     # stops after that time, to go on later
python -m benchmarks.maskllm_smollm --one-shot       # the masks it is compared with
python -m benchmarks.maskllm_smollm --device cuda --speed      # a step, beside plain fine-tuning
python -m benchmarks.maskllm_smollm --device cuda --steps 180 --batch 8 --text FILE --samples 128 --windows 64

Text is WikiText-2: its validation part to calibrate, learn and look on, its test part to measure.
The run's folder is kept in ``.cache/``, which git ignores. A device has a record of its own, and
time for more windows and for more text to learn from.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import secateur
from benchmarks.common import RESULTS, alternate, arguments, finish, ratio, spread
from benchmarks.maskllm import training_step
from benchmarks.stories import CACHE, ROOT
from secateur.models.anatomy import ModelView
from secateur.models.loading import load

DATA = Path(os.environ.get("SECATEUR_DATA", ROOT.parent / "shared" / "data")) / "wikitext-2"
LENGTH = 512
ONE_SHOT: dict[str, dict[str, Any]] = {
    "magnitude": {"method": "magnitude"},
    "wanda": {"method": "wanda"},
    "sparsegpt, weights updated": {"method": "sparsegpt"},
    "sparsegpt, best": {"quality": "best"},
}


def common(given: argparse.Namespace) -> dict[str, Any]:
    """What every run of this benchmark has in common."""
    return {
        "sparsity": "2:4",
        "calibration": str(given.text),
        "samples": given.samples,
        "length": LENGTH,
        "device": given.device,
        "evaluation": {
            "text": str(DATA / "test.txt"), "length": LENGTH, "windows": given.windows,
            "speed": False,
        },
    }  # fmt: skip


def speed(device: str, batch: int, rounds: int) -> dict[str, Any]:
    """Seconds of a step that learns masks, and of one that trains the same matrices' weights."""
    ids = torch.randint(0, 1000, (batch, LENGTH), device=device)

    def step_of(masked: bool) -> Callable[[], None]:
        model = load("demo", device=device).model
        matrices = {id(matrix.module.weight) for matrix in ModelView.of(model).matrices()}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in matrices)
        return training_step(model, ids, masked)

    clock = time.perf_counter if device == "cuda" else time.process_time
    seconds = alternate({"plain": step_of(False), "learned": step_of(True)}, rounds, clock)
    return {
        "windows": batch,
        "times_plain_fine_tuning": ratio(seconds["learned"], seconds["plain"]),
        "seconds": {name: spread(values, 5) for name, values in seconds.items()},
    }


def learned(options: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """The run, from wherever it is; its record."""
    name = "-".join(f"{k}={v}" for k, v in options.items())
    folder = CACHE / f"maskllm-smollm-{name}"
    before = time.process_time()
    result = secateur.prune("demo", method="maskllm", options=options, out=folder, **settings)
    report = result.report
    learning = report["learning"]
    return {
        "options": options,
        "dense": report["quality"]["dense"]["perplexity"],
        "prior": learning["prior"]["quality"]["pruned"]["perplexity"],
        "perplexity": report["quality"]["pruned"]["perplexity"],
        "changed": learning["changed"],
        "validations": learning["validations"],
        "moved": learning["moved"],
        "learning_seconds": learning["seconds"],
        "cpu_seconds_of_this_call": round(time.process_time() - before, 1),
        "memory_peak": report["memory_peak"],
        "bits_per_weight": learning["mask_file"]["bits_per_weight"],
        "text": learning["text"],
    }


def main() -> None:
    """Learn, or measure the one-shot masks."""
    parser = arguments(__doc__)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--one-shot", action="store_true")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--prior", default="sparsegpt")
    parser.add_argument("--distil", type=float, default=0.0)
    parser.add_argument("--candidates", type=int)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--text", type=Path, default=DATA / "valid.txt", help="learned from")
    parser.add_argument("--samples", type=int, default=32, help="windows of one-shot masks")
    parser.add_argument("--windows", type=int, default=16, help="of the test part")
    given = parser.parse_args()
    torch.set_num_threads(1)
    path = RESULTS / (
        "maskllm_smollm.json" if given.device == "cpu" else "maskllm_smollm_cuda.json"
    )
    record: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    kept = {k: v for k, v in record.items() if k not in ("command", "machine")}
    cells = {"one_shot": {}, "learned": {}, "step": {}} | kept
    if given.device == "cuda":
        cells["gpu"] = torch.cuda.get_device_name()
    if given.speed:
        cells["step"] = speed(given.device, given.batch if given.batch > 1 else 8, 15)
        print(cells["step"])
        finish("maskllm_smollm", cells, path)
        return
    settings = common(given)
    if given.one_shot:
        for name, how in ONE_SHOT.items():
            if name not in cells["one_shot"]:
                result = secateur.prune("demo", **how, **settings)
                quality = result.report["quality"]
                cells["one_shot"][name] = quality["pruned"]["perplexity"]
                print(f"{name}: {cells['one_shot'][name]:.2f}", flush=True)
                finish("maskllm_smollm", cells, path)
        return
    if given.minutes:
        signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
        signal.setitimer(signal.ITIMER_REAL, 60 * given.minutes)
    options = {"prior": given.prior, "steps": given.steps, "batch": given.batch, "lr": given.lr,
               "validate_every": max(1, given.steps // 12) if given.device == "cuda" else 25,
               "checkpoint_every": 25 if given.device == "cpu" else 10_000}  # fmt: skip
    if given.distil:
        options["distil"] = given.distil
    if given.candidates:
        options["candidates"] = given.candidates
    try:
        made = learned(options, settings)
    except KeyboardInterrupt:
        print("stopped; the same command goes on")
        return
    cells["learned"][" ".join(f"{k}={v}" for k, v in options.items())] = made
    print(f"prior {made['prior']:.2f}, learned {made['perplexity']:.2f}")
    finish("maskllm_smollm", cells, path)


if __name__ == "__main__":
    main()
