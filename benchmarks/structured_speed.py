"""How much of the FLOPs that a structured cut saves turns into time, and where the rest goes.

    python -m benchmarks.structured_speed --json benchmarks/results/structured_speed.json

Half of the heads (key-value groups) and of the MLP channels of SmolLM2-135M-Instruct
(de-quantised Q4_1) go; dense and pruned take turns on one thread. CPU time, medians. Which
units go makes no difference to the time, so they go by magnitude.
"""

from __future__ import annotations

import time
from copy import deepcopy
from typing import Any

import torch

from benchmarks.common import alternate, arguments, finish, ratio
from secateur.allocation.structured import structured_counts
from secateur.evaluation.flops import count_flops
from secateur.evaluation.speed import cache_name, cache_of
from secateur.models.loading import load
from secateur.models.units import units_of
from secateur.run.breakdown import breakdown
from secateur.run.latency import first_units_gone

WANTED = 0.85


def measure(model: str, share: float, prompt: int, rounds: int) -> dict[str, Any]:
    """Prefill and decode, dense against pruned, with the time of each part."""
    dense = load(model, tokenizer=False).model
    groups = list(units_of(dense, ("head", "ffn")))
    cuts = structured_counts(groups, share)
    pruned = first_units_gone(deepcopy(dense), groups, cuts)
    vocabulary = dense.get_input_embeddings().weight.shape[0]
    ids = (torch.arange(prompt) * 7919 % vocabulary)[None]
    models = {"dense": dense, "pruned": pruned}
    with torch.no_grad():
        for each in models.values():
            each(input_ids=ids)
        read = alternate(
            {n: lambda m=m: m(input_ids=ids, use_cache=True) for n, m in models.items()}, rounds
        )
        write = alternate({n: lambda m=m: _decode(m, ids) for n, m in models.items()}, rounds)
    alone = {
        n: [total - first for total, first in zip(write[n], read[n], strict=True)] for n in models
    }
    found: dict[str, Any] = {"parameters": {n: m.num_parameters() for n, m in models.items()}}
    parts = breakdown(dense, pruned, ids, turns=max(3, rounds // 2), clock=time.process_time)
    for phase, times in (("prefill", read), ("decode", alone)):
        flops = [count_flops(m, prompt, decode=phase == "decode")["total"] for m in models.values()]
        speed = ratio(times["dense"], times["pruned"])
        found[phase] = {
            "speed_up": speed,
            "flops_ratio": round(flops[0] / flops[1], 3),
            "reached": round(speed["median"] / (flops[0] / flops[1]), 3),
            "seconds_by_part": {n: parts[phase][n] for n in models},
        }
    return found


def _decode(model: Any, ids: torch.Tensor, tokens: int = 8) -> None:
    output = model(input_ids=ids, use_cache=True)
    cache, token = cache_of(output), output.logits[:, -1:].argmax(-1)
    key = cache_name(model)
    for _ in range(tokens):
        step = model(input_ids=token, use_cache=True, **{key: cache})
        token, cache = step.logits[:, -1:].argmax(-1), cache_of(step)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--share", type=float, default=0.5)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    record = measure(options.model, options.share, options.prompt, options.rounds)
    for phase in ("prefill", "decode"):
        found = record[phase]
        print(
            f"{phase}: {found['speed_up']['median']:.2f}x of a FLOPs ratio of "
            f"{found['flops_ratio']:.2f}x, share reached {found['reached']:.2f} "
            f"({'held' if found['reached'] >= WANTED else 'MISSED'}: >= {WANTED})"
        )
        for name, parts in found["seconds_by_part"].items():
            print(f"  {name:7}", {k: f"{v * 1e3:.1f} ms" for k, v in parts.items()})
    finish("structured_speed", record, options.json)


if __name__ == "__main__":
    main()
