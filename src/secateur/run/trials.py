"""How good a model is under a plan, tried without touching its weights.

The scores are sorted once; a plan's masks are then comparisons. While a block runs, its
parameters point to masked copies, one block at a time, and afterwards to the originals again,
which are never written. A trial costs the pruned forward over the search windows, and little
else: the dense model's predictions were stored when the trials were opened.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from secateur.allocation.search.engine import Outcome, Payload
from secateur.allocation.search.trial import plan_of_counts
from secateur.data.windows import Windows
from secateur.evidence.replay import Replay
from secateur.masks.ranking import Ranking
from secateur.masks.target import Cut, Target
from secateur.models.anatomy import Block, ModelView
from secateur.models.state import evaluating
from secateur.progress import SILENT, Progress

Fitness = Literal["kl", "perplexity"]
PROBABILITIES = 2**30
"""Bytes of the dense model's predictions kept; beyond, its logits are computed again."""
_PIECE = 2**20


@dataclass
class _Batch:
    """What a trial of one batch needs: targets, real positions, and the dense predictions."""

    targets: Tensor  # (B, L-1) next tokens
    keep: Tensor | None  # (B, L-1) bool, None: all
    tokens: int  # kept ones
    hidden: Tensor | None = None  # (B, L, d) dense final states, if predictions are not kept
    dense: Tensor | None = None  # (B, L-1, V) probabilities, 0 where not kept
    entropy: float = 0.0  # sum of p log p


class Trials:
    """An evaluator of plans: ``trials(counts, rung) -> (sum of nats, predicted tokens)``.

    Args:
        view: the dense model, in evaluation mode, all weights present.
        rankings: every matrix's sorted scores.
        windows: the search split.
        target: what plans are for.
        rungs: windows in each stage; stage i looks at the next ``rungs[i]`` windows only.
        fitness: ``kl``: mean KL(dense || pruned) per token; ``perplexity``: mean cross-entropy
            of the text, whose exponential it is.
        batch_tokens: tokens in one forward.
        device: where to compute.
    """

    def __init__(
        self,
        view: ModelView,
        rankings: Mapping[str, Ranking],
        windows: Windows,
        target: Target,
        *,
        rungs: Sequence[int],
        fitness: Fitness = "kl",
        batch_tokens: int = 2048,
        device: torch.device | str = "cpu",
        progress: Progress = SILENT,
    ) -> None:
        if sum(rungs) != len(windows):
            raise ValueError(f"rungs {list(rungs)} do not add up to {len(windows)} windows")
        self.view, self.rankings, self.target = view, rankings, target
        self.shapes = {m.name: m.shape for m in view.matrices()}
        self.scope = next(iter(rankings.values())).scope
        self.fitness = fitness
        self.evaluations = 0
        size = max(1, batch_tokens // windows.length)
        self.stages: list[tuple[Replay, list[_Batch]]] = []
        start = 0
        kept = [0]
        for count in rungs:
            part = slice(start, start + count)
            mask = None if windows.mask is None else windows.mask[part]
            replay = Replay(view, windows.ids[part], mask, batch_size=size, device=device)
            with evaluating(view.model):
                self.stages.append((replay.start(), self._dense(replay, progress, kept)))
            start += count

    @torch.no_grad()
    def _dense(self, replay: Replay, progress: Progress, kept: list[int]) -> list[_Batch]:
        """The dense model's predictions on one stage; ``kept`` counts the bytes held so far."""
        first = list(replay.hidden)
        replay.to_end(progress, "dense model, search windows")
        batches = []
        for b, ids in enumerate(replay.ids):
            mask = replay.keep[b]
            keep = None if mask is None else mask[:, 1:] & mask[:, :-1]
            targets = ids[:, 1:].to(replay.device)
            batch = _Batch(targets, keep, targets.numel() if keep is None else int(keep.sum()))
            if self.fitness == "kl":
                dense, entropy = _probabilities(replay.logits(b), keep)
                kept[0] += dense.numel() * 4
                if kept[0] <= PROBABILITIES:
                    batch.dense, batch.entropy = dense, entropy
                else:
                    batch.hidden = replay.hidden[b]
            batches.append(batch)
        replay.hidden = first
        return batches

    @torch.no_grad()
    def __call__(self, counts: Payload, rung: int) -> Outcome:
        """Nats and tokens of one stage under the plan that removes ``counts`` per matrix."""
        self.evaluations += 1
        replay, batches = self.stages[rung]
        plan = plan_of_counts(counts, self.shapes, self.target)
        total, tokens = 0.0, 0
        with evaluating(self.view.model):
            hidden = list(replay.hidden)
            for block in self.view.blocks:
                cuts = {m.name: plan.cut(m.name, self.scope) for m in block.matrices}
                with self.pruned(block, cuts):
                    hidden = [replay.run(block, b, h) for b, h in enumerate(hidden)]
            for b, batch in enumerate(batches):
                total += self._nats(replay, b, batch, replay.logits(b, hidden[b]))
                tokens += batch.tokens
        return total, float(tokens)

    def _nats(self, replay: Replay, b: int, batch: _Batch, logits: Tensor) -> float:
        log_q = logits.float().log_softmax(-1)  # (B, L, V); the last position predicts nothing
        if self.fitness == "perplexity":
            picked = log_q[:, :-1].gather(2, batch.targets[..., None])[..., 0]
            picked = picked if batch.keep is None else picked[batch.keep]
            return -float(picked.sum(dtype=torch.float64))
        dense, entropy = batch.dense, batch.entropy
        if dense is None:
            dense, entropy = _probabilities(replay.logits(b, batch.hidden), batch.keep)
        return entropy - sum(_dot(p, q[:-1]) for p, q in zip(dense, log_q, strict=True))

    @contextmanager
    def pruned(self, block: Block, cuts: Mapping[str, Cut]) -> Iterator[None]:
        """The block with masked copies of its weights; the originals are back afterwards."""
        originals: dict[int, tuple[torch.nn.Parameter, Tensor]] = {}
        try:
            for matrix in block.matrices:
                parameter = matrix.stored
                mask = self.rankings[matrix.name].mask(cuts[matrix.name])
                if id(parameter) not in originals:
                    originals[id(parameter)] = (parameter, parameter.data)
                    if matrix.index is None:
                        shaped = mask.T if matrix.transposed else mask
                        parameter.data = parameter.data.masked_fill(shaped, 0)
                        continue
                    parameter.data = parameter.data.clone()  # experts share one
                matrix.tensor().masked_fill_(mask, 0)
            yield
        finally:
            for parameter, data in originals.values():
                parameter.data = data


def _probabilities(logits: Tensor, keep: Tensor | None) -> tuple[Tensor, float]:
    """p (B, L-1, V) of logits (B, L, V), 0 where not kept, and the sum of p log p."""
    log_p = logits[:, :-1].float().log_softmax(-1)
    p = log_p.exp()
    if keep is not None:
        p *= keep[..., None]
    return p, sum(_dot(one, other) for one, other in zip(p, log_p, strict=True))


def _dot(one: Tensor, other: Tensor) -> float:
    """Sum of products of two contiguous tensors; pieces of a float32 sum, added in float64."""
    pieces = zip(one.reshape(-1).split(_PIECE), other.reshape(-1).split(_PIECE), strict=True)
    return sum(float(torch.dot(a, b)) for a, b in pieces)
