"""Recovery after pruning: what each way of training brings back, at equal steps.

    python -m benchmarks.recovery              # stories260k: every criterion, target and seed
    python -m benchmarks.recovery --biased     # the same on a small OPT, which has biases
    python -m benchmarks.recovery --smollm     # a thin grid on SmolLM2-135M-Instruct
    python -m benchmarks.recovery --speed      # step time and memory on SmolLM2-135M-Instruct

Cells already in the result file are kept, so a stopped grid goes on. stories260k comes with no
text: windows are sampled from the model itself, one set to calibrate and train on, another to
measure on. The small OPT is trained on the first set. Learning rates are chosen for each way
on a third set (one criterion and target, seed 0) and kept for the whole grid.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

import secateur
from benchmarks.common import RESULTS, arguments, finish, forget_peak, memory
from secateur.data.windows import Windows, calibration_windows, evaluation_windows, training_windows
from secateur.evaluation.perplexity import perplexity
from secateur.models.anatomy import ModelView
from secateur.models.head import untie_head
from secateur.models.loading import load
from secateur.progress import RichProgress
from secateur.tensorfile import save_tensors
from secateur.training.loop import fit
from secateur.training.recoveries import Task, recoveries
from secateur.training.settings import TrainSettings
from secateur.training.subsets import available

DATA = Path(os.environ.get("SECATEUR_DATA", Path(__file__).parents[2] / "shared" / "data"))
CRITERIA = ("magnitude", "wanda", "sparsegpt")
TARGETS = ("0.5", "0.6", "0.7", "2:4")
SEEDS = (0, 1, 2)

# way -> (recovery, what is trained, adapter options)
WAYS: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    "biases": ("perp", ("biases",), {}),
    "norms": ("perp", ("norms",), {}),
    "biases+norms": ("perp", ("biases", "norms"), {}),
    "head": ("perp", ("head",), {}),
    "rescale": ("perp", ("rescale",), {}),
    "lora-prune": ("perp", ("norms", "lora-prune"), {"rank": 8, "alpha": 16.0}),
    "mask-lora": ("perp", ("norms", "mask-lora"), {"rank": 8, "alpha": 16.0}),
    "scale-lora, as published": (
        "perp", ("norms", "scale-lora"), {"rank": 8, "init": "ones"},
    ),
    "scale-lora, broken symmetry": ("perp", ("norms", "scale-lora"), {"rank": 8}),
    "spp": ("perp", ("norms", "spp"), {"rank": 8, "alpha": 16.0}),
    "reconstruction": ("reconstruct", ("norms", "mask-lora"), {"rank": 8, "alpha": 16.0}),
    "full": ("full", ("all",), {}),
}  # fmt: skip
LR_LADDER = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0)
LR_CHOICES = (3e-3, 1e-2, 3e-2)
"""Rates tried at first; beyond them where the best is at their edge."""
SEARCH_STEPS = 20
"""Steps of the trainings that choose a rate."""


class Bench:
    """A dense model, its texts, and cells of (criterion, target, seed, way)."""

    def __init__(self, name: str, path: Path, model: Any, texts: dict[str, Windows], **shape: int):
        self.name, self.path, self.model, self.texts = name, path, model, texts
        self.steps, self.batch, self.samples = shape["steps"], shape["batch"], shape["samples"]
        self.dense = copy.deepcopy(model)
        self._searched: tuple[nn.Module, Any] | None = None
        self.settings = {
            "model": name,
            **shape,
            "length": texts["train"].length,
            "evaluated_tokens": texts["test"].tokens,
        }
        self.record: dict[str, Any] = {"settings": self.settings, "rates": {}, "cells": {}}
        if path.exists():
            found = json.loads(path.read_text())
            if found.get("settings") == json.loads(json.dumps(self.settings)):
                self.record = {k: found[k] for k in ("settings", "rates", "cells")}
        self.record["dense"] = {"perplexity": self.measure(self.dense)}

    def measure(self, model: nn.Module, which: str = "test") -> float:
        """Perplexity on held-out windows."""

        @torch.no_grad()
        def logits(ids: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = model(input_ids=ids, use_cache=False).logits
            return out

        return perplexity(logits, self.texts[which]).value

    def ways(self, among: tuple[str, ...]) -> list[str]:
        """Those of ``among`` that this model can do."""
        there = available(self.dense)
        return [w for w in among if w not in ("biases", "biases+norms") or "biases" in there]

    def grid(self, criteria: Any, targets: Any, seeds: Any, among: tuple[str, ...]) -> None:
        """Every cell that is not there yet."""
        ways = self.ways(among)
        for seed in seeds:
            for target in targets:
                for criterion in criteria:
                    cells = self.record["cells"].setdefault(f"{criterion} {target} {seed}", {})
                    for way in ways:
                        self._choose_rate(way)
                    missing = [w for w in ["none", *ways] if not self._measured(cells.get(w), w)]
                    if not missing:
                        continue
                    print(f"{self.name}: {criterion} {target} seed {seed}", flush=True)
                    pruned, masks = self.prune(criterion, target, seed)
                    for way in missing:
                        cells[way] = self.cell(pruned, masks, way, seed)
                        print(f"   {way:28} {_told(cells[way])}", flush=True)
                        self.save()

    def prune(self, criterion: str, target: str, seed: int) -> tuple[nn.Module, Any]:
        """A pruned copy and its masks (True where a weight is gone)."""
        model = copy.deepcopy(self.dense)
        result = secateur.prune(
            model,
            method=criterion,
            sparsity=target,
            calibration=_drawn(self.texts["calibration"], seed, self.samples),
            samples=self.samples,
        )
        return model, {n: result.masks[n] for n in result.masks}

    def cell(
        self, pruned: nn.Module, masks: Any, way: str, seed: int, lr: float | None = None,
        which: str = "test", steps: int | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """Recover a copy and measure it."""
        if way == "none":
            return {"perplexity": self.measure(pruned, which), "share": 0.0, "cpu_seconds": 0.0}
        recovery, train, adapter = WAYS[way]
        model: Any = copy.deepcopy(pruned)
        if "head" in train:
            untie_head(model)
        rate = lr or self.record["rates"][way]["lr"]
        # Reconstruction: as many steps through each block as the others take through the model.
        settings = TrainSettings(
            steps=steps or self.steps,
            lr=rate,
            batch=self.batch,
            seed=seed,
            checkpoint_every=None,
        )
        task = Task(
            ModelView.of(model), masks, self.texts["train"], settings, train, adapter=adapter,
            teacher=lambda: self.dense,
        )  # fmt: skip
        forget_peak()
        base, start = memory("VmRSS"), time.process_time()
        record = recoveries[recovery](task)
        seconds = time.process_time() - start
        grown = max(0, memory("VmHWM") - base)
        return {
            "perplexity": self.measure(model, which),
            "share": record["share"],
            "trained": record["trained"],
            "cpu_seconds": round(seconds, 2),
            "memory_grown": grown,
            "zeros": record["zeros"],
            "lr": rate,
        }

    def _measured(self, cell: dict[str, Any] | None, way: str) -> bool:
        """Whether a cell is there, and at the rate that is chosen now."""
        return cell is not None and (way == "none" or cell["lr"] == self.record["rates"][way]["lr"])

    def _choose_rate(self, way: str) -> None:
        """The best of a few rates on windows that are neither trained nor measured on.

        Where the best is the lowest or the highest tried, the next beyond it is tried too.
        """
        known = self.record["rates"].get(way)
        if known and not known["tried"]:
            return  # given
        tried = {float(rate): value for rate, value in (known or {"tried": {}})["tried"].items()}
        wanted: list[float] = [rate for rate in LR_CHOICES if rate not in tried]
        while True:
            for lr in wanted:
                tried[lr] = self._search(way, lr)
            best, tries = min(tried, key=lambda rate: tried[rate]), sorted(tried)
            at = LR_LADDER.index(best)
            beyond = LR_LADDER[max(0, at - 1) : at + 2]
            wanted = [rate for rate in beyond if not tries[0] <= rate <= tries[-1]]
            if not wanted:
                break
        self.record["rates"][way] = {"lr": best, "tried": {str(k): tried[k] for k in tries}}

    def _search(self, way: str, lr: float) -> float:
        if self._searched is None:
            self._searched = self.prune("magnitude", "0.6", 0)
        pruned, masks = self._searched
        try:
            cell = self.cell(pruned, masks, way, 0, lr, "valid", SEARCH_STEPS)
        except secateur.SecateurError:
            return float("inf")
        return float(cell["perplexity"])

    def save(self) -> None:
        """Keep what is done."""
        finish("recovery", self.record, self.path)


def _told(cell: dict[str, Any]) -> str:
    return f"{cell['perplexity']:9.3f}  {cell['share']:.3%}  {cell['cpu_seconds']:.1f} s"


def _drawn(windows: Windows, seed: int, samples: int) -> torch.Tensor:
    """The calibration windows of a seed."""
    generator = torch.Generator().manual_seed(seed)
    return windows.ids[torch.randperm(len(windows), generator=generator)[:samples]]


# -- models and their texts -------------------------------------------------------------------


@torch.no_grad()
def sampled(model: Any, count: int, length: int, seed: int, begin: int) -> torch.Tensor:
    """(count, length) ids drawn from the model itself, from its BOS on."""
    torch.manual_seed(seed)
    ids = torch.full((count, 1), begin)
    past = None
    for _ in range(length - 1):
        last = ids if past is None else ids[:, -1:]
        out = model(input_ids=last, past_key_values=past, use_cache=True)
        past = out.past_key_values
        chosen = torch.multinomial(out.logits[:, -1].softmax(-1), 1)
        ids = torch.cat([ids, chosen], 1)
    return ids


def stories(length: int = 256) -> tuple[Any, dict[str, Windows]]:
    """stories260k and windows sampled from it."""
    dense = load(str(DATA / "stories260k"))
    model = dense.model.eval()
    path = Path(os.environ.get("SECATEUR_CACHE", Path.home() / ".cache" / "secateur"))
    path = path / f"stories260k-sampled-{length}.safetensors"
    if not path.exists():
        begin = dense.tokenizer.bos_token_id
        sizes = {"train": (512, 1), "calibration": (64, 2), "valid": (32, 3), "test": (64, 4)}
        save_tensors(
            path, {k: sampled(model, n, length, seed, begin) for k, (n, seed) in sizes.items()}
        )
    texts = {k: Windows(ids) for k, ids in load_file(path).items()}
    return model, texts | {"test": Windows(texts["test"].ids[:32])}


def small_opt(texts: dict[str, Windows]) -> Any:
    """An OPT of stories260k's size (it has biases), trained on the sampled windows."""
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=512, hidden_size=64, word_embed_proj_dim=64, ffn_dim=256, num_hidden_layers=5,
        num_attention_heads=8, max_position_embeddings=512, dropout=0.0, pad_token_id=0,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    path = Path(os.environ.get("SECATEUR_CACHE", Path.home() / ".cache" / "secateur"))
    path = path / "small-opt.safetensors"
    torch.manual_seed(0)
    model = OPTForCausalLM(config).eval()
    if path.exists():
        state = load_file(path)
        model.load_state_dict(state, strict=False)
        model.tie_weights()
        return model.requires_grad_(False)
    settings = TrainSettings(
        steps=1500, lr=4e-3, batch=8, schedule="cosine", weight_decay=0.1, checkpoint_every=None
    )
    fit(model, texts["train"], settings, progress=RichProgress(), label="training a small OPT")
    save_tensors(path, {n: p.detach() for n, p in model.named_parameters()})
    return model.requires_grad_(False)


