"""The loop on images: batches, accumulation, and the statistics of batch norms on resume."""

import pytest
import torch
from torch import nn

from secateur.data.images import ImageSet, Preprocess
from secateur.training.batchnorm import KeptBuffers
from secateur.training.hooks import classification_loss
from secateur.training.loop import fit
from secateur.training.settings import TrainSettings


def images(count=24):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 3
    noise = torch.randn(count, 1, 6, 6, generator=generator) + labels[:, None, None, None]
    pixels = (128 + 40 * noise).clamp(0, 255).to(torch.uint8)
    return ImageSet("made", labels, tuple("abc"), pixels, preprocess=Preprocess((128.0,), (40.0,)))


def net():
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
    )


def settings(**changes):
    return TrainSettings(**{"steps": 6, "lr": 0.05, "batch": 8, "optimizer": "sgd", **changes})


def test_images_are_learned():
    model = net()
    fitted = fit(model, images(), settings(steps=30), loss=classification_loss)
    assert fitted.losses[-1] < 0.5 * fitted.losses[0]
    assert fitted.tokens == 30 * 8


def test_accumulated_forwards_are_one_batch_where_nothing_depends_on_the_others():
    whole, split = net(), net()
    del whole[1], split[1]  # a batch norm sees how a batch was split
    fit(whole, images(), settings(), loss=classification_loss)
    fit(split, images(), settings(micro_batch=3), loss=classification_loss)
    for one, other in zip(whole.parameters(), split.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_a_killed_training_has_its_running_statistics_back(tmp_path):
    def train(folder, stop_at=None):
        model = net()
        kept = KeptBuffers(model)
        if stop_at is not None:

            def stop(at):
                if at.step == stop_at:
                    raise KeyboardInterrupt

            kept.after_step = stop
        fit(
            model, images(), settings(checkpoint_every=1), loss=classification_loss, hooks=[kept],
            folder=folder,
        )  # fmt: skip
        return model.state_dict()

    whole = train(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", stop_at=3)
    again = train(tmp_path / "cut")
    assert all(torch.equal(again[name], value) for name, value in whole.items())
