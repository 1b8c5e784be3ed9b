"""S2HPruner and its ablations on Fashion-MNIST: accuracy of the soft and the hard network, the gap.

python -m benchmarks.s2hpruner                     # every cell, three seeds; resumes cell by cell
python -m benchmarks.s2hpruner --nets resnet --flops 0.15 --seeds 0 --variants s2h mask
python -m benchmarks.s2hpruner --minutes 12        # as many cells as begin within that time

Small on purpose, so that a cell takes some 5 to 35 CPU seconds on one thread: 8,000 training and
2,000 test images, a few epochs, networks of 18,000 to 80,000 parameters; the ResNet and the
depth-wise MobileNet see the images at 14 x 14. Every variant has the same steps. ``uniform`` is the
reference: the network made narrower by the same share everywhere before its training, to the same
FLOPs. The ViT's ``dis_scale`` was chosen on seed 0 at 15 %; all else is the defaults.
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.common import RESULTS, arguments, finish
from secateur.allocation.channels import Budget, uniform_widths
from secateur.data.image_sources import read_images
from secateur.data.images import ImageSet
from secateur.files import write_json
from secateur.models.channel_graph import channel_groups
from secateur.models.channel_surgery import shrink_channels
from secateur.models.vision.mobilenet import MobileNet
from secateur.models.vision.resnet import ResNet
from secateur.models.vision.vit import ViT
from secateur.training.hooks import classification_loss
from secateur.training.loop import fit
from secateur.training.s2h_finish import learn_widths, measure_gap
from secateur.training.s2h_options import Learning
from secateur.training.settings import TrainSettings

VARIANTS: dict[str, dict[str, Any]] = {
    "s2h": {},
    "one-way": {"distillation": "one-way"},
    "coupled": {"distillation": "t2"},
    "mask": {"distillation": "none"},
    "hard": {"distillation": "none", "train": "hard"},
}
FLOPS = (0.15, 0.35, 0.55)
SEEDS = (0, 1, 2)
TRAIN, TEST = 8000, 2000


@dataclass(frozen=True)
class Net:
    """A network, whether its images are halved, how it is trained, and options of all variants."""

    make: Any
    halved: bool
    training: dict[str, Any]
    options: dict[str, Any]


NETS = {
    "resnet": Net(
        lambda: ResNet(1, 10, 16, 1), True,
        {"lr": 0.1, "optimizer": "sgd", "weight_decay": 5e-4}, {},
    ),
    "vit": Net(
        lambda: ViT(1, 10, 28, 7, 64, 3, 4), False,
        {"lr": 2e-3, "optimizer": "adamw", "weight_decay": 0.05},
        {"dis_scale": 1.0},
    ),
    "mobilenet": Net(
        lambda: MobileNet(1, 10, 8), True,
        {"lr": 0.1, "optimizer": "sgd", "weight_decay": 5e-4}, {},
    ),
}  # fmt: skip


def images(net: str) -> tuple[ImageSet, ImageSet]:
    """Training and test images of a network."""
    both = []
    for part, count in (("train", TRAIN), ("test", TEST)):
        found = read_images("fashion-mnist", part).first(count)
        if NETS[net].halved:
            assert found.pixels is not None
            half = F.avg_pool2d(found.pixels.float(), 2).round().to(torch.uint8)
            found = replace(found, pixels=half)
        both.append(found)
    return both[0], both[1]


@torch.no_grad()
def accuracy(model: nn.Module, test: ImageSet) -> float:
    """Share of the test images that are right."""
    model.eval()
    right = sum(int((model(b.pixels).argmax(-1) == b.labels).sum()) for b in test.batches(250))
    return right / len(test)


def cell(net: str, variant: str, flops: float, seed: int, steps: int) -> dict[str, Any]:
    """One training: accuracies, gap, widths, CPU seconds."""
    train, test = images(net)
    torch.manual_seed(seed)
    model = NETS[net].make()
    groups = channel_groups(model, train.example)
    settings = TrainSettings(
        steps=steps, batch=64, schedule="cosine", warmup=0.05, seed=seed, checkpoint_every=None,
        **NETS[net].training,
    )  # fmt: skip
    start = time.process_time()
    if variant in ("dense", "uniform"):
        if variant == "uniform":
            widths = uniform_widths(groups, Budget("flops", 1 - flops))
            gone = {
                g.key: torch.arange(g.n_units) >= widths[g.key]
                for g in groups.prunable
                if widths[g.key] < g.n_units
            }
            shrink_channels(model, groups, gone)
        model.train()
        fit(model, train, settings, loss=classification_loss)
        seconds = time.process_time() - start
        share = float(channel_groups(model, train.example).flops()) / float(groups.flops())
        return {"hard": accuracy(model, test), "flops": round(share, 4), "seconds": seconds}
    options = Learning(flops=flops, **NETS[net].options, **VARIANTS[variant])
    learned, _ = learn_widths(model, groups, train, settings, options)
    seconds = time.process_time() - start
    gap = measure_gap(learned, [b.pixels for b in train.batches(64, 1280)], test.batches(250))
    chosen = learned.chosen()
    return {
        **asdict(gap),
        "flops": round(learned.flops_share(), 4),
        "widths": list(chosen.values()),
        "seconds": seconds,
    }


def summary(cells: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Mean and spread over seeds, for each network, FLOPs and variant."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for key, found in cells.items():
        rows.setdefault(key.rpartition("/")[0], []).append(found)
    out = {}
    for key, found in sorted(rows.items()):
        row: dict[str, Any] = {"seeds": len(found)}
        for field in ("soft", "hard", "divergence", "distance", "flops", "seconds"):
            values = [cell[field] for cell in found if field in cell]
            if values:
                row[field] = round(statistics.fmean(values), 5)
                if field in ("soft", "hard") and len(values) > 1:
                    row[f"{field}_sd"] = round(statistics.stdev(values), 5)
        out[key] = row
    return out


def main() -> None:
    """Every cell that is not there yet."""
    parser = arguments(__doc__)
    parser.add_argument("--nets", nargs="+", default=list(NETS))
    parser.add_argument("--variants", nargs="+", default=["uniform", *VARIANTS])
    parser.add_argument("--flops", nargs="+", type=float, default=list(FLOPS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--minutes", type=float, default=1e9, help="no cell begins later")
    given = parser.parse_args()
    torch.set_num_threads(1)
    store = RESULTS / f"s2hpruner_{given.steps}_cells.json"
    cells = json.loads(store.read_text("utf-8")) if store.exists() else {}
    end = time.monotonic() + 60 * given.minutes
    wanted = [(net, "dense", 1.0, seed) for seed in given.seeds for net in given.nets]
    wanted += [
        (net, variant, flops, seed)
        for seed in given.seeds
        for net in given.nets
        for flops in given.flops
        for variant in given.variants
    ]
    for net, variant, flops, seed in wanted:
        key = f"{net}/{flops}/{variant}/{seed}"
        if key in cells or time.monotonic() > end:
            continue
        found = cell(net, variant, flops, seed, given.steps)
        # Another process may have added its cells meanwhile.
        cells = json.loads(store.read_text("utf-8")) if store.exists() else cells
        cells[key] = found
        write_json(store, cells)
        print(key, {k: round(v, 4) for k, v in found.items() if isinstance(v, float)}, flush=True)
    figures = {
        "protocol": {
            "images": f"fashion-mnist, {TRAIN} train, {TEST} test, spread evenly",
            "steps": given.steps,
            "batch": 64,
            "options": {name: net.options for name, net in NETS.items()},
        },
        "summary": summary(cells),
    }
    finish("s2hpruner", figures, given.json)


if __name__ == "__main__":
    main()
