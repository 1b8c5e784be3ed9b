"""Learned 2:4 masks against one-shot masks on stories260k: perplexity, groups changed, time.

python -m benchmarks.maskllm                      # every cell, three seeds; resumes cell by cell
python -m benchmarks.maskllm --steps 100 --seeds 0 --names "maskllm, no prior"
python -m benchmarks.maskllm --speed              # one step against plain fine-tuning
python -m benchmarks.maskllm --memory             # bytes a masked weight, stated and held
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

import secateur
from benchmarks.common import (
    RESULTS,
    alternate,
    arguments,
    finish,
    forget_peak,
    in_fresh_process,
    memory,
    ratio,
    spread,
)
from benchmarks.gradients import NO_HOLES
from benchmarks.stories import sampled_windows, stories_folder
from secateur.data.windows import Windows
from secateur.files import write_json
from secateur.kernels import candidate_mix
from secateur.kernels.candidate_mix import CandidateMix, Draw, key_of, likeliest
from secateur.masks.selection import select
from secateur.masks.target import Cut, Scope, Target
from secateur.models.anatomy import ModelView
from secateur.models.loading import load
from secateur.training.loop import Batch, fit, make_optimizer, next_token_loss
from secateur.training.mask_logits import Learning, bytes_per_weight
from secateur.training.maskllm import LearnedMasks
from secateur.training.settings import TrainSettings

ONE_SHOT: dict[str, dict[str, Any]] = {
    "random": {"method": "random"},
    "magnitude": {"method": "magnitude"},
    "wanda": {"method": "wanda"},
    "sparsegpt, mask only": {"method": "sparsegpt", "update": "none", "propagate": "dense"},
    "sparsegpt, weights updated": {"method": "sparsegpt"},
    "sparsegpt, best": {"quality": "best"},
}
WIDE: dict[str, Any] = {"sparsity": "4:8", "exclude": ["*down_proj"], "steps": 4 / 15}
"""4:8, where a group has 70 masks; 8 does not divide the inputs of ``down_proj``."""
LEARNED: dict[str, dict[str, Any]] = {
    "maskllm, sparsegpt prior": {},
    "maskllm, magnitude prior": {"prior": "magnitude"},
    "maskllm, wanda prior": {"prior": "wanda"},
    "maskllm, no prior": {"prior": "none"},
    "maskllm, kappa 1": {"kappa": (1.0, 1.0)},
    "maskllm, kappa 1e5": {"kappa": (1e5, 1e5)},
    "maskllm, a quarter of the steps": {"steps": 0.25},
    "maskllm, four candidates": {"candidates": 4},
    "maskllm, four candidates, 8-bit moments": {"candidates": 4, "optimizer": "adamw8bit"},
    "maskllm, three candidates": {"candidates": 3},
    "maskllm, a logit a weight": {"logits": "weights"},
    "maskllm, five turns": {"turns": 5},
    "maskllm, 8-bit moments": {"optimizer": "adamw8bit"},
    "maskllm, momentum only": {"optimizer": "sgd", "lr": 1.0},
    "maskllm, momentum only, rate 0.1": {"optimizer": "sgd", "lr": 0.1},
    "maskllm, momentum only, rate 0.01": {"optimizer": "sgd", "lr": 0.01},
    "4:8, all seventy masks": WIDE,
    "4:8, eight candidates": WIDE | {"candidates": 8},
    "4:8, a logit a weight": WIDE | {"logits": "weights"},
}
WINDOWS, LENGTH = 1024, 256
LOGITS = 6 << 18


@torch.no_grad()
def perplexity(model: nn.Module, ids: Tensor) -> float:
    """exp of the mean token cross-entropy over (N, L) windows."""
    losses = [float(next_token_loss(model, Batch(part))) for part in ids.split(32)]
    return float(torch.tensor(losses).mean().exp())


def cell(name: str, seed: int, steps: int) -> dict[str, Any]:
    """One mask: its perplexity on held-out text, and how it was come by."""
    model = load(str(stories_folder())).model
    held = sampled_windows(256, 1000, LENGTH)
    train = sampled_windows(WINDOWS, 2000 + seed, LENGTH)
    settings: dict[str, Any] = {"sparsity": "2:4", "seed": seed, "length": LENGTH, "samples": 64}
    if name == "dense":
        return {"perplexity": perplexity(model, held)}
    if name in ONE_SHOT:
        settings |= {"calibration": train[:64], **ONE_SHOT[name]}
        result = secateur.prune(model, **settings)
        return {"perplexity": perplexity(result.model, held)}  # type: ignore[arg-type]
    options = {"steps": steps, "batch": 8, "seed": seed, "validate_every": max(1, steps // 8)}
    changes = dict(LEARNED[name])
    share = changes.pop("steps", 1.0)
    settings |= {key: changes.pop(key) for key in ("sparsity", "exclude") if key in changes}
    options |= {**changes, "steps": max(1, round(steps * share))}
    started = time.process_time()
    result = secateur.prune(model, method="maskllm", options=options, calibration=train, **settings)
    spent = time.process_time() - started
    learning = result.report["learning"]
    return {
        "perplexity": perplexity(result.model, held),  # type: ignore[arg-type]
        "changed": learning["changed"],
        "cpu_seconds": round(spent, 1),
        "validations": learning["validations"],
        "moved": learning["moved"][:: max(1, len(learning["moved"]) // 20)],
    }


def grid(seeds: list[int], steps: int, names: list[str]) -> dict[str, Any]:
    """All cells; those already measured under the same steps are read."""
    path = RESULTS / "maskllm_cells.json"
    cells: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def key_of_cell(name: str, seed: int) -> str:
        return f"{name} / seed {seed}" + (f" / {steps} steps" if name in LEARNED else "")

    for seed in seeds:
        for name in names:
            key = key_of_cell(name, seed)
            if key not in cells:
                cells[key] = cell(name, seed, steps)
                write_json(path, cells)
                print(f"{key}: {cells[key]['perplexity']:.3f}", flush=True)
    table = {}
    for name in ["dense", *ONE_SHOT, *LEARNED]:
        found = [c for s in range(100) if (c := cells.get(key_of_cell(name, s)))]
        if not found:
            continue
        values = [c["perplexity"] for c in found]
        table[name] = {"median": statistics.median(values), "each": values}
        for what in ("changed", "cpu_seconds"):
            if what in found[0]:
                table[name][what] = statistics.median(c[what] for c in found)
    return {"steps": steps, "table": table}


def training_step(model: nn.Module, ids: Tensor, learned: bool) -> Callable[[], None]:
    """A step that learns 2:4 masks, or else one that trains what the model lets be trained."""
    masks = None
    if learned:
        view = ModelView.of(model)
        masks = LearnedMasks.attach(view, {m.name: (2, 4) for m in view.matrices()}, Learning())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        for number, module in enumerate(masks.modules.values() if masks else ()):
            module.draw = Learning().draw(0.5, key_of(number))
        next_token_loss(model, Batch(ids)).backward()
        optimizer.step()
        optimizer.zero_grad()
        if ids.is_cuda:
            torch.cuda.synchronize()

    step(), step()
    return step


def speed(rounds: int) -> dict[str, Any]:
    """A step of learning against one of plain fine-tuning, and the fused mixture against torch's."""
    ids = sampled_windows(8, 1, LENGTH)

    def step_of(learned: bool) -> Callable[[], None]:
        return training_step(load(str(stories_folder())).model, ids, learned)

    seconds = alternate({"plain": step_of(False), "learned": step_of(True)}, rounds)
    mix, groups = CandidateMix(2, 4), 1 << 18
    weight, grad = torch.randn(groups, 4), torch.randn(groups, 4)
    logits, draw = torch.randn(groups, 6) * 0.01, Draw(key_of(1), 200.0, 2.0)

    def both(fused: bool) -> Callable[[], None]:
        def run() -> None:
            kept = candidate_mix._compiled
            if not fused:
                candidate_mix._compiled = lambda: None  # type: ignore[assignment]
            try:
                mix.masked(weight, logits, draw)
                mix.backward(weight, logits, grad, 0.0, draw)
            finally:
                candidate_mix._compiled = kept  # type: ignore[assignment]

        run()
        return run

    kernels = alternate({"fused": both(True), "torch": both(False)}, rounds)
    few = {f"{k} of {n}:{m}": fewer(n, m, k, rounds) for n, m, k in ((2, 4, 4), (4, 8, 8))}
    moments = alternate({k: updated(k) for k in ("adamw", "adamw8bit")}, rounds)
    per_group = {k: spread([s / groups * 1e9 for s in v], 1) for k, v in kernels.items()}
    return {
        "step": {
            "times_plain_fine_tuning": ratio(seconds["learned"], seconds["plain"]),
            "seconds": {k: spread(v) for k, v in seconds.items()},
        },
        "mixture": {
            "nanoseconds_a_group_forward_and_backward": per_group,
            "times_faster": ratio(kernels["torch"], kernels["fused"]),
        },
        "candidates": few,
        "update_with_moments_in_8_bits": {
            "times_adamw": ratio(moments["adamw8bit"], moments["adamw"]),
            "nanoseconds_a_logit": {
                k: spread([s / LOGITS * 1e9 for s in v], 1) for k, v in moments.items()
            },
        },
        "bytes_a_weight": {"logits, gradient, two moments": 24, "kept for backward": 0},
    }


