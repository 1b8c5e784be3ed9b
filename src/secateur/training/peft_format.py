"""Adapters in the files of Hugging Face PEFT: ``adapter_config.json`` and its safetensors.

A plain LoRA goes both ways. One that was trained elsewhere can be merged into a pruned model
without filling its zeros: with masks it comes in as ``lora-prune``. MaskLoRA, ScaleLoRA and
SPP are other functions of A and B than PEFT knows; they leave as merged weights only.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import SecateurError, UsageError
from secateur.files import write_json
from secateur.models.anatomy import Matrix, ModelView
from secateur.models.discovery import is_conv1d, is_linear
from secateur.tensorfile import TensorFiles, save_tensors
from secateur.training.adapters import AdapterOptions, Adapters
from secateur.training.masked import check_masks

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

_NAME = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.default)?\.weight")
_BASE = re.compile(r"(?:base_model\.model\.)?(.+)\.base_layer\.weight")
_PLAIN: dict[str, tuple[Any, ...]] = {
    # What a setting must be for the adapter to be W + s BA and nothing more.
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None,),
    "layer_replication": (None,),
    "target_parameters": (None, []),
    "use_qalora": (False, None),
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
}


@dataclass(frozen=True)
class PeftAdapter:
    """An adapter read from a folder.

    Attributes:
        pairs: module name -> (A (r, d_in), B (d_out, r)).
        scales: module name -> what BA is multiplied by.
        base: the model it says it was trained on.
        copies: weights underneath, which PEFT saves along for heads and embeddings.
    """

    pairs: dict[str, tuple[Tensor, Tensor]]
    scales: dict[str, float]
    base: str
    copies: dict[str, Tensor]


def export_peft(adapters: Adapters, folder: Path, base: str = "") -> None:
    """Write adapters that are on a model (not yet merged) so that ``peft`` loads them.

    With ``lora-prune`` what is written is the dense update as it was trained.

    Args:
        folder: made when missing.
        base: what to load underneath, for ``base_model_name_or_path``.

    Raises:
        UsageError: a kind that PEFT has no form of; nothing to write.
    """
    if not adapters.modules:
        raise UsageError(
            "there are no adapters on the model (merged, or taken off)", field="adapters", value={}
        )
    for name, module in adapters.modules.items():
        if module.kind not in ("lora", "lora-prune"):
            raise UsageError(
                f"PEFT has no form of {module.kind} ('{name}'), whose update is not BA alone",
                field="kind",
                value=module.kind,
                fix="merge it (its zeros stay) and save the model; or train lora",
            )
    tensors: dict[str, Tensor] = {}
    for name, module in adapters.modules.items():
        for part, value in (("A", module.lora_a), ("B", module.lora_b)):
            tensors[f"base_model.model.{name}.lora_{part}.weight"] = value.detach().contiguous()
    transposed = {module.transposed for module in adapters.modules.values()}
    options = adapters.options
    folder = Path(folder)
    save_tensors(folder / WEIGHTS, tensors, {"format": "pt"})
    write_json(
        folder / CONFIG,
        {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "r": options.rank,
            "lora_alpha": options.alpha,
            "lora_dropout": options.dropout,
            "target_modules": sorted(adapters.modules),
            "fan_in_fan_out": transposed == {True},
            "bias": "none",
            "use_rslora": False,
            "use_dora": False,
            "modules_to_save": None,
            "init_lora_weights": True,
            "inference_mode": True,
            "rank_pattern": {},
            "alpha_pattern": {},
        },
    )


def read_peft(folder: Path) -> PeftAdapter:
    """Read an adapter folder; no pickled file is opened.

    Raises:
        UsageError: not an adapter; one that is more than a plain LoRA, naming the setting.
        SecateurError: damaged files, or an A without its B.
    """
    config = _config(Path(folder))
    for name, plain in _PLAIN.items():
        if name in config and config[name] not in plain:
            raise UsageError(
                f"the adapter has {name}={config[name]!r}, which is more than a plain LoRA",
                field="adapter",
                value=str(folder),
                fix="merge it with peft itself, into the dense model, and prune the result",
            )
    halves: dict[str, dict[str, Tensor]] = {}
    files = TensorFiles([Path(folder) / WEIGHTS])
    copies: dict[str, Tensor] = {}
    for full in files.names():
        match = _NAME.fullmatch(full)
        under = _BASE.fullmatch(full)
        if under is not None:
            copies[under[1]] = files.get(full)
            continue
        if match is None:
            raise UsageError(
                f"the adapter holds '{full}', which is no part of a plain LoRA",
                field="adapter",
                value=str(folder),
                fix="merge it with peft itself, into the dense model, and prune the result",
            )
        halves.setdefault(match[1], {})[match[2]] = files.get(full).float()
    pairs, scales = {}, {}
    for name, half in halves.items():
        if set(half) != {"A", "B"} or half["A"].shape[0] != half["B"].shape[1]:
            raise SecateurError(
                f"'{name}' has no matching A and B", field="adapter", value=str(folder)
            )
        pairs[name] = (half["A"], half["B"])
        rank = half["A"].shape[0]
        alpha = float(_of_pattern(config.get("alpha_pattern"), name, config.get("lora_alpha", 8)))
        scales[name] = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return PeftAdapter(pairs, scales, str(config.get("base_model_name_or_path") or ""), copies)


def _config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise UsageError(
            f"holds no {CONFIG}, so it is no adapter",
            field="adapter",
            value=str(folder),
            fix="give the folder written by save_pretrained of a PEFT model",
        )
    if not (folder / WEIGHTS).is_file():
        raise UsageError(
            f"holds no {WEIGHTS}",
            field="adapter",
            value=str(folder),
            fix="save it as safetensors (pickled .bin files are not opened)",
        )
    try:
        config = json.loads(path.read_text("utf-8"))
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise SecateurError("is damaged", field="adapter", value=str(path))
    return config


def _of_pattern(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """The value of the first pattern that a dotted tail of ``name`` matches, as PEFT reads them."""
    for pattern, value in (patterns or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", name):
            return value
    return default


def import_peft(view: ModelView, masks: Mapping[str, Tensor], folder: Path) -> Adapters:
    """Put an adapter folder's LoRA on the model; merging then keeps what zeros ``masks`` name.

    Raises:
        UsageError: see ``read_peft``; a module the model does not have, or of other sizes.
    """
    check_masks(view, masks)
    adapter = read_peft(folder)
    kind = "lora-prune" if any(bool(mask.any()) for mask in masks.values()) else "lora"
    known = {m.name: m for m in view.matrices()}
    matrices = {
        name: known.get(name) or _outside(view.model, name, folder) for name in adapter.pairs
    }
    for name, (a, b) in adapter.pairs.items():
        if (b.shape[0], a.shape[1]) != matrices[name].shape:
            raise UsageError(
                f"its '{name}' is for a matrix of {(b.shape[0], a.shape[1])}, "
                f"the model's is {matrices[name].shape}",
                field="adapter",
                value=str(folder),
                fix="give the adapter of this model (of this shape: cutting structures comes first)",
            )
    for name, copy in adapter.copies.items():
        own = matrices[name].stored if name in matrices else None
        if own is None or own.shape != copy.shape or not torch.equal(own.cpu(), copy.to(own.dtype)):
            raise UsageError(
                f"the adapter's '{name}' lies on another weight than the model's",
                field="adapter",
                value=str(folder),
                fix="give the adapter of this model",
            )
    first = next(iter(adapter.pairs))
    joined = Adapters(view.model, _options(adapter, first, kind))
    try:
        for name, (a, b) in adapter.pairs.items():
            one = Adapters.attach_to(
                view.model, [matrices[name]], masks, _options(adapter, name, kind)
            )
            joined.modules |= one.modules
            module = one.modules[name]
            module.lora_a.data.copy_(a)
            module.lora_b.data.copy_(b)
    except BaseException:
        joined.detach()
        raise
    return joined


@torch.no_grad()
def lost_on_zeros(adapters: Adapters) -> float:
    """How much of the adapters' update lies on weights that are gone, and is lost when merged.

    The share of its Frobenius norm, in [0, 1]; 0 without masks.
    """
    lost = whole = 0.0
    for module in adapters.modules.values():
        update = (module.scale * (module.lora_b @ module.lora_a)).double().square()
        whole += float(update.sum())
        if module.keep is not None:
            lost += float(update.masked_fill_(module.keep.bool(), 0).sum())
    return math.sqrt(lost / whole) if whole else 0.0


def _options(adapter: PeftAdapter, name: str, kind: Any) -> AdapterOptions:
    rank = adapter.pairs[name][0].shape[0]
    return AdapterOptions(kind, rank, adapter.scales[name] * rank)


def _outside(model: nn.Module, name: str, folder: Path) -> Matrix:
    """A linear outside the blocks (the head)."""
    try:
        module = model.get_submodule(name)
    except AttributeError:
        module = None
    if module is None or not is_linear(module):
        raise UsageError(
            f"the model has no linear '{name}'",
            field="adapter",
            value=str(folder),
            fix="give the adapter of this model",
        )
    return Matrix(name, module, transposed=is_conv1d(module))
