"""Head pruning: the greedy schedule of "Are Sixteen Heads Really Better than One?".

Michel, Levy, Neubig, NeurIPS 2019, arXiv:1905.10650. Heads are ranked by the expected size of
their gate's gradient (``secateur.evidence.gates``), normalised layer by layer, and go a share
at a time, the least important of the whole model first. No weight is changed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from secateur.errors import UsageError
from secateur.evidence.ablation import ablate
from secateur.evidence.gates import (
    Gates,
    GateSite,
    Mode,
    gate_gradients,
    head_groups,
    sites_of,
)
from secateur.evidence.objectives import Batch, Objective, language_model, objective_for
from secateur.masks.structured import StructuredMask
from secateur.methods.base import one_of
from secateur.methods.head_selection import HeadRules, heads_asked, normalised, select_heads
from secateur.methods.structured_base import ScoreJob, StructuredMethod
from secateur.models.surgery import shrink
from secateur.models.units import Gqa
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


@dataclass(frozen=True)
class Heads(StructuredMethod):
    """Remove the attention heads whose gates the loss feels least.

    I_h = E_x |dL(x)/dxi_h| over calibration sequences, divided in each layer by its l2 norm, so
    that all heads of the model can be ranked together (``structure.ranking: global``, the
    default here). Where heads share keys and values, the unit is the group that shares them.

    Attributes:
        ranking: ``gradient``; ``ablation``, the loss without each head in turn (one forward a
            head and layer); or ``random``.
        mode: ``sample``, the paper's formula; ``token``, what the authors' code computes.
        normalise: by layer; only of gradients.
        steps: heads go in so many rounds, and are scored anew before each; 1: once.
        seed: of ``random``.
    """

    name = "heads"
    summary = "attention heads by the gradient of their gates; no update"
    paper = "Michel et al. 2019, arXiv:1905.10650"
    kinds = frozenset({"head", "kv_group"})
    usual_kinds = ("head",)
    usual_ranking = "global"

    ranking: Ranking = "gradient"
    mode: Mode = "sample"
    normalise: bool = True
    steps: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        one_of("ranking", self.ranking, get_args(Ranking))
        one_of("mode", self.mode, get_args(Mode))
        if self.steps < 1:
            raise UsageError("at least 1", field="steps", value=self.steps, fix="1")

    @property
    def rounds(self) -> int:
        """Steps in which the heads go."""
        return self.steps

    def scores(self, job: ScoreJob) -> dict[str, Tensor]:
        """Importance of every head, (n_units,) float64 by group key."""
        sites = sites_of(job.model, job.groups)
        batches = [] if self.ranking == "random" else job.samples()
        scores = head_scores(
            job.model,
            sites,
            batches,
            language_model,
            ranking=self.ranking,
            mode=self.mode,
            normalise=self.normalise,
            seed=self.seed,
            progress=job.progress,
        )
        return {site.name: score for site, score in zip(sites, scores, strict=True)}


@dataclass(frozen=True)
class PrunedHeads:
    """What ``prune_heads`` did.

    Attributes:
        mask: everything gone from the original model, for ``apply_mask`` and ``shrink``.
        cuts: the schedule, smallest cut first; the last one was made.
        scores: importances by site as first ranked.
    """

    mask: StructuredMask
    cuts: list[HeadCut]
    scores: dict[str, Tensor]


def prune_heads(
    model: nn.Module,
    batches: Iterable[Batch],
    objective: Objective | None = None,
    *,
    share: float,
    kinds: Sequence[str] = (),
    ranking: Ranking = "gradient",
    mode: Mode = "sample",
    normalise: bool = True,
    rules: HeadRules | None = None,
    step: float = 0.1,
    rescore: bool = False,
    gqa: Gqa | None = None,
    seed: int = 0,
    cut: bool = True,
    progress: Progress = SILENT,
) -> PrunedHeads:
    """Prune the attention heads of any transformer in memory: decoder, encoder or both.

    Args:
        model: cut in place (unless ``cut`` is False: then it is left alone).
        batches: tensors by name, samples along the first dimension.
        objective: by default what ``objective_for`` says: next tokens, labels, or features.
        share: of the heads of ``kinds``, in [0, 1).
        kinds: of attention in an encoder-decoder: ``encoder``, ``decoder``, ``cross``.
        rules: ``at_least``, ``multiple_of``, ``uniform``.
        step: the schedule's; every cut holds the ones before it.
        rescore: rank anew before every step, with the heads gone so far closed.
        gqa: see ``gate_sites``.

    Raises:
        UsageError: naming field, value and fix; the model is then as it was.

    Examples:
        >>> import torch
        >>> from secateur.models.tiny import tiny_model
        >>> model = tiny_model("gpt2")
        >>> ids = torch.randint(4, 200, (4, 16))
        >>> prune_heads(model, [{"input_ids": ids}], share=0.5).cuts[-1].removed
        4
    """
    if not 0 < step <= 1:
        raise UsageError("a share in (0, 1]", field="step", value=step, fix="0.1")
    known = list(batches)
    groups = {g.key: g for g in head_groups(model, gqa)}
    sites = of_kind(sites_of(model, groups.values()), kinds)
    if any(groups[s.name].even > 1 for s in sites) and gqa == "even":
        raise UsageError(
            "one ranking of all heads does not take the same number from every group",
            field="gqa",
            value=gqa,
            fix="gqa: groups or duplicate; or secateur.prune(..., method='heads')",
        )
    chosen = objective or objective_for(model, known[0] if known else {})
    first: list[list[Tensor]] = []

    def scorer(gates: Gates | None) -> list[Tensor]:
        found = head_scores(
            model,
            sites,
            known,
            chosen,
            ranking=ranking,
            mode=mode,
            normalise=normalise,
            seed=seed,
            gates=gates,
            progress=progress,
        )
        first.append(found)
        return found

    heads_asked(1, share)  # refuses what is no share before anything is computed
    shares = [n * step for n in range(1, math.ceil(share / step - 1e-9))] + [share]
    cuts = list(head_schedule(sites, scorer, shares, rules, rescore=rescore))
    mask = StructuredMask()
    for name, gone in cuts[-1].gone.items():
        mask.remove(groups[name], gone)
        if gqa == "duplicate":
            mask.duplicated.add(name)
    if cut:
        mask = shrink(model, mask)
    scores = {site.name: score for site, score in zip(sites, first[0], strict=True)}
    return PrunedHeads(mask, cuts, scores)
