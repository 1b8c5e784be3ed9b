"""Time of PERP's reconstruction against SparseGPT's solve, and its memory against a block's.

    python -m benchmarks.reconstruction

Time: the first blocks of SmolLM2-135M at 50 %, the same calibration windows, one thread, in
turns: SparseGPT (gathering, solving, propagating) and the reconstruction of the
magnitude-pruned blocks with several parts trained. Each one's error is that of the block's
output, ||pruned - dense|| / ||dense||, on those windows.

Memory: the most a fresh process holds beyond what it held before the first block, with cut
and dense model streamed from disk, for a shallow and a deep model of the same width. Wanted:
that depth does not matter (<= 1.1), and figures in blocks beside it.
"""

from __future__ import annotations

import copy
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import secateur
from benchmarks.common import (
    MIB,
    alternate,
    arguments,
    finish,
    forget_peak,
    in_fresh_process,
    memory,
    ratio,
    spread,
    verdict,
)
from benchmarks.gradients import NO_HOLES, shortened, windows
from secateur.data.windows import Windows
from secateur.models.anatomy import ModelView
from secateur.models.loading import load
from secateur.training.reconstruction import Dense, Reconstruction
from secateur.training.settings import TrainSettings

LIMIT = 1.1  # times, deep over shallow
PARTS: dict[str, tuple[str, ...]] = {
    "norms": ("norms",),
    "norms+mask-lora": ("norms", "mask-lora"),
    "all": ("all",),
}


def halved(view: ModelView) -> dict[str, Tensor]:
    """The smaller half of every row goes."""
    masks = {}
    for matrix in view.matrices():
        weight = matrix.tensor()
        order = weight.abs().argsort(dim=1, stable=True)[:, : weight.shape[1] // 2]
        gone = torch.zeros(weight.shape, dtype=torch.bool).scatter_(1, order, True)
        weight.masked_fill_(gone, 0)
        masks[matrix.name] = gone
    return masks


def settings(steps: int, batch: int, train: tuple[str, ...]) -> TrainSettings:
    """A block's training."""
    return TrainSettings(steps=steps, batch=batch, lr=3e-4 if "all" in train else 1e-3)


def measure_time(given: Any) -> dict[str, Any]:
    """SparseGPT and reconstructions of the same blocks, in turns."""
    model = shortened(given.model, given.blocks)
    ids = windows(model, given.samples, given.length)
    if given.model == "demo":
        ids = real_windows(given)
    dense = ModelView.of(model)
    pruned = copy.deepcopy(model)
    masks = halved(ModelView.of(pruned))
    errors: dict[str, list[float]] = {}

    def sparsegpt() -> None:
        result = secateur.prune(
            copy.deepcopy(model), method="sparsegpt", sparsity=0.5, calibration=ids,
            evaluation=None,
        )  # fmt: skip
        blocks = result.report["blocks"]
        errors["sparsegpt"] = [round(block["error"], 4) for block in blocks]

    def repair(name: str) -> None:
        view = ModelView.of(copy.deepcopy(pruned))
        train = PARTS[name]
        record = Reconstruction(
            view, masks, Dense(dense), settings(given.steps, given.batch, train), train
        ).run(Windows(ids))
        errors["magnitude"] = [round(b["before"], 4) for b in record["blocks"][:1]]
        errors[name] = [round(b["after"], 4) for b in record["blocks"]]

    ways = {"sparsegpt": sparsegpt} | {n: (lambda n=n: repair(n)) for n in PARTS}
    seconds = alternate(ways, given.rounds)
    figures = {}
    for name in ways:
        times = ratio(seconds[name], seconds["sparsegpt"])
        per_block = spread([s / given.blocks for s in seconds[name]])
        figures[name] = {
            "seconds_per_block": per_block,
            "times_sparsegpt": times,
            "errors": errors[name],
        }
        print(
            f"  {name:16} {per_block['median']:.2f} s a block, {times['median']}x SparseGPT, "
            f"errors {errors[name]}",
            flush=True,
        )
    return {
        "blocks": given.blocks,
        "windows": list(ids.shape),
        "steps": given.steps,
        "batch": given.batch,
        "magnitude_error_of_the_first_block": errors["magnitude"][0],
        "ways": figures,
    }


def real_windows(given: Any) -> Tensor:
    """Windows of the documentation that comes with Python."""
    from secateur.data.windows import calibration_windows

    tokenizer = load(given.model, dtype="float32", device="cpu").tokenizer
    return calibration_windows("pydoc", tokenizer, given.samples, given.length).ids


def child(folder: Path) -> dict[str, int]:
    """Reconstruct a streamed model; bytes held at the most beyond those held before."""
    cut, dense = (
        load(str(folder), dtype="float32", device="cpu", stream=True, tokenizer=False).streamed
        for _ in range(2)
    )
    view = cut.view
    block = view.blocks[0]
    with cut.resident(block):
        size = sum(p.numel() * p.element_size() for p in block.module.parameters())
    ids = windows(cut.model, 8, 64)
    train = ("norms", "mask-lora")
    repair = Reconstruction(
        view, {}, Dense(dense.view, dense.resident), settings(3, 2, train), train,
        {"rank": 8}, resident=cut.resident,
    )  # fmt: skip
    forget_peak()
    before = memory("VmRSS")
    repair.run(Windows(ids))
    hidden = ids.numel() * view.hidden_size * 4
    return {"held": memory("VmHWM") - before, "block": size, "hidden": hidden}


def measure_memory(width: int) -> dict[str, Any]:
    """Shallow and deep, each in a process of its own."""
    from secateur.models.tiny import synthetic_llama

    figures: dict[str, Any] = {"width": width, "limit": LIMIT}
    with tempfile.TemporaryDirectory() as folder:
        for depth in (4, 24):
            path = synthetic_llama(Path(folder) / str(depth), depth, width)
            got = in_fresh_process(
                "benchmarks.reconstruction", "--child", path, environment=NO_HOLES
            )
            figures[f"depth_{depth}"] = got
            print(
                f"  {depth} blocks: {got['held'] / MIB:.0f} MiB held, a block is "
                f"{got['block'] / MIB:.0f} MiB, hidden states {got['hidden'] / MIB:.1f} MiB",
                flush=True,
            )
    figures["growth"] = round(figures["depth_24"]["held"] / figures["depth_4"]["held"], 3)
    figures["in_blocks"] = round(figures["depth_24"]["held"] / figures["depth_24"]["block"], 2)
    print(f"  deep / shallow {figures['growth']}  {verdict(figures['growth'], LIMIT)}")
    return figures


def main() -> None:
    """Measure time and memory."""
    parser = arguments(__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--blocks", type=int, default=2, help="of that model")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=40, help="in each block")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--only", choices=("time", "memory"))
    parser.add_argument("--child", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.child:
        print(json.dumps(child(given.child)))
        return
    figures: dict[str, Any] = {
        "clock": "process CPU seconds, one thread",
        "model": given.model,
    }
    if given.only != "time":
        figures["memory"] = measure_memory(given.width)
    if given.only != "memory":
        figures["time"] = measure_time(given)
    finish("reconstruction", figures, given.json)


if __name__ == "__main__":
    main()
