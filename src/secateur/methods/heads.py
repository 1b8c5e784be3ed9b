"""Head pruning: the greedy schedule of "Are Sixteen Heads Really Better than One?".

Michel, Levy, Neubig, NeurIPS 2019, arXiv:1905.10650. Heads are ranked by the expected size of
their gate's gradient (``secateur.evidence.gates``), normalised layer by layer, and go a share
at a time, the least important of the whole model first. No weight is changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from secateur.errors import UsageError
from secateur.evidence.ablation import ablate
from secateur.evidence.gates import Gates, GateSite, Mode, gate_gradients
from secateur.evidence.objectives import Batch, Objective
from secateur.methods.head_selection import (
    HeadRules,
    heads_asked,
    normalised,
    removal_order,
    select_heads,
)
from secateur.progress import SILENT, Progress

Ranking = Literal["gradient", "ablation", "random"]
Scorer = Callable[[Gates | None], list[Tensor]]
"""Importances per site, given the gates in force."""


@dataclass(frozen=True)
class HeadCut:
    """One point of a schedule.

    Attributes:
        share: of all heads, asked for.
        gone: site name -> (units,) bool, True where the head is removed.
    """

    share: float
    gone: Mapping[str, Tensor]

    @property
    def removed(self) -> int:
        """Heads gone."""
        return sum(int(g.sum()) for g in self.gone.values())

    @property
    def total(self) -> int:
        """Heads there were."""
        return sum(len(g) for g in self.gone.values())

    def gates(self) -> dict[str, Tensor]:
        """The same as gates: 0 where a head is gone."""
        return {name: (~g).float() for name, g in self.gone.items()}


def head_scores(
    model: nn.Module,
    sites: Sequence[GateSite],
    batches: Sequence[Batch],
    objective: Objective,
    *,
    ranking: Ranking = "gradient",
    mode: Mode = "sample",
    normalise: bool = True,
    seed: int = 0,
    gates: Gates | None = None,
    progress: Progress = SILENT,
) -> list[Tensor]:
    """Importance of every head, one (units,) float64 tensor a site; higher = keep.

    Args:
        ranking: ``gradient`` (the paper's), ``ablation`` (how much worse the objective gets
            without the head: the paper's costly comparison), or ``random``.
        mode: see ``gate_gradients``.
        normalise: divide a layer's gradients by their l2 norm. Ablation's differences are
            comparable as they are, and are never normalised.
        seed: of the random order.
        gates: gates in force meanwhile.
    """
    if ranking == "random":
        generator = torch.Generator().manual_seed(seed)
        return [torch.rand(s.units, generator=generator, dtype=torch.float64) for s in sites]
    if ranking == "ablation":
        found = ablate(model, sites, batches, objective, gates=gates, progress=progress).changes()
        return [found[s.name] for s in sites]
    if ranking != "gradient":
        raise UsageError(
            "unknown", field="ranking", value=ranking, fix="gradient, ablation or random"
        )
    importance = gate_gradients(
        model, sites, batches, objective, mode=mode, gates=gates, progress=progress
    )
    scores = [importance[s.name] for s in sites]
    return normalised(scores) if normalise else scores


def head_schedule(
    sites: Sequence[GateSite],
    scorer: Scorer,
    shares: Iterable[float],
    rules: HeadRules | None = None,
    *,
    rescore: bool = False,
) -> Iterator[HeadCut]:
    """Cuts of growing size, each holding the ones before it.

    Args:
        scorer: importances per site under given gates; called once, or with ``rescore``
            before every step, with the heads gone so far closed.
        shares: of all heads, growing.

    Raises:
        UsageError: shares that do not grow, or more than the rules allow.
    """
    rules = rules or HeadRules()
    total = sum(site.units for site in sites)
    scores = scorer(None)
    gone = [torch.zeros(site.units, dtype=torch.bool) for site in sites]
    last = -1.0
    for step, share in enumerate(shares):
        if share <= last:
            raise UsageError("must grow", field="shares", value=share, fix=f"more than {last}")
        last = share
        if rescore and step:
            scores = scorer({s.name: (~g).float() for s, g in zip(sites, gone, strict=True)})
        # Heads that are gone come first in any order, so that every cut holds the last one.
        ranked = [s.masked_fill(g, float("-inf")) for s, g in zip(scores, gone, strict=True)]
        gone = select_heads(ranked, heads_asked(total, share), rules)
        yield HeadCut(share, {s.name: g for s, g in zip(sites, gone, strict=True)})


def of_kind(sites: Sequence[GateSite], kinds: Sequence[str]) -> list[GateSite]:
    """The sites of some kinds of attention (``encoder``, ``decoder``, ``cross``); none = all.

    Raises:
        UsageError: the model has no attention of that kind.
    """
    known = sorted({site.kind for site in sites})
    for kind in kinds:
        if kind not in known:
            raise UsageError(
                "the model has no such attention", field="kinds", value=kind, fix=", ".join(known)
            )
    return [site for site in sites if not kinds or site.kind in kinds]


__all__ = [
    "HeadCut",
    "HeadRules",
    "head_schedule",
    "head_scores",
    "of_kind",
    "removal_order",
    "select_heads",
]
