"""Do our ``compat="reference"`` masks equal those of the authors' own code, bit for bit?

Runs the original functions of local checkouts on a toy block, beside ours on the same
activations:

    python -m benchmarks.reference_agreement --wanda PATH --sparsegpt PATH --gblm PATH --json OUT

Nothing of the originals is part of this repository. They are imported from the paths given;
their CUDA calls and data loaders are neutralised in memory. "same statistics" hands our method
the activation statistics their code computed; "own statistics" lets ours accumulate its own,
so that sums differ in the last bits and a weight on the threshold may change sides.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from secateur.evidence.statistics import Evidence, GradientMoments, InputMoments
from secateur.masks.target import Cut, Target
from secateur.methods import methods
from secateur.methods.base import Method

SEQUENCES, LENGTH, WIDTH, HIDDEN = 16, 96, 256, 640
TARGETS = ("0.5", "0.6", "0.7", "2:4", "4:8")


class Block(nn.Module):
    """Three linears that see correlated inputs of unequal scale."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(WIDTH, WIDTH, bias=False)
        self.up = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.down = nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x: Tensor, **_: Any) -> tuple[Tensor]:
        x = x + self.mix(x)
        return (x + self.down(nn.functional.silu(self.up(x))),)


class Toy(nn.Module):
    """As much of a language model as the original drivers look at."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Module()
        self.model.layers = nn.ModuleList([Block()])
        self.config = SimpleNamespace(use_cache=False, hidden_size=WIDTH)
        self.hf_device_map: dict[str, str] = {}
        self.seqlen = LENGTH
        latent = torch.randn(SEQUENCES, LENGTH, WIDTH // 2) @ torch.randn(WIDTH // 2, WIDTH)
        self.states = (latent + torch.randn(latent.shape)) * (0.1 * torch.randn(WIDTH).exp())

    def forward(self, index: Tensor) -> Tensor:
        (out,) = self.model.layers[0](
            self.states[int(index) : int(index) + 1], attention_mask=None, position_ids=None
        )
        return out

    def linears(self) -> dict[str, nn.Linear]:
        return dict(self.model.layers[0].named_children())  # type: ignore[arg-type]


def loaders(*_: object, **__: object) -> tuple[list[tuple[Tensor]], None]:
    """Stands in for the originals' C4: indices of the toy's sequences."""
    return [(torch.tensor([i]),) for i in range(SEQUENCES)], None


def inputs_of(toy: Toy) -> dict[str, list[Tensor]]:
    """Every linear's input, sequence by sequence, (1, LENGTH, d_in) each."""
    seen: dict[str, list[Tensor]] = {name: [] for name in toy.linears()}
    hooks = [
        linear.register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0]))
        for name, linear in toy.linears().items()
    ]
    with torch.no_grad():
        for i in range(SEQUENCES):
            toy(torch.tensor([i]))
    for hook in hooks:
        hook.remove()
    return seen


def gradients_of(name: str, shape: torch.Size) -> GradientMoments:
    """Made-up gradients: the agreement is about what is done with them."""
    generator = torch.Generator().manual_seed(len(name))
    sums = GradientMoments(("l1", "l2"))
    for _ in range(SEQUENCES):
        sums.update(torch.randn(shape, generator=generator) * 1e-4)
    return sums


def load_package(path: Path, name: str) -> ModuleType:
    """``lib/prune.py`` of a checkout under a name of its own, on the CPU."""
    package = ModuleType(name)
    package.__path__ = [str(path / "lib")]
    sys.modules[name] = package
    module = importlib.import_module(f"{name}.prune")
    module.get_loaders = loaders  # type: ignore[attr-defined]
    return module


def neutralise_cuda() -> None:
    """The originals call CUDA unconditionally and import a class transformers has dropped."""
    torch.cuda.synchronize = lambda *_: None  # type: ignore[assignment]
    torch.cuda.empty_cache = lambda: None  # type: ignore[assignment]
    Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign,assignment]
    if not hasattr(transformers, "AdamW"):
        transformers.AdamW = torch.optim.AdamW


def n_m(target: Target) -> tuple[int, int]:
    """Their N of N:M counts what is *removed*."""
    if target.keep is None or target.group is None:
        return 0, 0
    return target.group - target.keep, target.group


def compare(
    method: Method, weight: Tensor, theirs: Tensor, target: Target, same: Evidence, own: Evidence
) -> dict[str, Any]:
    """Agreement of masks on one matrix, with their statistics and with ours."""
    cut = Cut.of(tuple(weight.shape), target, method.scope)  # type: ignore[arg-type]
    masks = [method.decide(weight, evidence, cut).mask for evidence in (same, own)]
    return {
        "target": str(target),
        "weights": weight.numel(),
        "pruned_by_original": int(theirs.sum()),
        "identical_on_same_statistics": bool(torch.equal(masks[0], theirs)),
        "differing_on_own_statistics": int((masks[1] != theirs).sum()),
    }


def own_evidence(name: str, inputs: list[Tensor], gram: bool, shape: torch.Size) -> Evidence:
    moments = InputMoments(inputs[0].shape[-1], gram=gram)
    for batch in inputs:
        moments.update(batch)
    return Evidence(name, moments, gradients_of(name, shape), SEQUENCES)


