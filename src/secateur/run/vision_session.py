"""A vision network, its images and everything a recipe leaves open, resolved; nothing changed yet."""

from __future__ import annotations

import fnmatch
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur import __version__
from secateur.data.image_files import augmentation
from secateur.data.image_sources import PARTS, read_images
from secateur.data.images import ImageSet, Preprocess
from secateur.errors import UsageError
from secateur.evaluation.accuracy import check_classes
from secateur.methods import methods
from secateur.methods.vision_base import VisionMethod, VisionTarget
from secateur.models.channel_check import check_groups
from secateur.models.channel_graph import ChannelGroups, channel_groups
from secateur.models.loading import device_of
from secateur.models.vision.loading import VisionModel, load_vision
from secateur.models.vision.outputs import logits_of
from secateur.progress import SILENT, Progress
from secateur.recipe_vision import VisionRecipe, VisionTraining
from secateur.training.settings import TrainSettings


@dataclass
class VisionSession:
    """What the steps of a vision run share."""

    recipe: VisionRecipe
    loaded: VisionModel
    method: VisionMethod
    target: VisionTarget
    train: ImageSet
    test: ImageSet | None
    groups: ChannelGroups
    fingerprint: str
    device: torch.device
    progress: Progress = SILENT
    timing: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    leads: bool = True
    """Of several processes, the one that measures and writes."""

    @property
    def model(self) -> nn.Module:
        """The network."""
        return self.loaded.model

    @property
    def example(self) -> Tensor:
        """One input of zeros, (1, C, H, W)."""
        return self.train.example

    @contextmanager
    def timed(self, account: str) -> Iterator[None]:
        """Add the time of a step to the run's record."""
        start = time.perf_counter()
        yield
        self.timing[account] = self.timing.get(account, 0.0) + time.perf_counter() - start

    def settings(self, spec: VisionTraining) -> TrainSettings:
        """A part of the recipe as the training loop wants it."""
        own = {"epochs", "steps", "augment", "distil", "temperature"}
        return TrainSettings(steps=spec.count(len(self.train)), **spec.model_dump(exclude=own))

    def changed(self, spec: VisionTraining) -> ImageSet:
        """The training images with the changes the recipe asks for."""
        return replace(self.train, augment=augmentation(spec.augment, *self.train.shape[1:]))


def vision_method(name: str, options: dict[str, Any] | None = None) -> VisionMethod:
    """A method for vision networks.

    Raises:
        UsageError: there is none of that name, or it is for language models.
    """
    kind = methods[name]
    if not issubclass(kind, VisionMethod):
        known = [n for n in methods if issubclass(methods[n], VisionMethod)]
        raise UsageError(
            "is for language models, and this is a vision network",
            field="method",
            value=name,
            fix=f"one of {', '.join(known)}",
        )
    return kind.with_options(options or {})


def prepare_vision(
    recipe: VisionRecipe,
    model: nn.Module | VisionModel | None = None,
    images: Any = None,
    tests: Any = None,
    progress: Progress = SILENT,
) -> VisionSession:
    """Load everything a run needs and find what can go.

    Args:
        model: a network in memory (changed in place), instead of ``recipe.model``.
        images: training images in memory, instead of ``recipe.images``.
        tests: images to measure on in memory, instead of the recipe's.

    Raises:
        SecateurError: naming field, value and fix.
    """
    method = vision_method(recipe.method, recipe.options)
    method.check(recipe)
    kind = recipe.target_kind or method.targets[0]
    if kind not in method.targets:
        raise UsageError(
            f"'{recipe.method}' does not count its target so",
            field="target_kind",
            value=kind,
            fix=", ".join(method.targets),
        )
    device = device_of(recipe.device)
    source = recipe.images if images is None else images
    own = None if recipe.preprocess is None else Preprocess.parse(recipe.preprocess)
    with progress.stage("reading images"):
        train = read_images(source, _own_part(source) or "train", preprocess=own)
    with progress.stage(f"loading {recipe.model}"):
        loaded = _loaded(recipe, model, train)
    how = own or loaded.preprocess
    if how is not None:
        wide = None if loaded.input is None else loaded.input[0]
        part = _own_part(source) or "train"
        train = read_images(source, part, preprocess=how, channels=wide)
    test = None
    if recipe.evaluation is not None:
        test = _test_images(recipe, source if tests is None else tests, train)
    _refuse_one_class(train)
    loaded.input, loaded.preprocess = train.shape, train.preprocess
    loaded.classes = loaded.classes or train.classes
    _refuse_unfit(recipe, loaded, method)
    loaded.model.to(device).eval()
    with progress.stage("finding channels"):
        groups = find_groups(recipe, loaded.model, train)
    notes = list(loaded.notes)
    seen = set(train.targets.tolist())
    unseen = [name for number, name in enumerate(train.classes) if number not in seen]
    if unseen:
        notes.append(f"no training image shows {', '.join(unseen[:5])}{' ...' * (len(unseen) > 5)}")
    if test is not None and test.fingerprint == train.fingerprint:
        notes.append("accuracy is measured on the images that were trained on")
    return VisionSession(
        recipe=recipe,
        loaded=loaded,
        method=method,
        target=VisionTarget(kind, recipe.target),
        train=train,
        test=test,
        groups=groups,
        fingerprint=loaded.fingerprint,
        device=device,
        progress=progress,
        notes=notes,
    )


