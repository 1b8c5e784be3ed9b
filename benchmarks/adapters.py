"""Time and memory of a training step with adapters, against plain LoRA and full fine-tuning.

    python -m benchmarks.adapters

A step is forward, loss, backward and AdamW on SmolLM2-135M (half of each matrix zero), in
turns, medians of the ratios to our plain LoRA; with PEFT's LoRA beside it where that is
installed. MaskLoRA and ScaleLoRA need the gradient of the whole product BA, a third large
matrix product beside forward's and backward's, which plain LoRA never forms: with the
activations kept they cannot come below 3/2 of its time inside the linears, with activations
recomputed (gradient checkpointing) not below 4/3. Wanted for the whole step: 1.3. ``product`` is
plain LoRA that forms that third product too and throws it away: the least a masked one can take.

Memory: the most a fresh process holds during two steps beyond what it held with the model and
the adapters in place.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

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
from secateur.evidence.gradients import sequence_loss
from secateur.models.anatomy import ModelView
from secateur.training.adapters import AdapterOptions, Adapters
from secateur.training.low_rank import KINDS

LIMIT = 1.3  # times plain LoRA
RANK = 16
MODES = ("kept", "recomputed")
KIND_NAMES = (*KINDS, "full")
TIMED = (
    "lora",
    "product",
    "mask-lora",
    "scale-lora",
    "full",
)  # lora-prune trains as lora, spp as scale-lora


def halved(view: ModelView) -> dict[str, Tensor]:
    """Half of every matrix set to zero, at random; the masks."""
    generator = torch.Generator().manual_seed(0)
    masks = {}
    for matrix in view.matrices():
        masks[matrix.name] = torch.rand(matrix.shape, generator=generator) < 0.5
        matrix.tensor().masked_fill_(masks[matrix.name], 0)
    return masks


def put(model: nn.Module, modules: dict[str, nn.Module]) -> None:
    """Put these modules at their names."""
    for name, module in modules.items():
        parent, _, leaf = name.rpartition(".")
        model.get_submodule(parent)._modules[leaf] = module


class _Product(torch.autograd.Function):
    """y as it is; in backward dL/dy (outputs x tokens) times x, for nothing."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> tuple[Tensor, None]:
        (x,), g = ctx.saved_tensors, upstream[0]
        _ = g.reshape(-1, g.shape[-1]).T @ x.reshape(-1, x.shape[-1])
        return g, None


class WithProduct(nn.Module):
    """A layer that also forms the gradient of its whole weight."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output."""
        made: Tensor = _Product.apply(self.layer(x), x)
        return made


class Ways:
    """The same model with each kind of adapter, to be stepped in turns."""

    def __init__(
        self, model: Any, ids: Tensor, kinds: tuple[str, ...], headless: bool = False
    ) -> None:
        self.model, self.ids, self.headless = model, ids, headless
        view = ModelView.of(model)
        self.plain = {m.name: m.module for m in view.matrices()}
        masks = halved(view)
        self.on: dict[str, dict[str, nn.Module]] = {}
        self.trained: dict[str, list[nn.Parameter]] = {}
        for kind in kinds:
            if kind in KINDS:
                adapters = Adapters.attach(view, masks, AdapterOptions(kind, rank=RANK))
                self.on[kind] = dict(adapters.modules)
                self.trained[kind] = list(adapters.parameters().values())
                put(model, self.plain)
            elif kind == "product":
                adapters = Adapters.attach(view, masks, AdapterOptions("lora", rank=RANK))
                self.on[kind] = {n: WithProduct(m) for n, m in adapters.modules.items()}
                self.trained[kind] = list(adapters.parameters().values())
                put(model, self.plain)
            elif kind == "peft":
                self.on[kind] = self._peft(view)
                self.trained[kind] = [
                    p for m in self.on[kind].values() for p in m.parameters() if p.requires_grad
                ]
                put(model, self.plain)
            else:
                self.on[kind] = self.plain
                self.trained[kind] = list(model.parameters())
        self.optimizers = {
            kind: torch.optim.AdamW(parameters, lr=1e-5, weight_decay=0.0)
            for kind, parameters in self.trained.items()
        }

    def _peft(self, view: ModelView) -> dict[str, nn.Module]:
        from peft import LoraConfig, inject_adapter_in_model

        names = [m.name for m in view.matrices()]
        config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=names)
        inject_adapter_in_model(config, self.model)
        return {name: self.model.get_submodule(name) for name in names}

    def step(self, kind: str) -> Callable[[], None]:
        """One training step with that kind."""

        def go() -> None:
            put(self.model, self.on[kind])
            for parameter in self.model.parameters():
                parameter.requires_grad_(False)
            for parameter in self.trained[kind]:
                parameter.requires_grad_(True)
            if self.headless:
                hidden = self.model.model(input_ids=self.ids, use_cache=False).last_hidden_state
                hidden.square().mean().backward()
                del hidden
            else:
                logits = self.model(input_ids=self.ids, use_cache=False).logits
                sequence_loss(logits, self.ids).backward()
                del logits
            self.optimizers[kind].step()
            self.optimizers[kind].zero_grad(set_to_none=True)
            put(self.model, self.plain)

        return go


