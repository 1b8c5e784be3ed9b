"""DEPrune on whole networks: accuracy and latency against the share of taps, each choice at equal shares.

    python -m benchmarks.deprune fashion     # a depth-wise net trained on Fashion-MNIST
    python -m benchmarks.deprune imagenet --images FOLDER   # EfficientNet-Lite0, 1,000 photographs
    python -m benchmarks.deprune speed       # EfficientNet-Lite0's latency and where it goes

Cells are kept in the results file as they are done and not done again. Latency is of one image on
one thread, CPU time, in turns with the dense network in torch's two layouts, batch norms folded in all of
them; ratios are the better dense time over ours. The photographs are those of the repository
EliSchwartz/imagenet-sample-images, one a class: half of them measure batch norms and tune, the
other half are named.
"""

from __future__ import annotations

import copy
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.common import RESULTS, alternate, arguments, finish
from secateur.data.image_sources import read_images
from secateur.data.images import ImageSet
from secateur.evaluation.accuracy import accuracy
from secateur.kernels.depthwise import is_depthwise
from secateur.methods.deprune import DEPrune
from secateur.methods.vision_base import VisionJob, VisionOutcome, VisionTarget
from secateur.models.channel_graph import channel_groups
from secateur.models.inference import inference_copy
from secateur.models.vision.efficientnet_lite import pretrained
from secateur.models.vision.loading import load_vision
from secateur.models.vision.mobilenet import MobileNet
from secateur.run.vision import distilled
from secateur.tensorfile import save_tensors
from secateur.training.images import fit_images, recalibrate_images
from secateur.training.settings import TrainSettings

VARIANTS = ("dcp", "b", "bh", "fours", "weight", "channel")
CACHE = Path(__file__).parent / ".cache"


def cut(model: nn.Module, example: Tensor, variant: str, share: float, pw: float) -> VisionOutcome:
    """DEPrune in place; ``b-global`` compares taps over all layers."""
    name, _, layers = variant.partition("-")
    job = VisionJob(
        model, channel_groups(model, example), VisionTarget("weights", share), example=example
    )
    method = DEPrune(variant=name, layers=layers or "uniform", pw=pw)  # type: ignore[arg-type]
    return method.prune(job)


@torch.no_grad()
def latency(
    dense: nn.Module, pruned: nn.Module, masks: dict[str, Tensor], x: Tensor, rounds: int
) -> dict[str, Any]:
    """Milliseconds of one image, and ratios."""
    folded = inference_copy(dense, {}, x)
    last = copy.deepcopy(folded).to(memory_format=torch.channels_last)
    x_last = x.contiguous(memory_format=torch.channels_last)
    fast, plain = inference_copy(pruned, masks, x), inference_copy(pruned, {}, x)
    plain_last = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    ways = {
        "dense planes": lambda: folded(x),
        "dense channels last": lambda: last(x_last),
        "pruned, torch planes": lambda: plain(x),
        "pruned, torch channels last": lambda: plain_last(x_last),
        "pruned, ours": lambda: fast(x),
    }
    for way in ways.values():
        way(), way()
    seconds = alternate(ways, rounds)  # CPU time: a busy machine costs wall time only
    milli = {name: 1e3 * statistics.median(times) for name, times in seconds.items()}
    dense_best = min(milli["dense planes"], milli["dense channels last"])
    cut_best = min(milli["pruned, torch planes"], milli["pruned, torch channels last"])
    return {
        "milliseconds": {name: round(value, 3) for name, value in milli.items()},
        "ratio": round(dense_best / milli["pruned, ours"], 3),
        "ratio_of_channels_alone": round(dense_best / cut_best, 3),
        "where": {
            "dense planes": where(folded, x, rounds),
            "dense channels last": where(last, x_last, rounds),
            "pruned, ours": where(fast, x, rounds),
        },
    }


