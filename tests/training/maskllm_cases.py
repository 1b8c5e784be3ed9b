"""Models with logits on them, for the tests of learned masks."""

import torch

from secateur.masks.selection import select
from secateur.masks.target import Cut, Scope, Target
from secateur.models.anatomy import ModelView
from secateur.training.mask_logits import Learning
from secateur.training.maskllm import LearnedMasks
from secateur.training.settings import TrainSettings

IDS = torch.randint(4, 260, (24, 24), generator=torch.Generator().manual_seed(5))
TARGET = Target.parse("2:4")


def magnitude_masks(view, target=TARGET):
    """A prior for every matrix."""
    cut = {m.name: Cut.of(m.shape, target, Scope("row")) for m in view.matrices()}
    return {m.name: select(m.tensor().abs(), cut[m.name]) for m in view.matrices()}


def attached(model, options=None, prior=None, pattern=(2, 4)):
    """Logits on all matrices of a model."""
    view = ModelView.of(model)
    patterns = {m.name: pattern for m in view.matrices()}
    return LearnedMasks.attach(view, patterns, options or Learning(), prior)


def settings(**changes):
    """A short training."""
    return TrainSettings(
        **{"steps": 6, "lr": 5e-3, "batch": 4, "schedule": "cosine", "warmup": 0.0, **changes}
    )