def _refuse_one_class(train: ImageSet) -> None:
    if len(train.classes) < 2:
        raise UsageError(
            f"has one class, {train.classes[0]!r}: there is nothing to tell apart",
            field="images",
            value=train.name,
            fix="a folder with a sub-folder for each class",
        )


def _own_part(source: Any) -> str | None:
    part = str(source).rpartition(":")[2] if isinstance(source, str | Path) else ""
    return part if part in PARTS else None


def _loaded(recipe: VisionRecipe, model: Any, train: ImageSet) -> VisionModel:
    if isinstance(model, VisionModel):
        return model
    if isinstance(model, nn.Module):
        return VisionModel(model, type(model).__name__)
    channels, _, side = train.shape
    return load_vision(
        recipe.model,
        options=recipe.model_options,
        channels=channels,
        classes=len(train.classes),
        size=side,
        seed=recipe.seed,
    )


def _test_images(recipe: VisionRecipe, source: Any, train: ImageSet) -> ImageSet:
    """What accuracy is measured on: scaled as the training images are."""
    spec = recipe.evaluation
    assert spec is not None
    asked: Any = spec.images
    if asked is None:
        asked = source
        if (part := _own_part(source)) is not None:
            asked = str(source).removesuffix(f":{part}")
    default = "test" if isinstance(asked, str | Path) else None
    part = _own_part(asked) or default
    found = read_images(asked, part, preprocess=train.preprocess, channels=train.channels)
    if len(found.classes) != len(train.classes):
        raise UsageError(
            f"has {len(found.classes)} classes, the training images {len(train.classes)}",
            field="evaluation.images",
            value=str(asked),
        )
    return found.first(spec.limit)


def _refuse_unfit(recipe: VisionRecipe, loaded: VisionModel, method: VisionMethod) -> None:
    if loaded.masks:
        raise UsageError(
            "has single weights that are gone already, which another cut would not keep",
            field="model",
            value=loaded.name,
            fix="prune the network it was made from",
        )
    if not loaded.trained and recipe.pretraining is None and not method.trains:
        raise UsageError(
            "has random weights: there is nothing in them to keep",
            field="model",
            value=loaded.name,
            fix="pretraining: {epochs: 5}, on the command line --pretrain epochs=5",
        )


def find_groups(recipe: VisionRecipe, model: nn.Module, train: ImageSet) -> ChannelGroups:
    """The groups of channels, tried, and those the recipe leaves alone marked.

    Raises:
        UsageError: no classifier of these images; a glob that names nothing; nothing can go.
    """
    example = train.example
    structure = recipe.structure
    groups = channel_groups(model, example, unknown=structure.unknown)
    with torch.no_grad():
        place = next(model.parameters()).device
        check_classes(logits_of(model(train.batch([0]).pixels.to(place))), train)
    groups = check_groups(model, groups, example)
    alone: dict[str, str] = {}
    for glob in structure.protect:
        named = fnmatch.filter(groups.widths(), glob)
        if not named:
            raise UsageError(
                "names no group of channels",
                field="structure.protect",
                value=glob,
                fix=f"globs of names such as {', '.join(list(groups.widths())[:3])}",
            )
        alone |= dict.fromkeys(named, "is protected")
    alone |= {
        g.key: f"is of kind {g.kind}" for g in groups.prunable if g.kind not in structure.kinds
    }
    groups = groups.refuse({k: why for k, why in alone.items() if groups[k].prunable})
    if not groups.prunable:
        reasons = "; ".join(f"'{g.key}' {g.reason}" for g in groups.fixed[:4])
        raise UsageError(
            f"no group of channels can lose any: {reasons}", field="structure", value=recipe.model
        )
    return groups


def vision_identity(session: VisionSession) -> dict[str, Any]:
    """Everything the pruned weights depend on, and nothing else."""
    recipe = session.recipe.model_dump(mode="json")
    for key in ("evaluation", "model", "device", "images"):
        recipe.pop(key)
    return {
        "secateur": __version__,
        "model": session.fingerprint,
        "images": session.train.fingerprint,
        "threads": torch.get_num_threads() if session.device.type == "cpu" else None,
        "device": session.device.type,
        **{f"recipe.{k}": v for k, v in recipe.items()},
    }
