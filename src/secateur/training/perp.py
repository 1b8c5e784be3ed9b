"""PERP: retrain a small part of a pruned model, and lose none of its zeros.

Zimmer, Andoni, Spiegel and Pokutta, "PERP: Rethinking the Prune-Retrain Paradigm in the Era
of LLMs" (arXiv:2312.15230), section 3. Any union of the subsets (``subsets``) and one kind of
adapter (``adapters``) is trained on the language-modelling loss; everything else is frozen, so
its gradients are never formed and it has no optimizer state. What was put in for training is
merged afterwards and the zeros are counted again. With ``train=("all",)`` it is full
retraining under a fixed mask, the baseline.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from secateur.data.batches import Data
from secateur.errors import UsageError
from secateur.models.anatomy import ModelView
from secateur.progress import SILENT, Progress
from secateur.training.adapters import AdapterOptions, Adapters
from secateur.training.loop import Fitted, Hook, Loss, fit, next_token_loss, trainable
from secateur.training.low_rank import KINDS
from secateur.training.masked import KeepZeros, check_masks, prove_zeros
from secateur.training.peft_format import export_peft
from secateur.training.settings import TrainSettings
from secateur.training.subsets import SUBSETS, Chosen, choose


def parts(train: Sequence[str]) -> tuple[list[str], str | None]:
    """(subsets, adapter kind) of names given together.

    >>> parts(["norms", "mask-lora"])
    (['norms'], 'mask-lora')

    Raises:
        UsageError: nothing; an unknown name; two kinds of adapter.
    """
    train = list(dict.fromkeys(train))
    for name in train:
        if name not in SUBSETS and name not in KINDS:
            raise UsageError(
                "nothing of that name can be trained",
                field="train",
                value=name,
                fix=f"any of {', '.join([*SUBSETS, *KINDS])}",
            )
    kinds = [name for name in train if name in KINDS]
    if not train:
        raise UsageError(
            "nothing is to be trained",
            field="train",
            value=[],
            fix=f"any of {', '.join([*SUBSETS, *KINDS])}",
        )
    if len(kinds) > 1:
        raise UsageError("one kind of adapter at a time", field="train", value=kinds)
    if kinds and {"all", "rescale"} & set(train):
        raise UsageError(
            "an adapter trains the matrices already", field="train", value=train, fix="drop one"
        )
    return [name for name in train if name in SUBSETS], kinds[0] if kinds else None


def refuse_filling(kind: str | None, masked: bool) -> None:
    """A plain LoRA cannot be merged where a mask has to stay.

    Raises:
        UsageError: it was asked for all the same.
    """
    if kind == "lora" and masked:
        raise UsageError(
            "would fill the zeros when it is merged",
            field="train",
            value="lora",
            fix="mask-lora, scale-lora or lora-prune",
        )


def perp(
    view: ModelView,
    masks: Mapping[str, Tensor],
    data: Data,
    settings: TrainSettings,
    *,
    train: Sequence[str],
    adapter: Mapping[str, Any] | None = None,
    loss: Loss = next_token_loss,
    hooks: Sequence[Hook] = (),
    validate: Any = None,
    checkpointing: bool = False,
    folder: Path | None = None,
    keep: Path | None = None,
    base: str = "",
    identity: Mapping[str, Any] | None = None,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Train ``train`` of a pruned model in place, merge, and prove the zeros.

    Args:
        masks: matrix name -> (d_out, d_in) bool, True where the weight is gone; empty for a
            model without masks (after structured cuts).
        train: subsets and at most one kind of adapter.
        adapter: ``rank``, ``alpha``, ``init``, ``dropout``, ``targets``, ``every``, ``seed``.
        checkpointing: compute activations again in backward instead of keeping them.
        folder: for the checkpoint; the same call goes on from there.
        keep: where the adapter is written in PEFT's format, for the model ``base``, unmerged.

    Returns:
        The training's record, with ``train``, ``share`` trained and ``zeros``.

    Raises:
        UsageError: masks that do not fit, an empty subset; see ``fit``.
        VerificationError: a zero was lost.
    """
    subsets, kind = parts(train)
    before = check_masks(view, masks)
    refuse_filling(kind, before > 0)
    view.model.requires_grad_(False)
    chosen = choose(view, subsets)
    adapters = None
    try:
        if kind is not None:
            adapters = Adapters.attach(view, masks, AdapterOptions.of(kind, adapter or {}))
        fitted = _fit(
            view, masks, data, settings, chosen, loss,
            [*(adapters.hooks() if adapters is not None else []), *hooks], validate, checkpointing, folder,
            {"train": list(train), "adapter": dict(adapter or {}), **(identity or {})}, progress,
        )  # fmt: skip
        started = time.perf_counter()
        if adapters is not None:
            if keep is not None and not (dist.is_initialized() and dist.get_rank()):
                export_peft(adapters, keep, base)
            adapters.merge()
        chosen.finish()
        merging = time.perf_counter() - started
    except BaseException:
        if adapters is not None:
            adapters.detach()
        chosen.abandon()
        raise
    finally:
        view.model.requires_grad_(False)
    zeros = prove_zeros(view, masks, before)
    counts = {name: len(names) for name, names in chosen.parts.items()}
    return {
        **fitted.record(),
        "method": "full" if "all" in train else "perp",
        "train": list(train),
        "parts": counts,
        "adapter": None if kind is None else {"kind": kind, **dict(adapter or {})},
        "merge_seconds": round(merging, 3),
        "zeros": zeros,
    }


def _fit(
    view: ModelView,
    masks: Mapping[str, Tensor],
    data: Data,
    settings: TrainSettings,
    chosen: Chosen,
    loss: Loss,
    hooks: Sequence[Hook],
    validate: Any,
    checkpointing: bool,
    folder: Path | None,
    identity: Mapping[str, Any],
    progress: Progress,
) -> Fitted:
    """Train in float32 whatever the model is stored in; half types come back afterwards."""
    model: Any = view.model
    kinds = {p: p.dtype for p in trainable(model).values() if p.dtype != torch.float32}
    for parameter in kinds:
        parameter.data = parameter.data.float()
    share = sum(p.numel() for p in trainable(model).values()) / max(1, chosen.total)
    progress.note(f"training {share:.3%} of the parameters")
    try:
        with recomputing(model) if checkpointing else nullcontext():
            return fit(
                model,
                data,
                settings,
                loss=loss,
                hooks=[KeepZeros(view, masks), *hooks],
                validate=validate,
                folder=folder,
                identity=identity,
                blocks=[block.name for block in view.blocks],
                progress=progress,
                label="recovering",
            )
    finally:
        for parameter, kind in kinds.items():
            parameter.data = parameter.data.to(kind)


@contextmanager
def recomputing(model: Any) -> Iterator[None]:
    """Activations of a transformers model are computed again in backward; no dropout is turned on.

    Its layers recompute in training mode only. Some (OPT's) drop out by themselves in that mode,
    at a rate of their own, which is zero meanwhile.
    """
    layers = [m for m in model.modules() if hasattr(m, "gradient_checkpointing")]
    rates = [
        (layer, name, value)
        for layer in layers
        for name, value in vars(layer).items()
        if "drop" in name and isinstance(value, float)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # renamed in transformers 6
        model.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        for layer in layers:
            layer.training = True
        for layer, name, _ in rates:
            setattr(layer, name, 0.0)
        yield
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            model.gradient_checkpointing_disable()
        for layer in layers:
            layer.training = False
        for layer, name, value in rates:
            setattr(layer, name, value)
