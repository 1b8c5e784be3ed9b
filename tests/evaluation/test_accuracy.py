"""Accuracy is what counting gives, its protocol says on what; speed is a ratio in one run."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from secateur.data.images import ImageSet, Preprocess
from secateur.errors import NumericsError, UsageError
from secateur.evaluation.accuracy import accuracy
from secateur.evaluation.image_speed import compare_image_speed


class Shade(nn.Module):
    """Class = brightness in tenths; a parameter so that it has a device."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.scale, self.classes = nn.Parameter(torch.ones(1)), classes

    def forward(self, x: Tensor) -> Tensor:
        shade = x.mean((1, 2, 3)) * 10
        return -self.scale * (shade[:, None] - torch.arange(self.classes)).square()


def images(count: int = 30) -> ImageSet:
    targets = torch.arange(count) % 10
    pixels = (targets * 25.5).round().to(torch.uint8)[:, None, None, None].expand(count, 1, 2, 2)
    targets = targets.clone()
    targets[::3] = (targets[::3] + 1) % 10  # a third is labelled wrongly
    how = Preprocess((0.0,), (255.0,))
    return ImageSet("shades", targets, tuple("0123456789"), pixels.contiguous(), (), 1, how)


def test_accuracy_counts() -> None:
    found = accuracy(Shade(), images(), batch=7)
    assert found.top1 == pytest.approx(20 / 30)
    # One class beside the right one is among the five nearest, except from 9 round to 0.
    assert found.top5 == pytest.approx(29 / 30)
    assert found.stderr == pytest.approx((20 / 30 * 10 / 30 / 30) ** 0.5)
    assert len(found.guesses) == 30
    assert found.protocol.digest == accuracy(Shade(), images()).protocol.digest
    assert found.protocol.digest != accuracy(Shade(), images().first(29)).protocol.digest


def test_what_is_no_classifier_of_these_is_refused() -> None:
    with pytest.raises(UsageError, match="knows 4 classes, the images have 10"):
        accuracy(Shade(4), images())
    with pytest.raises(UsageError, match="knows 12 classes, the images have 10"):
        accuracy(Shade(12), images())
    with pytest.raises(UsageError, match="a classifier"):
        accuracy(nn.Conv2d(1, 3, 1), images())
    broken = Shade()
    broken.scale.data.fill_(float("nan"))
    with pytest.raises(NumericsError):
        accuracy(broken, images())


def test_two_networks_take_turns() -> None:
    dense, pruned = nn.Conv2d(1, 64, 3), nn.Conv2d(1, 2, 3)
    record = compare_image_speed(dense, pruned, torch.zeros(2, 1, 32, 32), seconds=0.05)
    assert record["forward"]["ratio"]["low"] <= record["forward"]["ratio"]["high"]
    assert record["turns"] >= 3
    assert "batches of 2" in record["verdict"]
