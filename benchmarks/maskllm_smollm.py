"""A 2:4 mask of SmolLM2-135M learned from a one-shot mask: the curve, and what it is worth.

python -m benchmarks.maskllm_smollm                  # goes on where it stopped
python -m benchmarks.maskllm_smollm --minutes 12     # stops after that time, to go on later
python -m benchmarks.maskllm_smollm --one-shot       # the masks it is compared with

Text is WikiText-2: its validation part to calibrate, learn and look on, its test part to measure.
The run's folder is kept in ``.cache/``, which git ignores.
"""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import torch

import secateur
from benchmarks.common import RESULTS, arguments, finish
from benchmarks.stories import CACHE, ROOT

DATA = Path(os.environ.get("SECATEUR_DATA", ROOT.parent / "shared" / "data")) / "wikitext-2"
PATH = RESULTS / "maskllm_smollm.json"
COMMON: dict[str, Any] = {
    "sparsity": "2:4",
    "calibration": str(DATA / "valid.txt"),
    "samples": 32,
    "length": 512,
    "evaluation": {"text": str(DATA / "test.txt"), "length": 512, "windows": 16, "speed": False},
}
ONE_SHOT: dict[str, dict[str, Any]] = {
    "magnitude": {"method": "magnitude"},
    "wanda": {"method": "wanda"},
    "sparsegpt, weights updated": {"method": "sparsegpt"},
}


def learned(options: dict[str, Any]) -> dict[str, Any]:
    """The run, from wherever it is; its record."""
    name = "-".join(f"{k}={v}" for k, v in options.items())
    folder = CACHE / f"maskllm-smollm-{name}"
    before = time.process_time()
    result = secateur.prune("demo", method="maskllm", options=options, out=folder, **COMMON)
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
    given = parser.parse_args()
    torch.set_num_threads(1)
    record: dict[str, Any] = json.loads(PATH.read_text()) if PATH.exists() else {}
    cells = {k: record.get(k, {}) for k in ("one_shot", "learned")}
    if given.one_shot:
        for name, how in ONE_SHOT.items():
            if name not in cells["one_shot"]:
                result = secateur.prune("demo", **how, **COMMON)
                quality = result.report["quality"]
                cells["one_shot"][name] = quality["pruned"]["perplexity"]
                print(f"{name}: {cells['one_shot'][name]:.2f}", flush=True)
                finish("maskllm_smollm", cells, PATH)
        return
    if given.minutes:
        signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
        signal.setitimer(signal.ITIMER_REAL, 60 * given.minutes)
    options = {"prior": given.prior, "steps": given.steps, "batch": 1, "lr": given.lr,
               "validate_every": 25, "checkpoint_every": 25}  # fmt: skip
    if given.distil:
        options["distil"] = given.distil
    try:
        made = learned(options)
    except KeyboardInterrupt:
        print("stopped; the same command goes on")
        return
    cells["learned"][" ".join(f"{k}={v}" for k, v in options.items())] = made
    print(f"prior {made['prior']:.2f}, learned {made['perplexity']:.2f}")
    finish("maskllm_smollm", cells, PATH)


if __name__ == "__main__":
    main()