def smollm(length: int) -> tuple[Any, dict[str, Windows]]:
    """SmolLM2-135M-Instruct (de-quantised Q4_1) and WikiText-2."""
    dense = load("demo")
    valid, test = str(DATA / "wikitext-2" / "valid.txt"), str(DATA / "wikitext-2" / "test.txt")
    words = dense.tokenizer
    texts = {
        "train": training_windows(valid, words, 60_000, length),
        "calibration": calibration_windows(valid, words, 32, 256),
        "test": evaluation_windows(test, words, 512, 8),
        "valid": evaluation_windows("pydoc:test", words, 256, 4),
    }
    return dense.model.requires_grad_(False), texts


# -- speed ------------------------------------------------------------------------------------

SPEED_WAYS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "full": (("all",), {}),
    "biases+norms": (("biases", "norms"), {}),
    "norms": (("norms",), {}),
    "lora": (("lora-prune",), {"rank": 16}),
    "mask-lora": (("mask-lora",), {"rank": 16}),
    "scale-lora": (("scale-lora",), {"rank": 16}),
}


# one way over another, what is compared, the most it may be
RATIOS = (
    ("biases+norms", "full", "step", 0.75),
    ("biases+norms", "full", "peak", 0.6),
    ("norms", "full", "step", 0.75),
    ("norms", "full", "peak", 0.6),
    ("mask-lora", "lora", "step", 1.3),
    ("scale-lora", "lora", "step", 1.3),
)


