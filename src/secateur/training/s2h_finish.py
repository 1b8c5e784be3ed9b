"""The end of an S2HPruner training: the widths become a smaller network, and the gap is measured.

Statistics of batch norms were gathered by the soft network; the hard one needs its own, so they
are measured again on it. Nothing is trained after the cut (arXiv 2410.07046: "no fine-tuning").
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from secateur.data.batches import Data, ImageBatch
from secateur.masks.structured import StructuredMask
from secateur.models.channel_graph import ChannelGroups
from secateur.models.channel_surgery import shrink_channels
from secateur.models.state import forget_graphs
from secateur.models.vision.outputs import logits_of
from secateur.progress import SILENT, Progress
from secateur.training.batchnorm import KeptBuffers, recalibrate
from secateur.training.hooks import Hook
from secateur.training.loop import fit
from secateur.training.s2h_options import Learning
from secateur.training.s2h_start import check_resolutions
from secateur.training.s2hpruner import LearnedWidths
from secateur.training.settings import TrainSettings
from secateur.training.soft_hard import jensen_shannon

Augment = Callable[[Tensor], Tensor]


def learn_widths(
    model: nn.Module,
    groups: ChannelGroups,
    data: Data,
    settings: TrainSettings,
    options: Learning,
    *,
    augment: Augment | None = None,
    hooks: Sequence[Hook] = (),
    folder: Path | None = None,
    fresh: bool = False,
    identity: Mapping[str, Any] | None = None,
    progress: Progress = SILENT,
) -> tuple[LearnedWidths, dict[str, Any]]:
    """Train weights and masks together, in place; the model keeps all its units.

    Parameters that require no gradient stay as they are.

    Args:
        groups: ``channel_groups(model, example)``.
        data: labelled images, whose batches are ``ImageBatch``.
        augment: changes a batch of pixels before both networks see it.
        folder: for checkpoints; the same training there goes on where it stopped.

    Returns:
        The masks, and what the training did (``Fitted.record``).

    Raises:
        UsageError: a target that cannot be reached; what ``fit`` refuses.
        NumericsError: a loss or a mask's gradient that is not finite.
    """
    check_resolutions(model, data.batch([0]).pixels, options)
    widths = LearnedWidths(model, groups, options)
    fitted = fit(
        model, data, settings, loss=widths.loss(augment),
        hooks=[widths, KeptBuffers(model), *hooks], folder=folder, fresh=fresh,
        identity={"s2hpruner": asdict(options), **(identity or {})},
        progress=progress, label="learning widths",
    )  # fmt: skip
    forget_graphs(model)
    widths.rank()
    return widths, fitted.record()


def cut(widths: LearnedWidths, batches: Iterable[Tensor]) -> StructuredMask:
    """Slice the hard network out of the model, in place, and measure its batch norms again.

    Args:
        batches: images for the statistics, of all classes and of one size each
            (``ImageSet.sample``); the paper's code takes a pass, 100 batches do.
    """
    gone = {key: ~units for key, units in widths.kept().items()}
    structure = shrink_channels(widths.model, widths.groups, gone)
    _settle_norms(widths.model, batches)
    return structure


@dataclass(frozen=True)
class Gap:
    """The discretisation gap of a network on images.

    Attributes:
        soft, hard: accuracy of the two networks, in [0, 1].
        divergence: mean Jensen-Shannon divergence of their predictions, in nats.
        distance: mean 2-norm of the difference of their probabilities.
        images: measured on.
    """

    soft: float
    hard: float
    divergence: float
    distance: float
    images: int


@torch.no_grad()
def measure_gap(
    widths: LearnedWidths, batches: Sequence[Tensor], test: Iterable[ImageBatch]
) -> Gap:
    """Soft and hard network side by side, each with batch norms of its own; the model stays.

    Args:
        batches: training images for the statistics.
        test: images to be right about.
    """
    hard = copy.deepcopy(widths.model)
    gone = {key: ~units for key, units in widths.kept().items()}
    shrink_channels(hard, widths.groups, gone)
    _settle_norms(hard, batches)
    soft = copy.deepcopy(widths.model)
    paths = type(widths.paths)(soft, widths.groups)
    right = [0, 0]
    divergence = distance = 0.0
    images = 0
    with paths.soft(widths.gates()):
        _settle_norms(soft, batches)
        for batch in test:
            outputs = [logits_of(network.eval()(batch.pixels)).float() for network in (soft, hard)]
            for number, logits in enumerate(outputs):
                right[number] += int((logits.argmax(-1) == batch.labels).sum())
            divergence += float(jensen_shannon(*outputs).sum())
            p, q = (torch.softmax(logits, -1) for logits in outputs)
            distance += float((p - q).norm(dim=-1).sum())
            images += len(batch.labels)
    images = max(1, images)
    return Gap(right[0] / images, right[1] / images, divergence / images, distance / images, images)


def _settle_norms(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Batch norms measured on these images; a network without any is left alone."""
    if any(isinstance(m, _BatchNorm) and m.track_running_stats for m in model.modules()):
        recalibrate(model, batches)
    model.eval()
