"""What pruning costs on top of the calibration forwards it cannot do without.

    python -m benchmarks.whole_run                          # SmolLM2-135M, its first 8 blocks
    python -m benchmarks.whole_run --blocks 30 --rounds 1   # all of it

A run that propagates the pruned activations needs two forwards of every block: one to see its
inputs, one to feed the next block. The yardstick is the same two forwards by plain
transformers, without head, of the same windows in the same batches, on one thread, in turns
with whole runs of ``secateur.prune``. The calibration is short (8 windows of 512 tokens, an
eighth of the default): what is paid once per matrix weighs eight times more than usual.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

import secateur
from benchmarks.common import alternate, arguments, finish, ratio, spread, verdict
from secateur.models.loading import load

# method, forwards of the whole calibration it cannot do without, the limit we set ourselves
CASES = (("wanda", 2, 1.3), ("sparsegpt", 2, 2.0), ("magnitude", 0, None), ("gblm", 2, None))


def shortened(spec: str, blocks: int) -> Any:
    """The model with only its first blocks."""
    model = load(spec, dtype="float32", device="cpu", tokenizer=False).model
    model.model.layers = model.model.layers[:blocks]
    model.config.num_hidden_layers = len(model.model.layers)
    return model


@torch.no_grad()
def forwards(model: Any, ids: Tensor, times: int, batch: int) -> None:
    """``times`` forwards through the blocks."""
    for _ in range(times):
        for part in ids.split(batch):
            model.model(input_ids=part, use_cache=False)


def main() -> None:
    """Measure each method against its forwards, in turns."""
    parser = arguments(__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    model = shortened(given.model, given.blocks)
    draw = torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(0, vocabulary, (given.samples, given.length), generator=draw)
    batch = max(1, 2048 // given.length)  # as a run batches them
    splits: dict[str, list[dict[str, float]]] = {name: [] for name, *_ in CASES}

    def run(method: str) -> None:
        result = secateur.prune(subjects.pop(), method=method, calibration=ids)
        splits[method].append(result.report["timing"])

    for name, *_ in CASES:  # imports and caches
        secateur.prune(copy.deepcopy(model), method=name, calibration=ids[:1, :64])
    seconds: dict[str, list[float]] = {}
    for _ in range(given.rounds):
        subjects = [copy.deepcopy(model) for _ in CASES]
        ways = {"forwards": lambda: forwards(model, ids, 2, batch)}
        ways |= {name: lambda name=name: run(name) for name, *_ in CASES}
        for name, taken in alternate(ways, 1).items():
            seconds.setdefault(name, []).extend(taken)
    cases = []
    for name, needed, limit in CASES:
        times = ratio(seconds[name], seconds["forwards"])
        parts = {k: spread([s[k] for s in splits[name]])["median"] for k in splits[name][0]}
        cases.append(
            {
                "method": name,
                "forwards_needed": needed,
                "seconds": spread(seconds[name]),
                "times_two_forwards": times,
                "limit": limit,
                "wall_seconds_of": parts,
            }
        )
        note = "" if limit is None else verdict(times["median"], limit)
        print(
            f"{name:10} {times['median']:5.2f}x two forwards "
            f"({times['low']:.2f}-{times['high']:.2f})  {note:14} {parts}",
            flush=True,
        )
    figures = {
        "model": given.model,
        "blocks": len(model.model.layers),
        "tokens": ids.numel(),
        "clock": "process CPU seconds, one thread",
        "rounds": given.rounds,
        "two_forwards_seconds": spread(seconds["forwards"]),
        "cases": cases,
    }
    finish("whole_run", figures, given.json)


if __name__ == "__main__":
    main()