def one_speed(way: str, tokens: int, steps: int) -> dict[str, Any]:
    """Step times and the peak memory of one way, in a process of its own."""
    from secateur.training.adapters import AdapterOptions, Adapters
    from secateur.training.loop import Hook
    from secateur.training.masked import KeepZeros
    from secateur.training.perp import parts
    from secateur.training.subsets import add_biases, choose

    loaded = load("demo")
    view = ModelView.of(loaded.model)
    masks = {}
    for matrix in view.matrices():
        weight = matrix.tensor()
        cut = weight.abs().flatten().kthvalue(weight.numel() // 2).values
        masks[matrix.name] = weight.abs() <= cut
        weight.masked_fill_(masks[matrix.name], 0)
    train, adapter = SPEED_WAYS[way]
    subsets, kind = parts(train)
    if "biases" in subsets:
        add_biases(view)
    view.model.requires_grad_(False)
    choose(view, subsets)
    if kind is not None:
        Adapters.attach(view, masks, AdapterOptions(kind, **adapter))
    data = Windows(torch.randint(5, 40000, (8, tokens), generator=torch.Generator().manual_seed(0)))

    class Clock(Hook):
        times: list[float] = []  # noqa: RUF012 - one clock a process

        def before_forward(self, at: Any) -> None:
            self.start = time.process_time()

        def after_step(self, at: Any) -> None:
            self.times.append(time.process_time() - self.start)
            if at.step == 1:
                forget_peak()

    settings = TrainSettings(steps=steps, lr=1e-4, batch=1, checkpoint_every=None)
    # The copy that would undo a training gone wrong is kept on disk in a run, not in memory.
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        fit(
            view.model, data, settings, hooks=[KeepZeros(view, masks), Clock()],
            folder=Path(folder),
        )  # fmt: skip
    times = sorted(Clock.times[1:])
    return {"step": times[len(times) // 2], "times": times, "peak": memory("VmHWM")}


def speed(path: Path | None, tokens: int, rounds: int, ways: list[str]) -> None:
    """Ratios of step time and peak memory, each way in a process of its own, in turns."""
    from benchmarks.common import in_fresh_process, spread, verdict

    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    for turn in range(rounds):
        order = ways if turn % 2 == 0 else ways[::-1]
        for way in order:
            made = in_fresh_process(
                "benchmarks.recovery", "--one", way, "--tokens", tokens, "--steps", 4
            )
            runs[way].append(made)
            print(
                f"{way:14} {made['step']:.2f} s a step, peak {made['peak'] / 2**20:.0f} MiB",
                flush=True,
            )

    figures: dict[str, Any] = {"tokens_per_step": tokens, "runs": runs}
    for one, other, key, limit in RATIOS:
        if one not in runs or other not in runs:
            continue
        name = f"{one} / {other}, {key}"
        pairs = zip(runs[one], runs[other], strict=True)
        figures[name] = {**spread([x[key] / y[key] for x, y in pairs]), "limit": limit}
        print(name, figures[name]["median"], verdict(figures[name]["median"], limit))
    finish("recovery", figures, path or RESULTS / "recovery_speed.json")


def main() -> int:
    """The command line."""
    parser = arguments(__doc__)
    parser.add_argument("--biased", action="store_true", help="on a small OPT, which has biases")
    parser.add_argument("--smollm", action="store_true", help="a thin grid on SmolLM2-135M")
    parser.add_argument("--speed", action="store_true", help="step time and memory")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, help="steps of each training")
    parser.add_argument("--tokens", type=int, default=256, help="tokens in a step (--speed)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of --speed")
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds")
    parser.add_argument("--ways", nargs="*", help=f"of {', '.join(WAYS)}")
    given = parser.parse_args()
    torch.set_num_threads(1)
    among = tuple(given.ways or WAYS)
    if given.one:
        print(json.dumps(one_speed(given.one, given.tokens, given.steps or 4)))
        return 0
    if given.speed:
        speed(given.json, given.tokens, given.rounds, given.ways or list(SPEED_WAYS))
        return 0
    if given.smollm:
        model, texts = smollm(256)
        bench = Bench(
            "SmolLM2-135M-Instruct, de-quantised Q4_1",
            given.json or RESULTS / "recovery_smollm.json", model, texts,
            steps=given.steps or 50, batch=1, samples=32,
        )  # fmt: skip
        for way, lr in (("norms", 2e-3), ("mask-lora", 5e-4), ("reconstruction", 1e-3)):
            bench.record["rates"].setdefault(way, {"lr": lr, "tried": {}})
        thin = tuple(given.ways or ("norms", "mask-lora", "reconstruction"))
        bench.grid(("magnitude", "wanda"), ("0.5", "2:4"), (0,), thin)
        bench.save()
        return 0
    model, texts = stories()
    if given.biased:
        model = small_opt(texts)
    bench = Bench(
        "a small OPT" if given.biased else "stories260k",
        given.json or RESULTS / f"recovery{'_biased' if given.biased else ''}.json",
        model, texts, steps=given.steps or 30, batch=2, samples=32,
    )  # fmt: skip
    bench.grid(CRITERIA, TARGETS, SEEDS[: given.seeds], among)
    bench.save()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
