"""Channel baselines on vision networks: accuracy, FLOPs and time, dense against narrower.

    python -m benchmarks.vision_channels fashion [--work DIR]
    python -m benchmarks.vision_channels lite0 --images FOLDER

``fashion`` trains a depth-wise separable network on Fashion-MNIST once, cuts it by every criterion at
every target, and tunes it for a quarter of an epoch. ``lite0`` takes EfficientNet-Lite0 with its ImageNet
weights: what its scaling is worth, and what a cut costs with nothing but batch norms measured anew. Its
images are a folder of one file for each of the 1,000 classes, sorted by name; four fifths of them are
what the norms see, a fifth is measured on.
"""

from __future__ import annotations

import sys
import tempfile
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import arguments, finish
from secateur.data.image_sources import read_images
from secateur.data.images import Preprocess
from secateur.evaluation.accuracy import accuracy
from secateur.evaluation.image_speed import compare_image_speed
from secateur.methods import methods
from secateur.methods.vision_base import VisionJob, VisionTarget
from secateur.models.channel_graph import channel_groups
from secateur.models.channel_surgery import mask_channels
from secateur.models.vision.loading import load_vision
from secateur.recipe_vision import VisionRecipe
from secateur.run.vision_compare import compare_vision
from secateur.training.images import recalibrate_images

METHODS = ("channel-l2", "channel-fpgm", "channel-random")
TARGETS = ("50%", "70%")
IMAGENET = Preprocess((123.675, 116.28, 103.53), (58.395, 57.12, 57.375), 256, 224)


def fashion(work: Path) -> dict[str, Any]:
    """Every criterion at every target on a network trained here."""
    recipe = VisionRecipe.build(
        {
            "model": "mobilenet",
            "model_options": {"width": 8},
            "images": "fashion-mnist",
            "pretraining": {"epochs": 1, "lr": 0.1, "batch": 128},
            "training": {"epochs": 0.25, "lr": 0.02, "batch": 128},
            "evaluation": {"batch": 250, "speed_seconds": 2, "speed_batch": 32},
        }
    )
    record = compare_vision(recipe, list(METHODS), list(TARGETS), work)
    return {key: record[key] for key in ("dense", "cells", "protocol")}


def lite0(folder: str) -> dict[str, Any]:
    """Scaling, and cuts without training, on EfficientNet-Lite0."""
    loaded = load_vision("efficientnet-lite0")
    test = read_images(f"{folder}:test", preprocess=loaded.preprocess)
    train = read_images(f"{folder}:train", preprocess=loaded.preprocess)
    other = replace(test, preprocess=IMAGENET)
    every = read_images(f"{folder}:all", preprocess=loaded.preprocess)
    out: dict[str, Any] = {
        "dense_on_all": accuracy(loaded.model, every).record(),
        "dense": accuracy(loaded.model, test).record(),
        "dense_with_imagenet_scaling": accuracy(loaded.model, other).record(),
        "cuts": [],
    }
    groups = channel_groups(loaded.model, test.example)
    for name in ("channel-l2", "channel-fpgm"):
        for share in (0.1, 0.2):
            model = deepcopy(loaded.model)
            job = VisionJob(model, groups, VisionTarget("flops", share))
            outcome = methods[name]().prune(job)  # type: ignore[attr-defined]
            masked = deepcopy(loaded.model)
            mask_channels(masked, groups, outcome.structure)
            pixels = test.batch(range(2)).pixels
            with torch.no_grad():
                far = (masked(pixels) - model(pixels)).abs().max() / model(pixels).abs().max()
            cut = accuracy(model, test).top1
            recalibrate_images(model, train, batches=10, batch=40)
            after = channel_groups(model, test.example).flops()
            out["cuts"].append(
                {
                    "method": name,
                    "asked": share,
                    "flops_ratio": round(groups.flops() / after, 3),
                    "masked_against_sliced": float(far),
                    "cut": cut,
                    "recalibrated": accuracy(model, test).top1,
                    "speed": compare_image_speed(loaded.model, model, pixels[:1], seconds=5)[
                        "forward"
                    ]["ratio"],
                }
            )
            print(out["cuts"][-1], file=sys.stderr)
    return out


def main() -> int:
    """One of the two."""
    parser = arguments(__doc__)
    parser.add_argument("part", choices=["fashion", "lite0"])
    parser.add_argument("--work", type=Path, help="where the runs lie; they are taken up again")
    parser.add_argument("--images", help="folder of lite0's images")
    given = parser.parse_args()
    torch.set_num_threads(1)
    name = f"vision_channels_{given.part}"
    if given.part == "fashion":
        with tempfile.TemporaryDirectory() as folder:
            figures = fashion(given.work or Path(folder) / "runs")
    else:
        figures = lite0(given.images)
    path = given.json or Path(__file__).parent / "results" / f"{name}.json"
    finish("vision_channels", figures, path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
