"""Recovery as a step of a run: after the cut, before saving and measuring."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.data.windows import Windows, training_windows
from secateur.errors import UsageError
from secateur.models.anatomy import ModelView
from secateur.models.head import is_tied, untie_head
from secateur.models.loading import Loaded, load
from secateur.progress import SILENT, Progress
from secateur.recipe import Recovery
from secateur.training.adapters import AdapterOptions, targeted
from secateur.training.distil import distillation_loss
from secateur.training.loop import Batch, Loss, next_token_loss
from secateur.training.low_rank import KINDS
from secateur.training.perp import parts, refuse_filling
from secateur.training.precision import refuse_unfit
from secateur.training.reconstruction import refuse_senseless
from secateur.training.recoveries import Task, recoveries
from secateur.training.settings import TrainSettings
from secateur.training.sharding import refuse_unshardable
from secateur.training.subsets import add_biases, refuse_empty, usual

RATES = {"vectors": 2e-3, "adapters": 1e-3, "full": 3e-4, "reconstruct": 1e-3}
"""Highest learning rates where none is given; measured on small models, see the docs."""
HELD_OUT = 0.05
"""Share of the training windows set aside when a training may stop early."""


@dataclass
class Recoverer:
    """What a recovery needs, made and checked before anything is cut.

    Attributes:
        train: what is trained, the default resolved.
        keep: where the adapter is written in PEFT's format before it is merged; None: nowhere.
        base: what it says it belongs to.
        structured: what ``structure`` changed, once it did.
        data, held: windows to train on, and to stop early by.
        teacher: makes the dense model; None where it is not to be had.
    """

    spec: Recovery
    loaded: Loaded
    view: ModelView
    train: tuple[str, ...]
    settings: TrainSettings
    data: Windows
    held: Windows | None
    teacher: Callable[[], nn.Module] | None
    progress: Progress = SILENT
    structured: dict[str, Any] | None = None
    keep: Path | None = None
    base: str = ""

    @classmethod
    def of(
        cls,
        spec: Recovery,
        loaded: Loaded,
        view: ModelView,
        *,
        masked: bool,
        text: Any = None,
        teacher: Callable[[], nn.Module] | None = None,
        progress: Progress = SILENT,
    ) -> Recoverer:
        """Resolve ``spec`` for a model.

        Args:
            masked: single weights are gone, or will be, and have to stay so.
            text: windows or texts in memory, instead of ``spec.text``.

        Raises:
            UsageError: an unknown method or subset, an empty subset, an adapter that fits
                nowhere or would fill zeros, settings that do not go together, too little text.
        """
        method = "perp" if spec.method in KINDS else spec.method
        recoveries[method]  # an unknown one is refused, with the nearest
        train = _train(spec, view)
        subsets, kind = parts(train)
        _refuse_contradictions(spec, train)
        if spec.keep_adapter and train not in (("lora",), ("lora-prune",)):
            raise UsageError(
                "PEFT knows a plain LoRA and nothing beside it",
                field="recovery.keep_adapter",
                value=list(train),
                fix="train lora or lora-prune alone; or leave keep_adapter out, for merged weights",
            )
        refuse_filling(kind, masked)
        if kind is not None:
            targeted(view, AdapterOptions.of(kind, _adapter(spec)).targets)
        refuse_empty(view, [s for s in subsets if not (s == "biases" and spec.add_biases)])
        settings = _settings(spec, train, kind)
        if spec.shard:
            refuse_unshardable(settings, spec.patience is not None, "recovery.")
        refuse_unfit(view.model, settings, "recovery.")
        length = loaded.window(spec.length, "recovery.length")
        data = training_windows(
            spec.text if text is None else text,
            loaded.tokenizer,
            tokens=(spec.steps + 1) * spec.batch * length,
            length=length,
            seed=spec.seed,
            vocabulary=loaded.vocabulary,
        )
        held = None
        if spec.patience is not None:
            data, held = _set_aside(data)
        return cls(
            spec, loaded, view, train, settings, data, held, teacher, progress,
        )  # fmt: skip

    @property
    def needs_teacher(self) -> bool:
        """True if the dense model takes part."""
        return self.spec.distil > 0 or self.spec.method == "reconstruct"

    def structure(self) -> dict[str, Any]:
        """Give the model the parameters it lacks; what was changed, for ``restructure``.

        Asked again (in a later cycle), it says what was changed the first time.
        """
        if self.structured is None:
            added = add_biases(self.view) if self.spec.add_biases else []
            untied = "head" in self.train and untie_head(self.view.model)
            self.structured = {"added_biases": bool(added), "untied": untied}
        return self.structured

    def recover(self, masks: Mapping[str, Tensor], folder: Path | None = None) -> dict[str, Any]:
        """Train in place under ``masks``; the record of what was done."""
        spec = self.spec
        teacher = self.known_teacher()() if self.needs_teacher else None
        loss: Loss = next_token_loss
        if spec.distil > 0 and teacher is not None:
            loss = distillation_loss(teacher, spec.distil, spec.temperature)
        adapter = _adapter(spec)
        own = {"distil": spec.distil, "temperature": spec.temperature if spec.distil else None}
        task = Task(
            self.view,
            masks,
            self.data,
            self.settings,
            self.train,
            adapter=adapter if parts(self.train)[1] else {},
            reconstruction={key: getattr(spec, key) for key in ("samples", "unit", "stream")},
            loss=loss,
            validate=self._validate if self.held is not None else None,
            teacher=None if teacher is None else lambda: teacher,
            checkpointing=spec.checkpointing,
            folder=folder,
            keep=self.keep,
            base=self.base,
            identity=own,
            progress=self.progress,
        )
        name = "perp" if spec.method in KINDS else spec.method
        record = recoveries[name](task)
        round_to_stored(self.view.model, self.loaded.stored)
        # Reconstruct goes round fewer windows, in every block.
        windows = int(record.get("windows", len(self.data)))
        passes = record.get("steps", self.settings.steps) * self.settings.batch / max(1, windows)
        return {
            **record,
            "method": spec.method,
            "text": self.data.record,
            "passes": round(passes, 2),
            "lr": self.settings.lr,
            "schedule": spec.schedule,
            "batch": spec.batch,
            "length": self.data.length,
            **own,
        }

    def known_teacher(self) -> Callable[[], nn.Module]:
        """What makes the dense model.

        Raises:
            UsageError: it is not known.
        """
        if self.teacher is None:
            raise UsageError(
                "the dense model is needed, and it is not known",
                field="recovery.method" if self.spec.method == "reconstruct" else "recovery.distil",
                value=self.spec.method,
                fix="give it with --dense MODEL",
            )
        return self.teacher

    @torch.no_grad()
    def _validate(self) -> float:
        assert self.held is not None
        device = next(self.view.model.parameters()).device
        total = 0.0
        for ids, _ in self.held.batches(self.settings.batch * self.held.length):
            total += float(next_token_loss(self.view.model, Batch(ids.to(device)))) * len(ids)
        return total / len(self.held)


def restructure(view: ModelView, record: Mapping[str, Any]) -> None:
    """Do again what ``Recoverer.structure`` did, before recovered weights are read."""
    if record.get("added_biases"):
        add_biases(view)
    if record.get("untied") and is_tied(view.model):
        untie_head(view.model)


def dense_copy(model: nn.Module) -> Callable[[], nn.Module]:
    """A copy made now, of a model that is about to be cut in place."""
    kept = copy.deepcopy(model)
    return lambda: kept


def dense_again(source: str, like: Loaded, trust_remote_code: bool) -> Callable[[], nn.Module]:
    """The dense model, loaded anew when it is asked for."""

    def teacher() -> nn.Module:
        dtype = str(next(like.model.parameters()).dtype).removeprefix("torch.")
        dense = load(
            source,
            dtype=dtype,
            device=str(like.device),
            tokenizer=False,
            trust_remote_code=trust_remote_code,
        )
        model: nn.Module = dense.model
        return model.requires_grad_(False)

    return teacher


def _train(spec: Recovery, view: ModelView) -> tuple[str, ...]:
    if spec.method in ("full", "imp"):
        if spec.train not in (None, ["all"]):
            raise UsageError(
                "full retraining trains all", field="recovery.train", value=spec.train,
                fix="method: perp",
            )  # fmt: skip
        return ("all",)
    named = tuple(spec.train) if spec.train is not None else usual(view.model)
    if spec.train is None and spec.add_biases and "biases" not in named:
        named = ("biases", *named)
    if spec.method in KINDS and spec.method not in named:
        named = (*named, spec.method)
    return named


def _refuse_contradictions(spec: Recovery, train: tuple[str, ...]) -> None:
    """Settings that would be passed over in silence, or fail only after the cut."""
    if spec.method == "reconstruct":
        refuse_senseless(train, spec.unit, spec.stream)
        unheard = {"distil": 0.0, "patience": None, "shard": False, "checkpointing": False}
        for name, usual_value in unheard.items():
            if getattr(spec, name) != usual_value:
                raise UsageError(
                    "reconstruct trains a block at a time towards the dense one, and knows no such setting",
                    field=f"recovery.{name}",
                    value=getattr(spec, name),
                    fix="leave it out, or method: perp",
                )


def _adapter(spec: Recovery) -> dict[str, Any]:
    """The adapter's options."""
    keys = ("rank", "alpha", "init", "seed", "dropout", "every", "targets")
    return {key: getattr(spec, key) for key in keys}