def kind_of(module: nn.Module) -> str | None:
    """What a layer is, for the table of where time goes."""
    if isinstance(module, nn.Conv2d):
        one = module.kernel_size == (1, 1)
        return (
            "depth-wise" if is_depthwise(module) else "point-wise" if one else "other convolutions"
        )
    return "linear" if isinstance(module, nn.Linear) else None


def where(model: nn.Module, x: Tensor, rounds: int) -> dict[str, float]:
    """Milliseconds by kind of layer, from clocks around each; ``rest``: activations, sums, pooling."""
    clock, started, spent = time.process_time, [0.0], dict[str, float]()

    def before(module: nn.Module, args: Any) -> None:
        started[0] = clock()

    def after(module: nn.Module, args: Any, out: Any) -> None:
        kind = str(kind_of(module))
        spent[kind] = spent.get(kind, 0.0) + clock() - started[0]

    handles = [
        handle
        for module in model.modules()
        if kind_of(module)
        for handle in (
            module.register_forward_pre_hook(before),
            module.register_forward_hook(after),
        )
    ]
    turns = []
    for _ in range(rounds):
        spent.clear()
        start = clock()
        model(x)
        whole = clock() - start
        turns.append(dict(spent) | {"rest": whole - sum(spent.values())})
    for handle in handles:
        handle.remove()
    return {k: round(1e3 * statistics.median(t[k] for t in turns), 3) for k in turns[0]}


class Cells:
    """A results file that grows."""

    def __init__(self, name: str, path: Path | None) -> None:
        self.name, self.path = name, path or RESULTS / f"deprune_{name}.json"
        known = json.loads(self.path.read_text()) if self.path.is_file() else {}
        self.figures: dict[str, Any] = {"cells": known.get("cells", {})}

    def __contains__(self, key: str) -> bool:
        return key in self.figures["cells"]

    def put(self, key: str, cell: dict[str, Any]) -> None:
        """Add a cell and write."""
        self.figures["cells"][key] = cell
        short = {k: v for k, v in cell.items() if not isinstance(v, dict)}
        print(key, short, flush=True)
        finish("deprune", self.figures, self.path)


def fashion_net(train: ImageSet, seed: int) -> nn.Module:
    """The dense network of a seed, trained once (18 k parameters, three quarters of a pass)."""
    torch.manual_seed(seed)
    model = MobileNet(width=8)
    kept = CACHE / f"deprune_fashion_{seed}.safetensors"
    if kept.is_file():
        model.load_state_dict(load_file(kept))
        return model.eval()
    settings = TrainSettings(
        steps=350, lr=0.1, batch=128, optimizer="sgd", schedule="cosine",
        weight_decay=1e-4, clip=None, checkpoint_every=50, seed=seed,
    )  # fmt: skip
    fit_images(model, train, settings, folder=CACHE / f"deprune_fashion_{seed}")
    save_tensors(kept, model.state_dict())
    return model


def fashion(args: Any) -> None:
    """Every choice at every share and seed; nothing else is pruned. Latency is the first seed's."""
    train, test = read_images("fashion-mnist:train"), read_images("fashion-mnist:test").first(5000)
    cells = Cells("fashion", args.json)
    x = train.batch([0]).pixels
    for seed in args.seeds:
        dense = fashion_net(train, seed)
        if f"dense seed {seed}" not in cells:
            cells.put(f"dense seed {seed}", {"accuracy": accuracy(dense, test).top1})
        for share in args.shares:
            for variant in args.variants:
                key = f"{variant} {share:g} seed {seed}"
                if key in cells:
                    continue
                model = copy.deepcopy(dense)
                outcome = cut(model, torch.zeros_like(x), variant, share, 0.0)
                recalibrate_images(model, train, batches=20)
                before = accuracy(model, test).top1
                settings = TrainSettings(
                    steps=args.steps, lr=0.02, batch=128, optimizer="sgd", schedule="cosine",
                    weight_decay=1e-4, clip=None, checkpoint_every=None, seed=seed,
                )  # fmt: skip
                fit_images(model, train, settings, masks=outcome.masks)
                cell: dict[str, Any] = {
                    "share": outcome.record["share"],
                    "accuracy_recalibrated": before,
                    "accuracy": accuracy(model, test).top1,
                    "parameters": sum(p.numel() for p in model.parameters()),
                    "folded": outcome.record["folded_channels"],
                }
                if seed == args.seeds[0]:
                    cell["latency"] = latency(dense, model, outcome.masks, x, 60)
                cells.put(key, cell)
    cells.figures["summary"] = over_seeds(cells.figures["cells"])
    finish("deprune", cells.figures, cells.path)


