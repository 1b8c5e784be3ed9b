"""What a vision run keeps between its stages, so that a killed one does no stage twice."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from secateur.masks.store import load_masks, save_masks
from secateur.masks.structured import StructuredMask, remember
from secateur.methods.vision_base import VisionOutcome
from secateur.models.channel_surgery import shrink_channels
from secateur.models.vision.loading import add_biases
from secateur.models.vision.outputs import logits_of
from secateur.run.folder import RunFolder
from secateur.run.vision_session import VisionSession
from secateur.tensorfile import opened, save_tensors

DENSE, CUT = "dense.safetensors", "cut.safetensors"
_MASKS = "cut-masks.safetensors"


def save_state(folder: RunFolder, name: str, model: nn.Module) -> None:
    """Write a network's state under ``secateur/``, on the first process."""
    if folder.rank != 0:
        return
    state = {n: t.detach().cpu().contiguous() for n, t in model.state_dict().items()}
    save_tensors(folder.inner / name, {n: t.clone() for n, t in state.items()})


def load_state(folder: RunFolder, name: str, model: nn.Module) -> None:
    """Give a network of the right shape the state that ``save_state`` wrote."""
    with opened(folder.inner / name) as file:
        state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    add_biases(model, state)
    model.load_state_dict(state)


def save_outcome(folder: RunFolder, model: nn.Module, outcome: VisionOutcome) -> None:
    """Write what a method did; the record, which is last, says that it is done."""
    save_state(folder, CUT, model)
    if outcome.masks and folder.rank == 0:
        save_masks(folder.inner / _MASKS, outcome.masks)
    folder.save(
        "cut.json",
        {
            "structure": outcome.structure.record(),
            "masked": bool(outcome.masks),
            "trained": outcome.trained,
            "record": outcome.record,
            "layers": outcome.layers,
            "delivered": outcome.delivered,
        },
    )


def load_outcome(folder: RunFolder, session: VisionSession) -> VisionOutcome | None:
    """The cut of an earlier attempt, done again on the dense network; None if it was not done."""
    record: dict[str, Any] | None = folder.read("cut.json")
    if record is None:
        return None
    structure = StructuredMask.parse(record["structure"], str(folder.inner / "cut.json"))
    if any(bool(gone.any()) for gone in structure.gone.values()):
        shrink_channels(session.model, session.groups, structure)
    remember(session.model, structure)
    load_state(folder, CUT, session.model)
    masks: dict[str, Tensor] = {}
    if record["masked"]:
        masks = {name: mask.clone() for name, mask in load_masks(folder.inner / _MASKS).items()}
    return VisionOutcome(
        structure,
        masks,
        record["trained"],
        record["record"],
        record["layers"],
        record.get("delivered"),
    )


@torch.no_grad()
def probe(session: VisionSession, count: int = 4) -> tuple[Tensor, Tensor]:
    """A few images as input, and the logits the network gives for them on the CPU.

    There because a GPU convolves in TF32, and what is opened again must agree to float32's rounding.
    """
    images = session.test or session.train
    pixels = images.first(count).batch(range(min(count, len(images)))).pixels
    logits = logits_of(session.model.cpu().eval()(pixels))
    session.model.to(session.device)
    return pixels, logits.float()
