"""Loading a transformers model of any kind by the class its config names."""

from __future__ import annotations

from typing import Any

import torch

from secateur.errors import SecateurError, UsageError
from secateur.models.checks import check_weights, fingerprint
from secateur.models.loading import (
    Loaded,
    _first_line,
    _require_transformers,
    _tensors,
    _tokenizer,
    device_of,
)
from secateur.models.sources import resolve
from secateur.models.state import quiet
from secateur.models.structured_saving import load_structured, read_manifest, restore_structure
from secateur.progress import SILENT, Progress


def load_transformer(spec: str, *, device: str = "auto", progress: Progress = SILENT) -> Loaded:
    """Load an encoder, a decoder or an encoder-decoder in float32, with its tokenizer.

    Args:
        spec: hub id, local folder, ``demo`` or ``tiny``.
        device: ``cpu``, ``cuda``, ``cuda:1``, or ``auto``.

    Raises:
        UsageError: no such model, or of a class transformers does not have.
        SecateurError: damaged or incomplete files.
    """
    _require_transformers()
    import transformers

    where = device_of(device)
    source = resolve(spec, progress=progress)
    _tensors(source)
    with quiet(), progress.stage(f"loading {source.name}"):
        try:
            config = transformers.AutoConfig.from_pretrained(source.folder, local_files_only=True)
        except Exception as error:
            raise UsageError(
                f"its config.json is not understood ({_first_line(error)})",
                field="model",
                value=str(source.folder),
                fix="pip install -U transformers",
            ) from error
        name = (getattr(config, "architectures", None) or [""])[0]
        kind: Any = getattr(transformers, name, None) if name else None
        if kind is None:
            raise UsageError(
                f"its config names the class '{name}', which transformers does not have",
                field="model",
                value=str(source.folder),
                fix="load it yourself and use secateur.prune_heads",
            )
        words = _tokenizer(source, False)
        manifest = read_manifest(source.folder)
        if manifest is not None and not manifest["stock"]:
            model: Any = load_structured(source.folder, manifest, dtype=torch.float32)
        else:
            model = _stock(kind, source.folder)
            if manifest is not None:
                restore_structure(model, manifest, source.folder)
        check_weights(model)
    model = model.to(where).eval()
    return Loaded(
        model, words, source.folder, source.name, fingerprint(source.folder), list(source.notes)
    )


def _stock(kind: Any, folder: Any) -> Any:
    try:
        model, info = kind.from_pretrained(
            folder,
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except Exception as error:
        raise SecateurError(
            f"'{folder}' could not be loaded ({type(error).__name__}: {_first_line(error)})",
            fix="check that config.json and the weights belong together",
        ) from error
    absent = sorted(info.get("missing_keys") or [])
    if absent:
        raise SecateurError(
            f"'{folder}' lacks {len(absent)} of the model's tensors, first '{absent[0]}'",
            fix="check that config.json and the weights belong together",
        )
    return model
