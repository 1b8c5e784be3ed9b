"""Writing a vision network so that it can be opened again: weights, shape, origin."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur import __version__
from secateur.errors import VerificationError
from secateur.files import write_json
from secateur.masks.store import FILE_NAME, save_masks
from secateur.masks.structured import StructuredMask, structure_of
from secateur.models.attention_heads import QkvAttention
from secateur.models.channel_sizes import sizes_of
from secateur.models.state import evaluating
from secateur.models.vision.loading import FORMAT, MANIFEST, WEIGHTS, VisionModel, load_vision
from secateur.models.vision.outputs import logits_of
from secateur.tensorfile import save_tensors


def save_vision(
    loaded: VisionModel,
    folder: str | Path,
    *,
    masks: Mapping[str, Tensor] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Write weights (safetensors), masks, and last the manifest, which makes the folder a model.

    Args:
        loaded: the network with what is known of it; ``input`` must be.
        masks: parameter name -> bool, single weights that are gone.
        facts: more for the manifest.
    """
    folder = Path(folder)
    assert loaded.input is not None, "the input's shape is part of the record"
    state = {n: t.detach().contiguous().cpu() for n, t in loaded.model.state_dict().items()}
    save_tensors(folder / WEIGHTS, _apart(state))
    if masks:
        save_masks(folder / FILE_NAME, masks)
    structure = structure_of(loaded.model) or StructuredMask()
    record = {
        "format": FORMAT,
        "secateur": __version__,
        "name": loaded.name,
        "source": loaded.source,
        "structure": structure.record(),
        "rewritten": [
            name for name, m in loaded.model.named_modules() if isinstance(m, QkvAttention)
        ],
        "sizes": sizes_of(loaded.model),
        "input": list(loaded.input),
        "classes": list(loaded.classes),
        "preprocess": None if loaded.preprocess is None else loaded.preprocess.record(),
        **(facts or {}),
    }
    write_json(folder / MANIFEST, record)


def _apart(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tied tensors each with bytes of its own: the format allows no sharing."""
    seen: set[int] = set()
    out = {}
    for name, tensor in state.items():
        out[name] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    return out


@torch.no_grad()
def reopen_vision(folder: Path, pixels: Tensor, logits: Tensor) -> dict[str, Any]:
    """Open a saved network and compare its logits with those it had.

    Raises:
        VerificationError: they differ by more than rounding explains.
    """
    model = load_vision(folder).model
    with evaluating(model):
        found = logits_of(model(pixels))
    scale = float(logits.abs().max()) or 1.0
    far = float((found - logits).abs().max()) if found.shape == logits.shape else float("inf")
    if not far <= 1e-4 * scale:
        raise VerificationError(
            f"the network read back from '{folder}' differs: its logits by up to {far:.3g}",
            fix="run it again with --fresh",
        )
    return {"loaded": True, "max_difference": far, "relative": far / scale}
