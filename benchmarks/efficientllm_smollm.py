"""SmolLM2-135M loses 30 % of its parameters while it trains; killed on the way and taken up again.

    python -m benchmarks.efficientllm_smollm

One run of ``secateur pretrain demo``: killed with SIGKILL once step ``KILL`` is done, then the same
command again, to its end. Losses of the steps that were done twice are compared. CPU time counts
both attempts.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, arguments, finish

KEEP, TOKENS, BATCH, LENGTH = 0.7, 15_360, 2, 128
KILL, EVERY = 17, 10
LIMIT = 3600.0


def command(model: str, folder: Path) -> list[str]:
    """The run."""
    settings = {
        "prune_from": 0.05,
        "prune_until": 0.4,
        "checkpoint_every": EVERY,
        "validate_every": 30,
    }
    pairs = [w for k, v in settings.items() for w in ("-R", f"{k}={v}")]
    return [
        "pretrain", model, "--keep-params", str(KEEP), "--tokens", str(TOKENS),
        "--batch", str(BATCH), "--length", str(LENGTH), "--text", "wikitext-2:train",
        "--eval-text", "wikitext-2:test", "--eval-length", "256", "--eval-windows", "16",
        "--lr", "3e-4", *pairs, "--out", str(folder), "--json",
    ]  # fmt: skip


def losses(folder: Path) -> dict[int, float]:
    """Step -> loss, of what the training has written so far."""
    out = {}
    for path in folder.rglob("metrics.jsonl"):
        for line in path.read_text("utf-8").splitlines():
            try:
                row = json.loads(line)
            except ValueError:  # the line under way when it was killed
                continue
            if "loss" in row:
                out[row["step"]] = row["loss"]
    return out


def main() -> None:
    """See the module."""
    parser = arguments(__doc__)
    parser.add_argument(
        "--folder", type=Path, default=RESULTS.parent / ".cache" / "smollm-pretrain"
    )
    parser.add_argument("--model", default="demo", help="tiny, to try this file out")
    given = parser.parse_args()
    shutil.rmtree(given.folder, ignore_errors=True)
    words = [sys.executable, "-m", "secateur", *command(given.model, given.folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    started = time.perf_counter()
    first = subprocess.Popen(
        words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    before: dict[int, float] = {}
    while first.poll() is None and max(before, default=0) < KILL:
        time.sleep(1)
        before = losses(given.folder)
    first.send_signal(signal.SIGKILL)
    first.wait()
    before = losses(given.folder)
    print(f"killed after step {max(before, default=0)}", flush=True)
    second = subprocess.run(words, env=environment, stdout=subprocess.PIPE, text=True)
    if second.returncode:
        raise SystemExit(second.returncode)
    report: dict[str, Any] = json.loads(second.stdout.strip().splitlines()[-1])
    after = {int(step): loss for step, loss in report["pretraining"]["losses"]}
    again = [s for s in before if s > max(s for s in before if s % EVERY == 0)]
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = used.ru_utime + used.ru_stime
    figures = {
        "run": " ".join(["secateur", *command(given.model, Path("DIR"))]),
        "killed_after_step": max(before),
        "steps_done_twice": again,
        "same_losses": bool(again) and all(before[s] == after.get(s) for s in again),
        "cpu_seconds": round(cpu, 1),
        "wall_seconds": round(time.perf_counter() - started, 1),
        "within": f"{LIMIT:g} s: {'held' if cpu <= LIMIT else 'MISSED'}",
        "parameters": report["structure"]["parameters"],
        "quality": report.get("quality"),
        "pretraining": {
            k: v
            for k, v in report["pretraining"].items()
            if k in ("spans", "spent", "validations", "tokens")
        },
        "losses": [after.get(s) for s in sorted(after)][:: max(1, len(after) // 40)],
        "peak_memory": used.ru_maxrss * 1024,
    }
    finish("efficientllm_smollm", figures, given.json)
    print(
        json.dumps({k: figures[k] for k in ("same_losses", "cpu_seconds", "parameters", "quality")})
    )


if __name__ == "__main__":
    main()
