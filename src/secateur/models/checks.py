"""Is this the model we think it is, and is it sound?"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import NumericsError, UsageError
from secateur.models.shards import SafetensorsFolder

WHOLE = 2 * 1024**3
"""Files up to this many bytes in all are hashed whole; beyond it, sampled."""
_CHUNK = 1024**2
_SAMPLES = 256


def fingerprint(folder: Path | str) -> str:
    """A hash of a checkpoint folder: config, and every shard's header, size and content.

    Content is hashed whole up to 2 GiB in total; beyond that 256 MiB of it, spread evenly
    over each file (a changed shard changes its header or size, or nearly always a sample).
    """
    tensors = SafetensorsFolder(folder)
    digest = hashlib.sha256()
    digest.update((Path(folder) / "config.json").read_bytes())
    sizes = [shard.path.stat().st_size for shard in tensors.shards]
    for shard, size in zip(tensors.shards, sizes, strict=True):
        digest.update(f"{shard.path.name}:{size}:{shard.digest}".encode())
        steps = -(-size // _CHUNK)
        share = steps if sum(sizes) <= WHOLE else max(1, _SAMPLES * size // sum(sizes))
        with open(shard.path, "rb") as file:
            for step in range(share):
                file.seek(step * steps // share * _CHUNK)
                digest.update(file.read(_CHUNK))
    return digest.hexdigest()


@torch.no_grad()
def fingerprint_model(model: nn.Module) -> str:
    """A hash of a model in memory: its config and all its parameters and buffers."""
    digest = hashlib.sha256()
    config: Any = getattr(model, "config", None)
    if hasattr(config, "to_dict"):
        digest.update(json.dumps(config.to_dict(), sort_keys=True, default=str).encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        data = tensor.detach().to("cpu").contiguous().reshape(-1)
        if data.numel():
            digest.update(data.view(torch.uint8).numpy().data)
    return digest.hexdigest()


@torch.no_grad()
def check_weights(weights: nn.Module | Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> None:
    """Stop at the first tensor with NaN or infinity.

    Raises:
        NumericsError: names the tensor and how many of its entries are bad.
    """
    if isinstance(weights, nn.Module):
        weights = weights.state_dict()
    pairs = weights.items() if isinstance(weights, Mapping) else weights
    for name, tensor in pairs:
        if tensor.is_meta or not tensor.is_floating_point():
            continue
        # One bad entry makes the sum bad, and a sum is read several times faster than a mask
        # is made. The sum itself may overflow, so a bad one is only a suspicion.
        if torch.isfinite(tensor.sum(dtype=torch.float32)):
            continue
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            raise NumericsError(
                f"'{name}' holds NaN or infinity in {bad} of {tensor.numel()} entries",
                fix="the checkpoint is broken: download it again, or load it as it was trained",
            )


def check_tokenizer(tokenizer: Any, embeddings: int) -> None:
    """Refuse a tokenizer that can produce a token the model has no embedding for.

    Args:
        tokenizer: a Hugging Face tokenizer.
        embeddings: rows of the model's input embedding.
    """
    vocabulary = tokenizer.get_vocab()
    token = max(vocabulary, key=vocabulary.__getitem__, default=None)
    if token is None:
        raise UsageError("has no vocabulary", field="tokenizer", value=type(tokenizer).__name__)
    if vocabulary[token] >= embeddings:
        raise UsageError(
            f"its token {token!r} has number {vocabulary[token]}, "
            f"but the model embeds only {embeddings} tokens: it belongs to another model",
            field="tokenizer",
            value=str(getattr(tokenizer, "name_or_path", "")),
            fix="use the tokenizer the model was trained with",
        )