def drivers(
    path: Path, package: str, cases: dict[str, tuple[str, dict[str, Any]]]
) -> list[dict[str, Any]]:
    """Wanda's or GBLM-Pruner's whole prune functions, on every target."""
    original = load_package(path, package)
    wrapper = importlib.import_module(f"{package}.layerwrapper").WrappedGPT
    records = []
    for label, (function, options) in cases.items():
        variant = options.pop("use_variant", False)
        norm = options.get("norm", "l1")
        name = label.split()[0]
        for text in TARGETS:
            target, toy = Target.parse(text), Toy()
            if variant and target.is_pattern:
                continue
            inputs = inputs_of(toy)
            dense = {n: linear.weight.detach().clone() for n, linear in toy.linears().items()}
            gradients = {
                f"{n}_layer_0": 100.0 * gradients_of(n, w.shape).norm(norm)
                for n, w in dense.items()
            }
            with tempfile.TemporaryDirectory() as folder:
                torch.save(gradients, f"{folder}/gradients.pth")
                args = SimpleNamespace(
                    nsamples=SEQUENCES,
                    seed=0,
                    sparsity_ratio=target.sparsity,
                    use_variant=variant,
                    gradient_inv=False,
                    gradient_path=f"{folder}/gradients.pth",
                )
                n, m = n_m(target)
                getattr(original, function)(args, toy, None, "cpu", prune_n=n, prune_m=m)
            method = methods[name](compat="reference", **options)  # type: ignore[call-arg]
            for module, linear in toy.linears().items():
                wrapped = wrapper(nn.Linear(*dense[module].shape[::-1], bias=False))
                for batch in inputs[module]:
                    wrapped.add_batch(batch, None)
                own = own_evidence(module, inputs[module], False, dense[module].shape)
                same = own_evidence(module, inputs[module], False, dense[module].shape)
                same.moments().diagonal = wrapped.scaler_row * SEQUENCES  # a power of 2: exact
                theirs = linear.weight.detach() == 0
                record = compare(method, dense[module], theirs, target, same, own)
                records.append({"original": f"{package}: {function}", "method": label} | record)
    return records


def sparsegpt(path: Path) -> list[dict[str, Any]]:
    """The original SparseGPT class, module by module."""
    sys.path.insert(0, str(path))
    original = importlib.import_module("sparsegpt").SparseGPT
    records = []
    for text in TARGETS:
        target, toy = Target.parse(text), Toy()
        inputs = inputs_of(toy)
        for module, linear in toy.linears().items():
            dense = linear.weight.detach().clone()
            theirs = original(linear)
            for batch in inputs[module]:
                theirs.add_batch(batch, None)
            own = own_evidence(module, inputs[module], True, dense.shape)
            same = own_evidence(module, inputs[module], True, dense.shape)
            same.moments().gram = theirs.H * (SEQUENCES / 2)  # a power of 2: exact
            n, m = n_m(target)
            theirs.fasterprune(target.sparsity, prunen=n, prunem=m)
            method = methods["sparsegpt"](compat="reference")  # type: ignore[call-arg]
            record = compare(method, dense, linear.weight == 0, target, same, own)
            cut = Cut.of(tuple(dense.shape), target, method.scope)  # type: ignore[arg-type]
            ours = method.decide(dense, same, cut).weight
            assert ours is not None
            record["largest_difference_of_weights"] = float(
                (ours - linear.weight.detach()).abs().max()
            )
            records.append({"original": "SparseGPT.fasterprune", "method": "sparsegpt"} | record)
    return records


def commit_of(path: Path) -> str | None:
    done = subprocess.run(
        ["git", "-C", str(path), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("wanda", "sparsegpt", "gblm"):
        parser.add_argument(f"--{name}", type=Path, help=f"a checkout of the original {name}")
    parser.add_argument("--json", type=Path, help="where to write the outcome")
    given = parser.parse_args()
    neutralise_cuda()
    suites: dict[str, Callable[[Path], list[dict[str, Any]]]] = {
        "wanda": lambda path: drivers(
            path,
            "wanda",
            {
                "magnitude": ("prune_magnitude", {}),
                "wanda": ("prune_wanda", {}),
                "wanda variant": ("prune_wanda", {"variant": True, "use_variant": True}),
            },
        ),
        "sparsegpt": sparsegpt,
        "gblm": lambda path: drivers(
            path,
            "gblm",
            {
                "gblm l1": ("prune_gblm", {"norm": "l1"}),
                "gblm l2": ("prune_gblm", {"norm": "l2"}),
                "gradient l1": ("prune_gradient", {"norm": "l1"}),
            },
        ),
    }
    records, commits = [], {}
    for name, suite in suites.items():
        path = getattr(given, name)
        if path is not None:
            commits[name] = commit_of(path)
            records += suite(path)
    identical = sum(r["identical_on_same_statistics"] for r in records)
    weights = sum(r["weights"] for r in records)
    differing = sum(r["differing_on_own_statistics"] for r in records)
    outcome = {
        "command": "python -m benchmarks.reference_agreement --wanda PATH --sparsegpt PATH --gblm PATH",
        "commits": commits,
        "torch": torch.__version__,
        "matrices": len(records),
        "identical_on_same_statistics": identical,
        "weights": weights,
        "differing_on_own_statistics": differing,
        "records": records,
    }
    if given.json:
        given.json.write_text(json.dumps(outcome, indent=1) + "\n")
    print(f"{identical} of {len(records)} masks identical on the same statistics;", end=" ")
    print(f"{differing} of {weights} weights differ when each accumulates its own")


if __name__ == "__main__":
    main()