def over_seeds(cells: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Mean and spread of the accuracies over seeds."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for key, cell in cells.items():
        rows.setdefault(key.partition(" seed ")[0], []).append(cell)
    table = {}
    for key, found in rows.items():
        row: dict[str, Any] = {"seeds": len(found)}
        for field in ("accuracy_recalibrated", "accuracy"):
            values = [cell[field] for cell in found if field in cell]
            if values:
                row[field] = round(statistics.fmean(values), 4)
                row[f"{field}_sd"] = round(statistics.stdev(values), 4) if values[1:] else None
        table[key] = row
    return table


def imagenet(args: Any) -> None:
    """Pretrained weights; half of the photographs tune, the other half are named."""
    loaded = load_vision("efficientnet-lite0")
    dense = loaded.model
    images = read_images(f"{args.images}:all", preprocess=loaded.preprocess)
    tune, test = images.subset(range(0, 1000, 2)), images.subset(range(1, 1000, 2))
    cells = Cells("imagenet", args.json)
    if "dense" not in cells:
        cells.put("dense", {"accuracy": accuracy(dense, test).top1})
    for share in args.shares:
        for variant in args.variants:
            key = f"{variant} {share:g} pw {args.pw:g}"
            if key in cells:
                continue
            model = copy.deepcopy(dense)
            outcome = cut(model, torch.zeros(1, 3, 224, 224), variant, share, args.pw)
            cell: dict[str, Any] = {"share": outcome.record["share"]}
            cell["accuracy_cut"] = accuracy(model, test).top1
            recalibrate_images(model, tune, batches=8)
            cell["accuracy_recalibrated"] = accuracy(model, test).top1
            if args.steps:
                settings = TrainSettings(
                    steps=args.steps, lr=0.01, batch=16, optimizer="sgd", schedule="cosine",
                    clip=1.0, checkpoint_every=None,
                )  # fmt: skip
                loss = distilled(copy.deepcopy(dense), 1.0, 1.0)
                fit_images(model, tune, settings, masks=outcome.masks, loss=loss)
                recalibrate_images(model, tune, batches=8)
                cell["accuracy_tuned"] = accuracy(model, test).top1
            cells.put(key, cell)


def speed(args: Any) -> None:
    """Latency of EfficientNet-Lite0; accuracy does not matter here."""
    dense = pretrained()
    cells = Cells("speed", args.json)
    x = torch.randn(1, 3, 224, 224)
    for share, pw in ((0.5, 0.0), (0.8, 0.0), (0.9, 0.0), (0.8, 0.3), (0.8, 0.5)):
        for variant in args.variants:
            key = f"{variant} {share:g} pw {pw:g}"
            if key not in cells:
                model = copy.deepcopy(dense)
                outcome = cut(model, torch.zeros_like(x), variant, share, pw)
                row = latency(dense, model, outcome.masks, x, args.rounds)
                row["folded"] = outcome.record["folded_channels"]
                cells.put(key, row)


def main() -> None:
    """Run the cells of one command."""
    parser = arguments(__doc__)
    parser.add_argument("what", choices=["fashion", "imagenet", "speed"])
    parser.add_argument("--variants", nargs="*", default=None)
    parser.add_argument("--shares", nargs="*", type=float, default=[0.7, 0.9, 0.5])
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--pw", type=float, default=0.0)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--images", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.variants = args.variants or (("b",) if args.what == "speed" else VARIANTS)
    {"fashion": fashion, "imagenet": imagenet, "speed": speed}[args.what](args)


if __name__ == "__main__":
    main()
