"""Gradient statistics of every matrix, one calibration sequence at a time.

What GBLM-Pruner ranks by (Das et al. 2023, Algorithm 1): for each weight a norm *across
samples* of the gradient of the sequence's mean cross-entropy. Gradients live for one matrix at
a time: each is folded into its accumulator as soon as backward has made it, so the peak is
weights + activations + one matrix's gradient, plus the accumulators asked for.

Two routes to the same sums: ``direct`` (the whole model is resident: one forward and one
backward a sequence) and ``by block`` (weights are streamed: the inputs of all blocks are kept
for a chunk of sequences, then each block is recomputed and differentiated by itself).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from secateur.errors import NumericsError
from secateur.evidence.replay import Replay
from secateur.evidence.statistics import GradientMoments
from secateur.models.anatomy import Block, Matrix, ModelView
from secateur.models.state import evaluating
from secateur.progress import SILENT, Progress

Norms = tuple[str, ...]


def sequence_losses(logits: Tensor, ids: Tensor, keep: Tensor | None = None) -> Tensor:
    """Each sequence's mean next-token cross-entropy (nats), (B,); logits (B,L,V), ids (B,L)."""
    # Tokens as rows: the softmax over the vocabulary then runs over contiguous memory.
    losses = nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none"
    ).view(len(ids), -1)
    if keep is None:
        return losses.mean(1)
    real = (keep[:, 1:] & keep[:, :-1]).float()
    return (losses * real).sum(1) / real.sum(1).clamp(min=1)


def sequence_loss(logits: Tensor, ids: Tensor, keep: Tensor | None = None) -> Tensor:
    """Sum over sequences of ``sequence_losses``."""
    return sequence_losses(logits, ids, keep).sum()


def _parameters(blocks: list[Block]) -> dict[str, nn.Parameter]:
    """The distinct parameters behind the blocks' matrices, by state-dict key."""
    return {m.key: getattr(m.module, m.parameter) for block in blocks for m in block.matrices}


@contextmanager
def accumulating(
    parameters: dict[str, nn.Parameter], sums: dict[str, GradientMoments]
) -> Iterator[None]:
    """While active, backward feeds ``sums`` and leaves no gradient behind."""

    def fold(key: str) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            if parameter.grad is not None:
                sums[key].update(parameter.grad, consume=True)
                parameter.grad = None

        return hook

    handles = []
    for key, parameter in parameters.items():
        parameter.requires_grad_(True)
        handles.append(parameter.register_post_accumulate_grad_hook(fold(key)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter in parameters.values():
            parameter.requires_grad_(False)
            parameter.grad = None


def direct_gradients(
    view: ModelView,
    ids: Tensor,
    mask: Tensor | None,
    norms: Norms,
    *,
    device: torch.device | str = "cpu",
    progress: Progress = SILENT,
) -> dict[str, GradientMoments]:
    """Sums over the sequences of ``ids`` (N, L), by parameter key; the model is resident.

    Raises:
        NumericsError: a sequence's loss is not finite.
    """
    parameters = _parameters(view.blocks)
    sums = {key: GradientMoments(norms) for key in parameters}
    with (
        evaluating(view.model),
        accumulating(parameters, sums),
        progress.stage("gradients", total=len(ids), unit="sequences") as advance,
    ):
        for n in range(len(ids)):
            row = ids[n : n + 1].to(device)
            keep = None if mask is None else mask[n : n + 1].to(device).bool()
            extra = {} if keep is None else {"attention_mask": keep.long()}
            with torch.enable_grad():
                # The logits go as soon as they are summed up: backward does not need them.
                loss = sequence_loss(
                    view.model(input_ids=row, use_cache=False, **extra).logits, row, keep
                )
                _finite(loss, n)
                loss.backward()
            advance(1)
    _count_samples(sums, len(ids))
    return sums


def gradients_by_block(
    replay: Replay,
    norms: Norms,
    save: Callable[[Block, dict[str, GradientMoments]], None],
    *,
    chunk: int = 4,
    parameters: Callable[[Block], dict[str, nn.Parameter]] = lambda block: _parameters([block]),
    progress: Progress = SILENT,
) -> None:
    """The same sums with one block's weights present at a time.

    ``replay`` must hold one sequence per batch and be started. ``save(block, sums)`` is called
    once a block and chunk; the caller merges (the sums are additive). Memory: the inputs of
    every block for ``chunk`` sequences, plus one block's weights and accumulators.
    ``parameters(block)`` names what is differentiated, by default the block's matrices.
    """
    view, total = replay.view, len(replay.hidden)
    with (
        evaluating(view.model),
        progress.stage("gradients", total=total * len(view.blocks), unit="blocks") as advance,
    ):
        for first in range(0, total, chunk):
            batch = range(first, min(first + chunk, total))
            inputs: list[list[Tensor]] = [[replay.hidden[b] for b in batch]]
            with torch.no_grad():
                for block in view.blocks:
                    with replay.resident(block):
                        inputs.append(
                            [
                                replay.run(block, b, h)
                                for b, h in zip(batch, inputs[-1], strict=True)
                            ]
                        )
            upstream = [
                _head_gradient(replay, b, h) for b, h in zip(batch, inputs[-1], strict=True)
            ]
            for block in reversed(view.blocks):
                with replay.resident(block):
                    chosen = parameters(block)
                    sums = {key: GradientMoments(norms) for key in chosen}
                    with accumulating(chosen, sums), torch.enable_grad():
                        for i, b in enumerate(batch):
                            x = inputs[block.index][i].detach().requires_grad_(True)
                            replay.run(block, b, x).backward(upstream[i])
                            assert x.grad is not None
                            upstream[i] = x.grad
                    _count_samples(sums, len(batch))
                    save(block, sums)
                advance(len(batch))


def _head_gradient(replay: Replay, batch: int, hidden: Tensor) -> Tensor:
    """d loss / d (last hidden states) of one sequence."""
    x = hidden.detach().requires_grad_(True)
    with torch.enable_grad():
        ids, keep = replay.ids[batch].to(hidden.device), replay.keep[batch]
        loss = sequence_loss(replay.logits(batch, x), ids, keep)
        _finite(loss, batch)
        loss.backward()
    assert x.grad is not None
    return x.grad


def _finite(loss: Tensor, sequence: int) -> None:
    value = float(loss.detach())
    if not math.isfinite(value):
        raise NumericsError(
            f"the loss of calibration sequence {sequence} is {value}",
            fix="use --dtype float32, or check the weights and the tokenizer",
        )


def _count_samples(sums: dict[str, GradientMoments], samples: int) -> None:
    """A sequence that did not reach a weight (an idle expert) still counts as a sample."""
    for moments in sums.values():
        moments.samples = samples


def of_matrix(sums: dict[str, GradientMoments], matrix: Matrix) -> GradientMoments:
    """One matrix's share of its parameter's sums, as (d_out, d_in)."""
    whole = sums[matrix.key]
    part = GradientMoments(whole.norms)
    part.samples = whole.samples
    for norm, total in whole.sums.items():
        own = total if matrix.index is None else total[matrix.index]
        part.sums[norm] = own.T if matrix.transposed else own
    for norm in whole.norms:
        if norm not in part.sums:  # never reached by any sample
            part.sums[norm] = torch.zeros(matrix.shape)
    return part
