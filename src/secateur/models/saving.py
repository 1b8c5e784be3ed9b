"""Writing a model the way stock transformers reads it, whole or block by block."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from secateur.files import told_plainly
from secateur.models.anatomy import Block, ModelView
from secateur.models.shards import WEIGHTS, write_shard
from secateur.models.state import own_use_cache


def checkpoint_names(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State-dict entries under the names checkpoints use.

    transformers 5 fuses experts when it loads and splits them when it saves; this is that
    split, applied to any subset of whole entries (experts must be complete). Older versions
    and plain torch modules keep their names.
    """
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:
        return dict(state)
    if not hasattr(model, "config"):
        return dict(state)
    reverted = revert_weight_conversion(model, dict(state))  # type: ignore[arg-type]
    return dict(reverted)


def tied_names(model: nn.Module) -> set[str]:
    """State-dict names that are second names of a weight; save_pretrained leaves them out."""
    declared = getattr(model, "all_tied_weights_keys", None)
    if declared is None:  # transformers 4 lists the candidates; identity decides
        declared = getattr(model, "_tied_weights_keys", None) or {}
    candidates = set(declared)
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    out: set[str] = set()
    for group in names.values():
        second = [name for name in group if name in candidates] or group[1:]
        out.update(second[: len(group) - 1])
    return out


def block_state(view: ModelView, block: Block) -> dict[str, Tensor]:
    """One block's entries, under checkpoint names."""
    state = {f"{block.name}.{k}": v.detach() for k, v in block.module.state_dict().items()}
    return checkpoint_names(view.model, state)


def outside_state(view: ModelView) -> dict[str, Tensor]:
    """Everything that lies in no block (embeddings, final norm, head unless tied)."""
    skip = tied_names(view.model)
    inside = f"{view.path}." if view.path else ""
    state = {
        name: tensor.detach()
        for name, tensor in view.model.state_dict().items()
        if name not in skip and not name.startswith(inside)
    }
    return checkpoint_names(view.model, state)


def save_weights(model: nn.Module, folder: Path | str) -> None:
    """All weights in one ``model.safetensors``, same bytes every time."""
    skip = tied_names(model)
    state = {n: t.detach() for n, t in model.state_dict().items() if n not in skip}
    write_shard(Path(folder) / WEIGHTS, checkpoint_names(model, state))


def write_parts(
    folder: Path, parts: Mapping[str, Mapping[str, Tensor]], dtype: torch.dtype | None
) -> tuple[dict[str, str], int]:
    """Write each part (file name -> entries) as ``dtype``; what ``write_index`` wants to know.

    Returns:
        entry -> file name, and the bytes of all.
    """
    places: dict[str, str] = {}
    size = 0
    for name, state in parts.items():
        state = cast(state, dtype)
        write_shard(folder / name, state)
        places |= dict.fromkeys(state, name)
        size += sum(t.nbytes for t in state.values())
    return places, size


def cast(state: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """``state`` with its floating tensors as ``dtype`` (None: as they are)."""
    return {
        name: tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype)
        for name, tensor in state.items()
    }


def save_config_and_tokenizer(
    model: nn.Module,
    tokenizer: Any,
    folder: Path | str,
    dtype: torch.dtype | None = None,
    architecture: str | None = None,
) -> None:
    """``config.json``, ``generation_config.json`` and the tokenizer's files (if there is one).

    ``dtype`` is what the weights were written as; by default what the model holds.
    A model that came with its own Python code takes the code along. Each file appears whole.
    """
    folder = Path(folder)
    source: Any = model
    config = deepcopy(source.config)
    config.architectures = [architecture or type(model).__name__]
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        if getattr(part, "use_cache", None) is False:
            part.use_cache = own_use_cache(model, False)
    dtype = dtype or next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    if dtype is not None:
        config.dtype = str(dtype).removeprefix("torch.")
    with told_plainly(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".config.", dir=folder) as temporary:
            if getattr(model, "_auto_class", None) is not None:
                from transformers.dynamic_module_utils import custom_object_save

                custom_object_save(model, temporary, config=config)
            config.save_pretrained(temporary)
            if getattr(source, "generation_config", None) is not None:
                source.generation_config.save_pretrained(temporary)
            if tokenizer is not None:
                tokenizer.save_pretrained(temporary)
            for file in sorted(Path(temporary).rglob("*")):
                place = folder / file.relative_to(temporary)
                if file.is_dir():
                    place.mkdir(exist_ok=True)
                else:
                    file.replace(place)
