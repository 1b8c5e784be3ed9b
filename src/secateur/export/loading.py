"""Opening what was pruned: one call for plain folders and for bitmask containers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from secateur.errors import MissingExtra, SecateurError, UsageError, VerificationError
from secateur.export.bitmask import FILE_NAME, load_bitmask
from secateur.models.loading import DTYPES, is_causal
from secateur.models.structured_saving import (
    load_structured,
    read_manifest,
    restore_structure,
)


def load_pruned(
    path: Path | str,
    *,
    dtype: torch.dtype | str = "auto",
    trust_remote_code: bool = False,
    **kwargs: Any,
) -> Any:
    """A ready transformers model from a folder, of the class its config names.

    Args:
        path: a folder of ``save_pretrained``'s layout, or one with a bitmask container (its
            weights are unpacked on the CPU and handed to a model built without memory).
        dtype: as for ``from_pretrained``; "auto" keeps the stored type.
        trust_remote_code: run Python code shipped with the model; never by default.
        **kwargs: passed on to ``from_pretrained`` (``device_map``, ``attn_implementation``).

    Raises:
        UsageError: no such folder, or nothing in it that can be loaded.
        VerificationError: weights of the model are missing.
    """
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError as error:
        raise MissingExtra("transformers", "hf", "loading a language model") from error

    auto: Any = AutoModelForCausalLM
    path = Path(path)
    kwargs["trust_remote_code"] = trust_remote_code
    if not (path / "config.json").is_file():
        raise UsageError("not a model folder: it has no config.json", field="path", value=str(path))
    manifest = read_manifest(path)
    if manifest is not None and not manifest["stock"]:
        kind_ = None if dtype == "auto" else dtype
        if isinstance(kind_, str) and kind_ not in DTYPES:
            raise UsageError(
                "unknown", field="dtype", value=kind_, fix=f"auto or one of {', '.join(DTYPES)}"
            )
        for name in sorted(set(kwargs) - {"attn_implementation", "trust_remote_code"}):
            raise UsageError(
                "is for stock checkpoints; this one is built from its manifest",
                field=name,
                value=kwargs[name],
                fix="leave it out, and move the model with .to(device)",
            )
        return load_structured(
            path,
            manifest,
            dtype=DTYPES[kind_] if isinstance(kind_, str) else kind_,
            trust_remote_code=trust_remote_code,
            attn_implementation=kwargs.get("attn_implementation"),
        )
    if not (path / FILE_NAME).is_file():
        stock: Any = _class_of(path, auto)
        try:
            model, info = stock.from_pretrained(
                path,
                dtype=dtype,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
                **kwargs,
            )
        except (ValueError, OSError, RuntimeError) as error:  # each class refuses in its own way
            reason = (str(error).strip().splitlines() or [""])[0]
            raise SecateurError(
                f"transformers cannot open '{path}' ({reason[:200]})",
                fix="check that config.json and the weights belong together",
            ) from error
        _refuse_gaps(path, info)
        if manifest is not None:
            restore_structure(model, manifest, path)
        return model
    config = AutoConfig.from_pretrained(
        path, trust_remote_code=trust_remote_code, local_files_only=True
    )
    weights = load_bitmask(path)
    if dtype == "auto":
        dtype = _stored_type(weights)
    with torch.device("meta"):
        kind: Any = type(auto.from_config(config, trust_remote_code=trust_remote_code))
    model, info = kind.from_pretrained(
        None, config=config, state_dict=weights, dtype=dtype, output_loading_info=True, **kwargs
    )
    _refuse_gaps(path, info)
    return model


def _class_of(path: Path, usual: Any) -> Any:
    """The transformers class a folder names, where it is no causal language model."""
    import transformers

    names = json.loads((path / "config.json").read_text("utf-8")).get("architectures") or [""]
    return usual if is_causal(names[0]) else getattr(transformers, names[0], usual)


def _stored_type(weights: dict[str, torch.Tensor]) -> torch.dtype:
    """The floating type most of the weights are stored in."""
    sizes: dict[torch.dtype, int] = {}
    for tensor in weights.values():
        if tensor.is_floating_point():
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.numel()
    return max(sizes, key=lambda kind: sizes[kind], default=torch.float32)


def _refuse_gaps(path: Path, info: dict[str, Any]) -> None:
    """transformers fills missing weights at random and only warns; a loader must not."""
    bad = [*info.get("missing_keys", ()), *(k[0] for k in info.get("mismatched_keys", ()))]
    if bad:
        raise VerificationError(
            f"'{path}' does not hold {len(bad)} weights of its model, such as '{bad[0]}'",
            fix="export it again",
        )