def fewer(keep: int, group: int, count: int, rounds: int) -> dict[str, Any]:
    """The fused mixture of a choice of ``count`` masks a group, against that of all of them."""
    groups, draw = 1 << 15, Draw(key_of(1), 200.0, 2.0)
    weight, grad = torch.randn(groups, group), torch.randn(groups, group)
    mask = torch.ones(groups, group, dtype=torch.bool)
    mask.scatter_(-1, weight.abs().topk(keep).indices, False)
    index = likeliest(keep, group, weight, mask, count)

    def both(mix: CandidateMix) -> Callable[[], None]:
        logits = torch.randn(groups, mix.logits_per_group) * 0.01

        def run() -> None:
            mix.masked(weight, logits, draw)
            mix.backward(weight, logits, grad, 0.0, draw)

        run()
        return run

    some, every = CandidateMix(keep, group, index), CandidateMix(keep, group)
    seconds = alternate({"some": both(some), "all": both(every)}, rounds)
    return {
        "times_all": ratio(seconds["some"], seconds["all"]),
        "nanoseconds_a_group": {
            k: spread([s / groups * 1e9 for s in v], 1) for k, v in seconds.items()
        },
    }


def updated(optimizer: Any) -> Callable[[], None]:
    """One update of as many logits, by that optimizer."""
    logits = nn.Parameter(torch.randn(LOGITS // 6, 6) * 0.01)
    made = make_optimizer({"logits": logits}, TrainSettings(optimizer=optimizer))
    logits.grad = torch.randn_like(logits) * 1e-4
    made.step()
    return made.step


MEMORY: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "a logit a pattern": ({}, {}),
    "the same, and the best kept": ({}, {"patience": 9, "validate_every": 1}),
    "8-bit moments": ({}, {"optimizer": "adamw8bit"}),
    "momentum only": ({}, {"optimizer": "sgd"}),
    "four candidates": ({"candidates": 4}, {}),
    "a logit a weight": ({"logits": "weights"}, {}),
}


def held(name: str) -> dict[str, float]:
    """Bytes a masked weight, at the most, that three steps take beyond the model; 2:4."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=256, hidden_size=768, intermediate_size=2048, num_hidden_layers=8,
        num_attention_heads=8, max_position_embeddings=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    view = ModelView.of(model)
    patterns = {m.name: (2, 4) for m in view.matrices()}
    weights = sum(m.stored.numel() for m in view.matrices())
    data = Windows(torch.randint(0, 256, (8, 16)))
    learning, training = MEMORY[name]
    settings = TrainSettings(steps=3, batch=1, checkpoint_every=None, **training)
    next_token_loss(model, Batch(data.ids[:1]))
    forget_peak()
    before = memory("VmRSS")
    options, prior = Learning(**learning), None
    if options.candidates is not None:
        cuts = {m.name: Cut.of(m.shape, Target.parse("2:4"), Scope("row")) for m in view.matrices()}
        prior = {m.name: select(m.tensor().abs(), cuts[m.name]) for m in view.matrices()}
    with TemporaryDirectory() as folder, LearnedMasks.attach(
        view, patterns, options, prior
    ) as masks:  # fmt: skip
        looks = iter((3.0, 2.0, 1.0))
        fit(
            model, data, settings, loss=masks.loss(), hooks=[masks], folder=Path(folder),
            validate=(lambda: next(looks)) if settings.patience else None,
        )  # fmt: skip
        grown = memory("VmHWM") - before
    return {
        "held": grown / weights,
        "stated": bytes_per_weight(
            2,
            4,
            options,
            settings.optimizer,
            keep_best=settings.patience is not None,
        ),
    }


def main() -> None:
    """The grid, or the speed, or the memory."""
    parser = arguments(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--names", nargs="+", default=["dense", *ONE_SHOT, *LEARNED])
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.child:
        print(json.dumps(held(given.child)))
        return
    if given.memory:
        figures = {
            name: in_fresh_process("benchmarks.maskllm", "--child", name, environment=NO_HOLES)
            for name in MEMORY
        }
        for name, row in figures.items():
            print(f"{name}: {row['held']:.1f} bytes a weight, stated {row['stated']:g}")
        path = given.json or RESULTS / "maskllm_memory.json"
        finish("maskllm", {"bytes_a_masked_weight": figures}, path)
        return
    if given.speed:
        finish("maskllm", speed(given.rounds), given.json or RESULTS / "maskllm_speed.json")
        return
    record = grid(given.seeds, given.steps, given.names)
    for name, row in record["table"].items():
        print(f"{name:34} {row['median']:9.3f}  {row.get('changed', float('nan')):.1%}")
    finish("maskllm", record, given.json)


if __name__ == "__main__":
    main()
