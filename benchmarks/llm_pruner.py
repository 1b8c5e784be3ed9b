"""Memory and time of LLM-Pruner's scores: one block's gradients at a time, or the whole model's.

    python -m benchmarks.llm_pruner

Memory: the most a fresh process holds beyond what it held when the model was loaded, scoring
heads and channels on 10 sequences of 64 tokens (the authors' calibration). ``authors`` is one
backward of all sequences, every weight of the groups keeping its gradient; ``whole`` keeps sums
over single sequences, which element2 and mix need; ``ours`` goes block by block. Wanted: no
more than the hidden states of the sequences, and the gradient sums and one gradient of a block.

Time: the same in turns, process CPU seconds, one thread.
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
    verdict,
)
from benchmarks.gradients import NO_HOLES, windows
from secateur.data.windows import Windows
from secateur.evidence.gradients import sequence_losses
from secateur.evidence.objectives import language_model
from secateur.methods.group_importance import NORMS
from secateur.methods.llm_pruner import LLMPruner, importances
from secateur.methods.structured_base import ScoreJob
from secateur.models.loading import load
from secateur.models.tiny import synthetic_llama
from secateur.models.units import parameters_of, units_of

BLOCKS, WIDTH = 16, 512
SAMPLES, LENGTH = 10, 64
CRITERIA = ("element1", "mix")


def score(model: Any, ids: Tensor, kind: str, criterion: str) -> None:
    """Score every head and channel in one of the three ways."""
    method = LLMPruner(criterion=criterion)  # type: ignore[arg-type]
    groups = list(units_of(model, ("head", "ffn")))
    if kind == "ours":
        method.scores(ScoreJob(model, groups, {}, Windows(ids, None, {})))
    elif kind == "whole":
        importances(model, groups, [{"input_ids": ids}], language_model, method=method)
    else:
        parameters = parameters_of(model)
        chosen = {s.parameter: parameters[s.parameter] for g in groups for s in g.slices}
        for parameter in chosen.values():
            parameter.requires_grad_(True)
        logits = model(input_ids=ids, use_cache=False).logits
        sequence_losses(logits, ids).mean().backward()
        for parameter in chosen.values():
            parameter.requires_grad_(False)
            parameter.grad = None


def loaded(spec: str) -> Any:
    """The model, frozen."""
    model = load(spec, dtype="float32", device="cpu", tokenizer=False).model
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model


def child(spec: str, kind: str, criterion: str) -> dict[str, int]:
    """One way; bytes held at the most beyond those held before."""
    model = loaded(spec)
    ids = windows(model, SAMPLES, LENGTH)
    score(model, ids[:1, :8], kind, criterion)  # what a first call sets up for good
    forget_peak()
    before = memory("VmRSS")
    score(model, ids, kind, criterion)
    held = memory("VmHWM") - before
    block = [p.numel() * 4 for p in model.model.layers[0].parameters() if p.dim() > 1]
    return {"held": held, "block": sum(block), "largest": max(block)}


def main() -> None:
    """Measure memory in fresh processes, then time in turns."""
    parser = arguments(__doc__)
    parser.add_argument("--child", nargs=3, metavar=("MODEL", "KIND", "CRITERION"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.child:
        print(json.dumps(child(*given.child)))
        return
    with tempfile.TemporaryDirectory() as folder:
        spec = str(synthetic_llama(Path(folder) / "wide", BLOCKS, WIDTH))
        figures: dict[str, Any] = {
            "model": f"random Llama, {BLOCKS} blocks of width {WIDTH}",
            "calibration": f"{SAMPLES} sequences of {LENGTH} tokens",
            "memory": {},
            "time": {},
        }
        for criterion in CRITERIA:
            held = {}
            for kind in (
                ("authors", "whole", "ours") if criterion == "element1" else ("whole", "ours")
            ):
                got = in_fresh_process(
                    "benchmarks.llm_pruner", "--child", spec, kind, criterion, environment=NO_HOLES
                )
                held[kind] = got["held"]
            hidden = (BLOCKS + 2) * SAMPLES * LENGTH * WIDTH * 4
            allowed = hidden + len(NORMS[criterion]) * got["block"] + got["block"]
            figures["memory"][criterion] = {
                **held,
                "hidden_states": hidden,
                "one_block": got["block"],
                "allowed": allowed,
                "wanted": "hidden states + sums of one block + one block's gradients",
                "ours_of_allowed": round(held["ours"] / allowed, 3),
                "whole_over_ours": round(held["whole"] / held["ours"], 2),
            }
            words = ", ".join(f"{k} {v / MIB:.0f}" for k, v in held.items())
            print(f"{criterion}, MiB beyond the model: {words}; allowed {allowed / MIB:.0f}")
            print(f"  ours / allowed  {verdict(held['ours'] / allowed, 1.0)}", flush=True)
        model = loaded(spec)
        ids = windows(model, SAMPLES, LENGTH)
        ways = {
            kind: (lambda kind=kind: score(model, ids, kind, "element1"))
            for kind in ("authors", "whole", "ours")
        }
        alternate(ways, 1)
        seconds = alternate(ways, 3)
        figures["time"] = {
            "ours_over_whole": ratio(seconds["ours"], seconds["whole"]),
            "ours_over_authors": ratio(seconds["ours"], seconds["authors"]),
        }
        print(figures["time"])
    finish("llm_pruner", figures, given.json)


if __name__ == "__main__":
    main()
