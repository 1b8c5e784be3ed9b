"""What a recipe's ``pretraining`` means for a model: steps, schedule, rules, and the text as windows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import nn

from secateur import __version__
from secateur.data.batches import Data
from secateur.data.stream import open_stream
from secateur.data.texts import Text
from secateur.data.windows import Windows
from secateur.errors import UsageError
from secateur.models.loading import Loaded
from secateur.progress import Progress
from secateur.recipe import Evaluation
from secateur.recipe_parts import Pretraining
from secateur.run.folder import RunFolder
from secateur.run.ranks import Ranks
from secateur.training.efficientllm import PruneOptions
from secateur.training.prune_schedule import PruneSchedule
from secateur.training.settings import TrainSettings
from secateur.training.unit_choice import Rules

_FREE = ("checkpoint_every", "epochs")
"""Settings that may change when a training is taken up again."""


def settings_of(spec: Pretraining, length: int) -> TrainSettings:
    """How the training goes, in steps of whole batches."""
    return TrainSettings(
        steps=max(1, -(-spec.tokens // (spec.batch * length))),
        lr=spec.lr,
        batch=spec.batch,
        micro_batch=spec.micro_batch,
        warmup=spec.warmup,
        schedule=spec.schedule,
        weight_decay=spec.weight_decay,
        clip=spec.clip,
        seed=spec.seed,
        checkpoint_every=spec.checkpoint_every,
        validate_every=spec.validate_every,
        precision=spec.precision,
    )


def options_of(
    spec: Pretraining, settings: TrainSettings, length: int, model: nn.Module
) -> PruneOptions:
    """When and how units go.

    Raises:
        UsageError: too few steps, or pruning that ends before it begins.
    """
    if settings.steps < 3:
        raise UsageError(
            f"{spec.tokens:,} tokens are {settings.steps} steps of {spec.batch} x {length}, and "
            "there is one before anything goes and one to choose in",
            field="pretraining.tokens",
            value=spec.tokens,
            fix=f"at least {3 * spec.batch * length:,}, or a smaller batch or length",
        )
    start = min(max(1, round(spec.prune_from * settings.steps)), settings.steps - 1)
    schedule = PruneSchedule(
        spec.prune_pace,
        start=start,
        stop=max(start + 1, round(spec.prune_until * settings.steps)),
        every=spec.prune_every,
    )
    if spec.prune_from >= spec.prune_until:
        raise UsageError(
            "pruning would end before it begins",
            field="pretraining.prune_until",
            value=spec.prune_until,
            fix=f"more than prune_from ({spec.prune_from:g})",
        )
    rules = Rules(
        normalize=spec.normalize,
        layer_mode=spec.layer_mode,
        min_heads=spec.min_heads,
        min_ffn=spec.min_ffn,
        min_width=spec.min_width,
        round_to=spec.round_to,
        costs={str(k): v for k, v in spec.costs.items()},
    )
    return PruneOptions(
        budget=spec.budget(sum(p.numel() for p in model.parameters())),
        schedule=schedule,
        rules=rules,
        kinds=spec.kinds,
        gqa=spec.gqa,
        saliency=spec.saliency,
        memory=spec.memory,
        second_order=spec.second_order,
        damping=spec.damping,
        hessian_tokens=spec.hessian_tokens,
        compact_every=spec.compact_every,
        context=length,
    )


def relevant(spec: Pretraining) -> dict[str, Any]:
    """What the result depends on."""
    values = spec.model_dump(mode="json")
    return {f"pretraining.{k}": v for k, v in values.items() if k not in _FREE}


def identity_of(
    loaded: Loaded,
    spec: Pretraining,
    ranks: Ranks,
    *,
    evaluation: Evaluation | None = None,
    windows: Windows | None = None,
    text: Any = None,
) -> dict[str, Any]:
    """What a run's folder is a run of.

    Args:
        evaluation, windows: what quality is measured on: before and after on the same.
        text: given in memory, see ``in_memory``.
    """
    return {
        "evaluation": None if evaluation is None else evaluation.model_dump(mode="json"),
        "evaluation.windows": None if windows is None else windows.fingerprint,
        "text": _fingerprint(text),
        "dtype": str(next(loaded.model.parameters()).dtype).removeprefix("torch."),
        "secateur": __version__,
        "pretrains": loaded.fingerprint,
        "threads": torch.get_num_threads(),
        "ranks": ranks.world,
        **relevant(spec),
    }


def in_memory(text: Any) -> Any:
    """A text given in memory as what ``open_stream`` reads, or as the windows it is already.

    Strings together are documents; a ``Text``, a data set or several of them stay what they are.

    Raises:
        UsageError: documents that are not strings.
    """
    if text is None or isinstance(text, Windows) or hasattr(text, "order") or _readable(text):
        return text
    several = isinstance(text, Iterable) and not isinstance(text, Mapping | str | bytes)
    parts = list(text) if several else [text]
    if all(isinstance(part, str) for part in parts):
        return Text.of(parts, "documents")
    for part in parts:
        if not _readable(part):
            raise UsageError(
                "documents are strings, all of them",
                field="text",
                value=type(part).__name__,
                fix="a list of strings, a Text, or one split of a data set of 'datasets'",
            )
    return parts


def _readable(text: Any) -> bool:
    """What ``open_stream`` knows besides names: a ``Text``, rows of ``datasets``."""
    return isinstance(text, Text) or hasattr(text, "features") or hasattr(text, "load_state_dict")


def _fingerprint(text: Any) -> str | None:
    """What tells one text in memory from another."""
    if text is None:
        return None
    if isinstance(text, list):
        return ", ".join(str(_fingerprint(part)) for part in text)
    if isinstance(text, Text):
        return text.sha256
    known = getattr(text, "fingerprint", None) or getattr(text, "_fingerprint", None)
    return str(known or type(text).__name__)


def data_of(
    spec: Pretraining,
    loaded: Loaded,
    length: int,
    settings: TrainSettings,
    text: Any,
    folder: RunFolder | None,
    progress: Progress,
) -> Data:
    """The text as a source of windows; one given in memory as it is."""
    source = spec.text if text is None else text
    if isinstance(source, Windows):
        return source
    if hasattr(source, "order"):
        return cast(Data, source)
    index = None if folder is None else folder.inner / "stream.jsonl"
    known = index is not None and index.exists()
    try:
        return open_stream(
            source,
            loaded.tokenizer,
            length,
            field=spec.field,
            separator=spec.separator,
            tokens=settings.steps * settings.batch * length,
            epochs=spec.epochs,
            block=spec.block,
            seed=spec.seed,
            vocabulary=loaded.vocabulary,
            index=index,
            progress=progress,
        )
    except UsageError:
        if index is not None and not known and folder is not None and folder.rank == 0:
            index.unlink(missing_ok=True)  # a request that was refused leaves no trace
        raise
