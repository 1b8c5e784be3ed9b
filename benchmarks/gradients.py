"""Memory and time of the gradient pass behind GBLM-Pruner.

    python -m benchmarks.gradients

Memory: the most a fresh process ever holds, beyond what it held when the model was loaded.
Three passes over the same sequences: ``activations`` keeps all that backward needs and goes
back to the embeddings without a gradient of any weight; ``plain`` is backward as the original
script has it, where every matrix keeps its gradient until all are there; ``ours`` folds each
into its accumulator at once. Wanted: ours no more than activations, accumulators and one
matrix's gradient. The allocator is told to give memory back at once, so that the figures are
what is held and not the holes between.

Time: the pass against plain forwards of the same sequences, one by one, head included.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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
from secateur.evidence.gradients import direct_gradients, sequence_loss
from secateur.models.anatomy import ModelView
from secateur.models.loading import load

NO_HOLES = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
LIMIT = 4.0  # times a forward
BLOCKS, WIDTH = 12, 512  # 50 M parameters


def windows(model: Any, samples: int, length: int) -> Tensor:
    """Random tokens."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    return torch.randint(
        0, vocabulary, (samples, length), generator=torch.Generator().manual_seed(0)
    )


def shortened(spec: str, blocks: int | None) -> Any:
    """The model, with only its first blocks if so asked."""
    model = load(spec, dtype="float32", device="cpu", tokenizer=False).model
    if blocks:
        model.model.layers = model.model.layers[:blocks]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model


def to_embeddings(model: Any, row: Tensor) -> None:
    """Forward and backward of one sequence down to the embedded tokens, no weight's gradient."""
    embedded = model.get_input_embeddings()(row).detach().requires_grad_(True)
    loss = sequence_loss(model(inputs_embeds=embedded, use_cache=False).logits, row)
    torch.autograd.grad(loss, embedded)


def child(spec: str, blocks: int | None, kind: str, samples: int, length: int) -> dict[str, int]:
    """One kind of pass; bytes held at the most beyond those held before."""
    model = shortened(spec, blocks)
    view = ModelView.of(model)
    ids = windows(model, samples, length)
    matrices = list(view.matrices())
    sizes = [m.stored.numel() * 4 for m in matrices]
    direct_gradients(view, ids[:1, :8], None, ("l1",))  # what a first call sets up for good
    to_embeddings(model, ids[:1, :8])
    forget_peak()
    before = memory("VmRSS")
    if kind == "ours":
        direct_gradients(view, ids, None, ("l1",))
    else:
        sums: dict[str, Tensor] = {}
        for matrix in matrices:
            matrix.stored.requires_grad_(True)
        for row in ids.split(1):
            if kind == "activations":
                to_embeddings(model, row)
                continue
            sequence_loss(model(input_ids=row, use_cache=False).logits, row).backward()
            for matrix in matrices:
                gradient = matrix.stored.grad
                assert gradient is not None
                total = sums.setdefault(matrix.name, torch.zeros_like(gradient))
                total += gradient.abs()
                matrix.stored.grad = None
    return {"held": memory("VmHWM") - before, "weights": sum(sizes), "largest": max(sizes)}


def measure_memory(spec: str, blocks: int | None, samples: int, length: int) -> dict[str, Any]:
    """The three passes, each in a process of its own."""
    held: dict[str, int] = {}
    for kind in ("activations", "plain", "ours"):
        got = in_fresh_process(
            "benchmarks.gradients", "--child", kind, "--model", spec, "--blocks", blocks or 0,
            "--samples", samples, "--length", length, environment=NO_HOLES,
        )  # fmt: skip
        held[kind] = got["held"]
    allowed = held["activations"] + got["weights"] + got["largest"]  # one accumulator a weight
    figures = {
        "activations": held["activations"],
        "accumulators": got["weights"],
        "one_gradient": got["largest"],
        "ours": held["ours"],
        "as_the_original": held["plain"],
        "allowed": allowed,
        "wanted": "activations + accumulators + one gradient",
        "ours_of_allowed": round(held["ours"] / allowed, 3),
    }
    print(
        "  memory, MiB: "
        + ", ".join(f"{k} {v / MIB:.0f}" for k, v in figures.items() if isinstance(v, int))
    )
    print(f"  ours / allowed {figures['ours_of_allowed']}  {verdict(held['ours'] / allowed, 1.0)}")
    return figures


def measure_time(
    spec: str, blocks: int | None, samples: int, length: int, rounds: int
) -> dict[str, Any]:
    """The pass and plain forwards, in turns."""
    model = shortened(spec, blocks)
    view, ids = ModelView.of(model), windows(model, samples, length)

    def forward() -> None:
        with torch.no_grad():
            for row in ids.split(1):
                model(input_ids=row, use_cache=False)

    ways = {"ours": lambda: direct_gradients(view, ids, None, ("l1",)), "forward": forward}
    alternate(ways, 1)
    seconds = alternate(ways, rounds)
    times = ratio(seconds["ours"], seconds["forward"])
    print(f"  time {times['median']}x a forward  {verdict(times['median'], LIMIT)}", flush=True)
    return {
        "pass_seconds": spread(seconds["ours"]),
        "forward_seconds": spread(seconds["forward"]),
        "times_a_forward": times,
        "limit": LIMIT,
    }


def main() -> None:
    """Measure a wide random model and the demo model."""
    parser = arguments(__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--blocks", type=int, default=0, help="of that model; 0: all")
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", choices=("activations", "plain", "ours"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.child:
        got = child(given.model, given.blocks or None, given.child, given.samples, given.length)
        print(json.dumps(got))
        return
    from secateur.models.tiny import synthetic_llama

    figures: dict[str, Any] = {"clock": "process CPU seconds, one thread", "models": {}}
    with tempfile.TemporaryDirectory() as folder:
        wide = synthetic_llama(Path(folder) / "wide", BLOCKS, WIDTH)
        subjects = (
            (f"random, {BLOCKS} blocks of width {WIDTH}", str(wide), None),
            (given.model, given.model, given.blocks or None),
        )
        for name, spec, blocks in subjects:
            print(name)
            shape = (given.samples, given.length)
            figures["models"][name] = {
                "windows": list(shape),
                "memory": measure_memory(spec, blocks, *shape),
                "time": measure_time(spec, blocks, *shape, given.rounds),
            }
    finish("gradients", figures, given.json)


if __name__ == "__main__":
    main()
