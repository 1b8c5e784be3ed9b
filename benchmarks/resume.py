"""What it costs that a run in a folder can be killed at any moment and taken up again.

    python -m benchmarks.resume

The same run in memory and in a folder, in turns: shards, masks, records, boundaries and the
report written and flushed to disk, and the folder opened again by plain transformers. Then a
run that finds its first half done, against a whole one: what a crash in the middle costs.
"""

from __future__ import annotations

import copy
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import secateur
from benchmarks.common import arguments, finish, ratio, spread
from benchmarks.whole_run import shortened


class Killed(Exception):
    """Stands for the crash."""


def main() -> None:
    """In memory, in a folder, and taken up half way."""
    parser = arguments(__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--method", default="sparsegpt")
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    from secateur.run import checkpoint

    checkpoint.BOUNDARY_SECONDS = 0.0  # the most expensive setting: a boundary after every block
    model = shortened(given.model, given.blocks)
    draw = torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(0, vocabulary, (given.samples, given.length), generator=draw)

    def run(out: Path | None) -> None:
        subject = copy.deepcopy(model)
        secateur.prune(subject, method=given.method, calibration=ids, out=out)

    def half(out: Path) -> None:
        """A run that dies after half of its blocks."""
        save = checkpoint.Checkpoint.save

        def save_then_die(self: Any, block: Any, result: Any) -> None:
            save(self, block, result)
            if block.index + 1 == given.blocks // 2:
                raise Killed

        checkpoint.Checkpoint.save = save_then_die  # type: ignore[method-assign]
        try:
            run(out)
        except Killed:
            pass
        finally:
            checkpoint.Checkpoint.save = save  # type: ignore[method-assign]

    seconds: dict[str, dict[str, list[float]]] = {"cpu": {}, "wall": {}}
    with tempfile.TemporaryDirectory() as folder:
        out, broken = Path(folder) / "out", Path(folder) / "broken"

        def in_folder() -> None:
            shutil.rmtree(out, ignore_errors=True)
            run(out)

        ways = {
            "memory": lambda: run(None),
            "folder": in_folder,
            "resumed": lambda: run(broken),
        }
        for turn in range(given.rounds + 1):  # the first pays for imports and is not counted
            shutil.rmtree(broken, ignore_errors=True)
            half(broken)
            for name, way in ways.items():
                cpu, wall = time.process_time(), time.perf_counter()
                way()
                if turn:
                    taken = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
                    for clock, value in taken.items():
                        seconds[clock].setdefault(name, []).append(value)
        written = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    figures: dict[str, Any] = {
        "model": given.model,
        "method": given.method,
        "blocks": given.blocks,
        "tokens": ids.numel(),
        "bytes_written": written,
    }
    for clock, taken_by in seconds.items():
        folder_ratio = ratio(taken_by["folder"], taken_by["memory"])
        resumed_ratio = ratio(taken_by["resumed"], taken_by["folder"])
        figures[clock] = {
            "seconds": {name: spread(values) for name, values in taken_by.items()},
            "folder_over_memory": folder_ratio,
            "second_half_over_whole": resumed_ratio,
        }
        print(
            f"{clock:5} in a folder {folder_ratio['median']:.2f}x in memory; "
            f"taken up half way {resumed_ratio['median']:.2f}x a whole run",
            flush=True,
        )
    finish("resume", figures, given.json)


if __name__ == "__main__":
    main()
