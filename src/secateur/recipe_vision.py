"""The grammar of a run on a vision network: the recipe of ``recipe.py`` with images instead of text."""

from __future__ import annotations

from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from secateur.errors import UsageError
from secateur.recipe import readable
from secateur.recipe_parts import Part
from secateur.training.settings import Schedule

TargetKind = Literal["flops", "parameters", "channels", "weights"]


class VisionTraining(Part):
    """Training on images: of the dense network, or after the cut with the cut kept."""

    epochs: float | None = Field(None, gt=0, description="passes over the training images")
    steps: int | None = Field(None, ge=1, description="or optimizer steps; neither: one epoch")
    lr: float = Field(0.05, gt=0, description="highest learning rate")
    batch: int = Field(64, ge=1, description="images in a step")
    micro_batch: int | None = Field(None, ge=1, description="images in a forward; null: all")
    optimizer: Literal["sgd", "adamw"] = Field("sgd", description="sgd or adamw")
    momentum: float = Field(0.9, ge=0, lt=1, description="of sgd")
    schedule: Schedule = Field("cosine", description="how the rate falls")
    warmup: float = Field(0.05, ge=0, le=1, description="share of the steps in which it rises")
    weight_decay: float = Field(5e-4, ge=0, description="on matrices and kernels")
    clip: float | None = Field(None, gt=0, description="largest norm of a gradient; null: any")
    augment: Literal["none", "shift", "flip", "crop-flip"] = Field(
        "none", description="random changes of the images, through Kornia"
    )
    distil: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of the loss that is the divergence from the dense network",
    )
    temperature: float = Field(2.0, gt=0, description="of that divergence")
    seed: int = Field(0, ge=0, description="order of the images and their changes")
    checkpoint_every: int = Field(200, ge=1, description="steps between checkpoints")

    @model_validator(mode="after")
    def _one_length(self) -> VisionTraining:
        if self.epochs is not None and self.steps is not None:
            raise UsageError(
                "are two lengths of one training", field="epochs, steps", fix="give one of them"
            )
        return self

    def count(self, images: int) -> int:
        """Optimizer steps over so many images."""
        return self.steps or max(1, round((self.epochs or 1) * images / self.batch))


class VisionStructure(Part):
    """Which channels may go."""

    kinds: tuple[Literal["channel", "head", "stem"], ...] = Field(
        ("channel", "head"), min_length=1, description="kinds of units that go; stem: widths that "
        "go through layer norms"
    )  # fmt: skip
    ranking: Literal["local", "global"] = Field(
        "local", description="the same share of every group, or the lowest of all"
    )
    protect: list[str] = Field(
        default_factory=list, description="groups left alone, by globs of their names"
    )
    at_least: int = Field(1, ge=1, description="units that stay in every group")
    round_to: int = Field(1, ge=1, description="widths that stay are multiples of this")
    unknown: Literal["error", "keep"] = Field(
        "error", description="an operation that cannot be followed: end, or keep its channels whole"
    )


class VisionEvaluation(Part):
    """What is measured on the dense and on the pruned network."""

    images: str | None = Field(None, description="SPEC:PART; null: the test part of the images")
    limit: int | None = Field(None, ge=1, description="only so many, evenly spread; null: all")
    batch: int = Field(64, ge=1, description="images in a forward")
    speed: bool = Field(True, description="measure images/s, dense against pruned, here")
    speed_seconds: float = Field(4.0, gt=0, description="time budget for that")
    speed_batch: int = Field(1, ge=1, description="images at a time for it")


class VisionRecipe(Part):
    """One run on a vision network, from model to report."""

    model: str = Field(
        description="efficientnet-lite0, resnet, wrn, mobilenet, vit, swin, timm:NAME, a folder, or "
        "package.module:function"
    )
    model_options: dict[str, Any] = Field(
        default_factory=dict, description="arguments of the network, such as width"
    )
    images: str = Field(
        description="digits, fashion-mnist, or a folder; SPEC:PART for another part"
    )
    preprocess: dict[str, Any] | None = Field(
        None, description="mean, std (in bytes), resize, crop, filter; null: the network's, or "
        "zero mean and unit variance"
    )  # fmt: skip
    method: str = Field("channel-l2", description="see 'secateur methods'")
    options: dict[str, Any] = Field(default_factory=dict, description="the method's own options")
    target: float = Field(0.5, description="share that goes, in [0, 1) or as 50%")
    target_kind: TargetKind | None = Field(
        None, description="share of the flops, parameters, channels or weights; null: the method's"
    )
    structure: VisionStructure = VisionStructure()
    pretraining: VisionTraining | None = Field(
        None, description="of the dense network, before the cut; null: none"
    )
    training: VisionTraining | None = Field(
        None, description="after the cut, with the cut kept; null: none"
    )
    recalibrate: int = Field(
        50,
        ge=0,
        description="batches on which batch norms are measured anew after the cut; 0: none",
    )
    evaluation: VisionEvaluation | None = VisionEvaluation()
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1")
    seed: int = Field(0, ge=0, description="of random weights and of the method")

    @field_validator("target", mode="before")
    @classmethod
    def _target_is_a_share(cls, value: Any) -> float:
        text = str(value).strip()
        try:
            share = float(text[:-1]) / 100 if text.endswith("%") else float(text)
        except ValueError:
            share = -1.0
        if not 0 <= share < 1:
            raise UsageError(
                "a share that goes, in [0, 1)", field="target", value=value, fix="0.5, or 50%"
            )
        return share

    @classmethod
    def build(cls, values: dict[str, Any]) -> VisionRecipe:
        """Validate ``values``; the first problem becomes a message that names field and fix."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise readable(error, cls) from None

    def yaml(self) -> str:
        """The recipe with every default resolved."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
