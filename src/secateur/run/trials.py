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


@dataclass
class _Batch:
    """What a trial of one batch needs: targets, real positions, and the dense predictions."""

    targets: Tensor  # (n,) next tokens
    keep: Tensor | None  # (B, L-1) bool, None: all
    hidden: Tensor | None  # (B, L, d) dense final states, if predictions are not kept
    dense: Tensor | None = None  # (n, V) probabilities
    entropy: float = 0.0  # sum over n of sum p log p


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
            following = ids[:, 1:].to(replay.device)
            targets = following.reshape(-1) if keep is None else following[keep]
            batch = _Batch(targets, keep, replay.hidden[b])
            if self.fitness == "kl":
                logits = _predicting(replay.logits(b), keep)
                if kept[0] + logits.numel() * 4 <= PROBABILITIES:
                    kept[0] += logits.numel() * 4
                    batch.dense, batch.entropy = _probabilities(logits)
                    batch.hidden = None
            else:
                batch.hidden = None
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
                logits = _predicting(replay.logits(b, hidden[b]), batch.keep)
                total += self._nats(replay, b, batch, logits)
                tokens += len(batch.targets)
        return total, float(tokens)

    def _nats(self, replay: Replay, b: int, batch: _Batch, logits: Tensor) -> float:
        if self.fitness == "perplexity":
            picked = logits.gather(1, batch.targets[:, None])
            return float((logits.logsumexp(1) - picked[:, 0]).sum(dtype=torch.float64))
        dense, entropy = batch.dense, batch.entropy
        if dense is None:
            dense, entropy = _probabilities(_predicting(replay.logits(b, batch.hidden), batch.keep))
        # sum p (log p - log q) = sum p log p + sum (logsumexp q - p . q)
        cross = torch.linalg.vecdot(dense, logits)
        return entropy + float((logits.logsumexp(1) - cross).sum(dtype=torch.float64))

    @contextmanager
    def pruned(self, block: Block, cuts: Mapping[str, Cut]) -> Iterator[None]:
        """The block with masked copies of its weights; the originals are back afterwards."""
        originals: dict[int, tuple[torch.nn.Parameter, Tensor]] = {}
        try:
            for matrix in block.matrices:
                parameter = matrix.stored
                if id(parameter) not in originals:  # experts share one
                    originals[id(parameter)] = (parameter, parameter.data)
                    parameter.data = parameter.data.clone()
                mask = self.rankings[matrix.name].mask(cuts[matrix.name])
                matrix.tensor().masked_fill_(mask, 0)
            yield
        finally:
            for parameter, data in originals.values():
                parameter.data = data


def _predicting(logits: Tensor, keep: Tensor | None) -> Tensor:
    """Logits (B, L, V) of the positions that predict a real token, float32 (n, V)."""
    all_but_last = logits[:, :-1]
    chosen = all_but_last.reshape(-1, logits.shape[-1]) if keep is None else all_but_last[keep]
    return chosen.float()


def _probabilities(logits: Tensor) -> tuple[Tensor, float]:
    """p (n, V) and the sum of p log p over everything."""
    log_p = logits.log_softmax(1)
    p = log_p.exp()
    return p, float(torch.linalg.vecdot(p, log_p).sum(dtype=torch.float64))