def _settings(spec: Recovery, train: tuple[str, ...], kind: str | None) -> TrainSettings:
    kinds = "full" if {"all", "head"} & set(train) else "adapters" if kind else "vectors"
    usual_rate = RATES["reconstruct" if spec.method == "reconstruct" else kinds]
    return TrainSettings(
        steps=spec.steps,
        lr=spec.lr or usual_rate,
        batch=spec.batch,
        micro_batch=spec.micro_batch,
        warmup=spec.warmup,
        schedule=spec.schedule,
        weight_decay=spec.weight_decay,
        clip=spec.clip,
        seed=spec.seed,
        checkpoint_every=spec.checkpoint_every,
        patience=spec.patience,
        validate_every=spec.validate_every,
        precision=spec.precision,
        shard=spec.shard,
    )


def _set_aside(data: Windows) -> tuple[Windows, Windows]:
    """(the rest, the last few windows)."""
    count = max(1, round(HELD_OUT * len(data)))
    if count >= len(data):
        raise UsageError(
            "the text has one window, so none can be set aside to stop early by",
            field="recovery.text",
            value=data.record.get("text", {}).get("name"),
            fix="a longer text, or patience: null",
        )
    return (
        Windows(data.ids[:-count], None, data.record | {"held_out": count}),
        Windows(data.ids[-count:], None, data.record),
    )


@torch.no_grad()
def round_to_stored(model: nn.Module, stored: torch.dtype | None) -> None:
    """To the type it will be written in, so that what is measured is what is saved."""
    if stored is not None:
        for parameter in model.parameters():
            parameter.copy_(parameter.to(stored))