def checkpointing(model: Any, on: bool) -> None:
    """Keep activations, or recompute each block's in backward."""
    if on:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    else:
        model.gradient_checkpointing_disable()
        model.eval()


def child(spec: str, blocks: int | None, kind: str, samples: int, length: int) -> dict[str, int]:
    """Two steps of one kind; bytes held at the most beyond those held before."""
    model = shortened(spec, blocks)
    ways = Ways(model, windows(model, samples, length), (kind,))
    forget_peak()
    before = memory("VmRSS")
    step = ways.step(kind)
    step()
    step()
    held = memory("VmHWM") - before
    return {"held": held, "trained": sum(p.numel() for p in ways.trained[kind])}


def measure_time(
    model: Any,
    samples: int,
    length: int,
    rounds: int,
    kinds: tuple[str, ...],
    headless: bool,
    modes: tuple[str, ...],
) -> dict[str, Any]:
    """Steps of all kinds in turns, with activations kept and with activations recomputed."""
    ways = Ways(model, windows(model, samples, length), kinds, headless)
    out: dict[str, Any] = {}
    for name in modes:
        checkpointing(model, name == "recomputed")
        steps = {kind: ways.step(kind) for kind in kinds}
        steps["lora"]()  # what a first step sets up for good
        seconds = alternate(steps, rounds)
        out[name] = {
            kind: {
                "seconds": spread(seconds[kind]),
                "times_lora": ratio(seconds[kind], seconds["lora"]),
            }
            for kind in kinds
        }
        for kind in kinds:
            times = out[name][kind]["times_lora"]["median"]
            judged = verdict(times, LIMIT) if kind in ("mask-lora", "scale-lora") else ""
            print(f"  activations {name}: {kind:10} {times}x LoRA  {judged}", flush=True)
    return out


def main() -> None:
    """Measure steps of every kind."""
    parser = arguments(__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--blocks", type=int, default=0, help="of that model; 0: all")
    parser.add_argument("--samples", type=int, default=1)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--headless", action="store_true", help="time the blocks alone, without head and loss"
    )
    parser.add_argument("--activations", nargs="+", default=MODES, choices=MODES)
    parser.add_argument("--only", choices=("time", "memory"))
    parser.add_argument("--kinds", nargs="*", default=TIMED, help="what is timed, after lora")
    parser.add_argument("--child", choices=KIND_NAMES)
    given = parser.parse_args()
    torch.set_num_threads(1)
    shape = (given.samples, given.length)
    if given.child:
        print(json.dumps(child(given.model, given.blocks or None, given.child, *shape)))
        return
    kinds = tuple(dict.fromkeys(("lora", *given.kinds)))
    held = {}
    for kind in kinds if given.only != "time" else ():
        if kind in ("peft", "product"):
            continue
        got = in_fresh_process(
            "benchmarks.adapters", "--child", kind, "--model", given.model,
            "--blocks", given.blocks, "--samples", given.samples, "--length", given.length,
            environment=NO_HOLES,
        )  # fmt: skip
        held[kind] = got
        print(f"  memory of a step, {kind}: {got['held'] / MIB:.0f} MiB", flush=True)
    figures: dict[str, Any] = {
        "clock": "process CPU seconds, one thread",
        "model": given.model,
        "blocks": given.blocks or None,
        "windows": list(shape),
        "rank": RANK,
        "headless": given.headless,
        "limit": LIMIT,
    }
    if held:
        figures["memory"] = held
        figures["memory_times_lora"] = {
            kind: round(got["held"] / held["lora"]["held"], 3) for kind, got in held.items()
        }
    if given.only != "memory":
        model = shortened(given.model, given.blocks or None)
        figures["time"] = measure_time(
            model, *shape, given.rounds, kinds, given.headless, given.activations
        )
    finish("adapters", figures, given.json)


if __name__ == "__main__":
    main()
