"""Parts of the recipe that have a file of their own."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from secateur.errors import UsageError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}


class Part(BaseModel):
    """A part of a recipe: unknown keys are refused, nothing changes afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


def read_count(text: float | str, field: str) -> float:
    """A number that may end in k, M, B or T.

    >>> read_count("1.5M", "tokens")
    1500000.0

    Raises:
        UsageError: no such number, or not positive.
    """
    found = re.fullmatch(r"([0-9_,]*\.?[0-9]+(?:e[+-]?[0-9]+)?)\s*([kmbt]?)", str(text).lower())
    value = float(found[1].replace(",", "").replace("_", "")) * _UNITS[found[2]] if found else 0.0
    if not 0 < value < 1e18:
        raise UsageError(
            "a positive number, which may end in k, M or B", field=field, value=text, fix="2M"
        )
    return value


class Pretraining(Part):
    """Training on while the model is made smaller (EfficientLLM)."""

    keep_params: float = Field(
        0.5, description="parameters to end with: a share up to 1, or a number such as 100M"
    )
    tokens: int = Field(2_000_000, ge=1, description="tokens to train on; 2M, 1.5B ...")
    text: str | list[str] = Field(
        "pydoc", description="files, named corpora or hf:DATASET to train on"
    )
    field: str = Field("text", description="where JSON lines, Parquet and data sets have it")
    separator: str | None = Field(
        None, description="text between documents; null: the tokenizer's EOS token"
    )
    epochs: int | None = Field(
        1, ge=1, description="times the text may be gone through; null: as often as needed"
    )
    block: int = Field(1024, ge=1, description="windows shuffled together; more for sorted texts")
    length: int | None = Field(
        None, ge=2, description="tokens in a window; null: 512, or the positions"
    )
    batch: int = Field(8, ge=1, description="windows in a step, over all processes")
    micro_batch: int | None = Field(None, ge=1, description="windows in a forward; null: all")
    lr: float = Field(3e-4, gt=0, description="highest learning rate")
    schedule: Literal["linear", "cosine", "constant"] = Field(
        "cosine", description="how the rate falls; it is never restarted"
    )
    warmup: float = Field(0.02, ge=0, le=1, description="share of the steps in which it rises")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's, on matrices")
    clip: float | None = Field(1.0, gt=0, description="largest norm of a gradient; null: any")
    seed: int = Field(0, ge=0, description="order of the windows")
    kinds: tuple[Literal["head", "ffn", "stem"], ...] = Field(
        ("head", "ffn", "stem"),
        min_length=1,
        description="units that may go: heads, MLP channels, channels of the residual stream",
    )
    gqa: Literal["groups", "even"] = Field(
        "groups", description="heads that share keys and values go as groups, or one from each"
    )
    saliency: Literal["taylor1", "obd", "vector"] = Field(
        "taylor1", description="what a unit is worth, from the gradients of training"
    )
    memory: float | None = Field(
        0.9, ge=0, lt=1, description="of its average; null: the mean of the steps between events"
    )
    normalize: Literal["param", "raw", "cost"] = Field(
        "param", description="types compete by saliency per parameter, as it is, or per FLOP"
    )
    costs: dict[Literal["head", "ffn", "stem"], float] = Field(
        default_factory=dict, description="of cost: a unit's measured cost, instead of FLOPs"
    )
    layer_mode: Literal["uniform", "global"] = Field(
        "uniform", description="the same widths in every layer, or each its own"
    )
    min_heads: int = Field(1, ge=1, description="query heads that stay in every layer")
    min_ffn: int = Field(1, ge=1, description="MLP channels that stay in every layer")
    min_width: int = Field(8, ge=1, description="channels of the residual stream that stay")
    round_to: int = Field(1, ge=1, description="widths end on multiples of this (8, 64)")
    prune_pace: Literal["linear_params", "every_n_batches"] = Field(
        "linear_params", description="the size falls in a line, or a channel goes every N steps"
    )
    prune_from: float = Field(
        0.02, ge=0, lt=1, description="share of the steps before anything goes"
    )
    prune_until: float = Field(
        0.3, gt=0, le=1, description="share of the steps after which the budget is met"
    )
    prune_every: int = Field(1, ge=1, description="steps from one event to the next")
    second_order: bool = Field(True, description="survivors make up for what goes")
    damping: float = Field(0.01, gt=0, description="of the layers' second moments")
    hessian_tokens: int = Field(2048, ge=1, description="inputs sampled for them at an event")
    compact_every: int = Field(
        1, ge=0, description="events after which zeros are cut out; 0: only at the budget"
    )
    distil: float = Field(
        0.0, ge=0, le=1, description="share of the loss that is the divergence from the dense model"
    )
    temperature: float = Field(2.0, gt=0, description="of that divergence")
    checkpoint_every: int = Field(50, ge=1, description="steps between checkpoints")
    validate_every: int = Field(50, ge=1, description="steps between looks at the held-out text")
    precision: Literal["auto", "no", "bf16", "fp16"] = Field(
        "auto", description="auto: bf16 on a GPU that has it; fp16: under a scaled loss"
    )
    checkpointing: bool = Field(
        False, description="compute activations again in backward: less memory, more time"
    )

    @field_validator("tokens", mode="before")
    @classmethod
    def _tokens_may_have_a_unit(cls, value: float | str) -> int:
        return int(read_count(value, "tokens"))

    @field_validator("keep_params", mode="before")
    @classmethod
    def _parameters_may_have_a_unit(cls, value: float | str) -> float:
        return read_count(value, "keep_params")

    def budget(self, parameters: int) -> int:
        """Parameters to end with, of a model that has so many."""
        share = self.keep_params <= 1
        return int(self.keep_params * parameters) if share else int(self.keep_params)
