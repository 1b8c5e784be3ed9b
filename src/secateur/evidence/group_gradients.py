"""Gradient sums of chosen parameters under any objective, the whole model at once.

For what ``gradients.gradients_by_block`` cannot do one block at a time: models that are no
stack of decoder blocks, and units (the residual width) that every block shares.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from secateur.errors import NumericsError, UsageError
from secateur.evidence.gradients import accumulating
from secateur.evidence.objectives import Batch, Objective
from secateur.evidence.statistics import GradientMoments, all_finite
from secateur.models.state import evaluating
from secateur.progress import SILENT, Progress


def direct_sums(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    batches: Iterable[Batch],
    objective: Objective,
    norms: tuple[str, ...],
    *,
    progress: Progress = SILENT,
) -> dict[str, GradientMoments]:
    """Gradient sums over samples, by parameter name; each sample is a batch of its own.

    Raises:
        NumericsError: a sample's loss is not finite. UsageError: no samples.
    """
    distinct: dict[int, str] = {}
    for name, parameter in parameters.items():
        distinct.setdefault(id(parameter), name)  # a tied one is counted under its first name
    chosen = {name: parameters[name] for name in distinct.values()}
    sums = {name: GradientMoments(norms) for name in chosen}
    rows = [row for batch in batches for row in _rows(batch)]
    if not rows:
        raise UsageError("no calibration samples", field="calibration", value=0)
    with (
        evaluating(model),
        accumulating(chosen, sums),
        progress.stage("gradients", total=len(rows), unit="samples") as advance,
    ):
        for number, row in enumerate(rows):
            with torch.enable_grad():
                loss = objective(model, row).sum()
                if not all_finite(loss.detach()):
                    raise NumericsError(
                        f"the loss of calibration sample {number} is not finite",
                        fix="use --dtype float32, or check the weights and the tokenizer",
                    )
                loss.backward()
            advance(1)
    for name, moments in sums.items():
        moments.samples = len(rows)
        for norm in norms:  # a parameter the objective does not reach has no gradient
            moments.sums.setdefault(norm, torch.zeros_like(chosen[name], dtype=torch.float32))
    return {name: sums[distinct[id(parameters[name])]] for name in parameters}


def _rows(batch: Batch) -> Sequence[Batch]:
    size = len(next(iter(batch.values())))
    return [{k: v[i : i + 1] for k, v in batch.items()} for i in range(size)]
