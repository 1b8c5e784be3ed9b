"""DEPrune: depth-wise separable convolutions, taps of the one and filters of the other.

Park et al., "DEPrune: Depth-wise Separable Convolution Pruning for Maximizing GPU Parallelism",
NeurIPS 2024. In a block PW1 (expand) -> DW -> PW2 (project)

* of the depth-wise layer single taps go, by |w| (``masks.depthwise``: DCP, balanced, recalibrated);
* of PW2 filters go, which are also input channels of the next PW1; PW1's own filters stay, as each
  holds a whole depth-wise channel (section 3.4). Where blocks add up, they lose the same filters.

Channels of which no tap is left are constants and are folded away (``models.dead_channels``).
What the paper compares with is the choice of another ``variant``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from secateur.allocation.channels import lowest_units
from secateur.errors import UsageError
from secateur.kernels.depthwise import can_list, is_depthwise
from secateur.masks import depthwise as choices
from secateur.methods.channel_norms import Norm, filter_scores, unit_filters
from secateur.methods.deprune_latency import Latency, input_shapes
from secateur.methods.vision_base import VisionJob, VisionMethod, VisionOutcome
from secateur.models.channel_graph import ChannelGroup, ChannelGroups
from secateur.models.channel_surgery import shrink_channels
from secateur.models.dead_channels import fold_dead_channels, silent_channels

Variant = Literal["dcp", "b", "bh", "weight", "fours", "channel"]


def depthwise_layers(model: nn.Module) -> dict[str, nn.Conv2d]:
    """Depth-wise convolutions with more than one tap, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and is_depthwise(module) and module.weight[0].numel() > 1
    }


def prunable_layers(
    model: nn.Module, groups: ChannelGroups
) -> tuple[dict[str, nn.Conv2d], list[str]]:
    """Depth-wise layers whose taps can go, and names of those whose cannot.

    A tap that is zeroed is gone only where the layer ran, and convolved with its own weight: not
    with one that is standardised or computed otherwise first.
    """
    ran = {cost.name for cost in groups.layers if cost.kind == "depthwise"}
    layers = depthwise_layers(model)
    return {n: c for n, c in layers.items() if n in ran}, [n for n in layers if n not in ran]


def projections(model: nn.Module, groups: ChannelGroups) -> list[ChannelGroup]:
    """Groups whose channels are filters of PW2 layers, and of nothing else.

    A PW2 is a dense 1x1 convolution that reads the channels of a depth-wise layer at its
    resolution. A squeeze reads them too, mostly at 1x1, and what it writes goes back into them.
    The group also has the other layers that are added to it; one that a depth-wise layer works
    in is left alone, as each of its channels is a depth-wise channel.
    """
    layers = depthwise_layers(model)
    found = set()
    gates = {
        writer
        for group in groups
        if group.depthwise
        for inner in groups
        if inner.consumers and set(inner.consumers) <= set(group.producers)
        for writer in inner.producers
        if writer in group.consumers and tuple(groups.shapes[writer][2:]) == (1, 1)
    }
    for group in groups:
        mine = [name for name in group.depthwise if name in layers]
        if not mine:
            continue
        sizes = {groups.shapes[name][2:] for name in mine if name in groups.shapes}
        for name in group.consumers:
            module = model.get_submodule(name)
            dense = isinstance(module, nn.Conv2d) and module.groups == 1
            if dense and module.kernel_size == (1, 1) and groups.shapes[name][2:] in sizes:
                found.add(name)
    return [
        g
        for g in groups.prunable
        if not g.depthwise and (found - gates) & set(g.producers) and g.n_units > 1
    ]


@dataclass(frozen=True)
class DEPrune(VisionMethod):
    """Taps of depth-wise layers and filters of the point-wise layers behind them.

    The target is the share of all depth-wise taps that goes.

    Attributes:
        pw: share of the filters of every PW2 group that goes, in [0, 1).
        variant: ``dcp``: any taps of a layer; ``b``: the same number in every 32 channels; ``bh``:
            and widths brought to multiples of 32 where it pays, of PW2 too. For comparison
            ``weight``: one threshold on |w| for all layers; ``fours``: the same number in every
            four taps, as 2:4; ``channel``: whole depth-wise channels, cut out.
        criterion: by which filters go: ``l2``, ``l1`` or ``fpgm``.
        layers: ``uniform``: the same share of taps in every layer; ``global``: by one threshold on
            |w| over each layer's root mean square. The paper does not say which.
        fold: cut channels without taps where the network stays the same.
        measure: time widths on this device for ``bh``; False: assume a step every 32.
    """

    name = "deprune"
    summary = "vision: depth-wise taps in balanced ranges, filters of the point-wise layers behind"
    paper = "Park et al., NeurIPS 2024"
    targets = ("weights",)

    pw: float = 0.5
    variant: Variant = "b"
    criterion: Norm = "l2"
    layers: Literal["uniform", "global"] = "uniform"
    fold: bool = True
    measure: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.pw < 1:
            raise UsageError(
                "the share of filters to remove lies in [0, 1)", field="pw", value=self.pw
            )

    @torch.no_grad()
    def prune(self, job: VisionJob) -> VisionOutcome:
        """See ``VisionMethod``."""
        layers, others = prunable_layers(job.model, job.groups)
        if not layers:
            raise UsageError(
                "the network has no depth-wise convolutions of two dimensions"
                + (f" with weights of their own ({others[0]} computes its)" if others else ""),
                field="method",
                value=self.name,
                fix="use channel-l2 or s2hpruner for it",
            )
        if others:
            job.notes.append(
                f"{len(others)} depth-wise layers did not run, or not with their own weights, and "
                f"keep all taps: {', '.join(others[:4])}"
            )
        example = job.example.to(job.device)
        latency = Latency(job.model, input_shapes(job.model, example), self.measure)
        scores, widths = self._filters(job, latency)
        gone = lowest_units(scores, widths)
        largest = max(layers, key=lambda n: (can_list(layers[n]), layers[n].weight.numel()))
        rows: list[dict[str, Any]] = []
        if self.variant == "channel":
            masks: dict[str, Tensor] = {}
            gone |= self._channels(job, layers, rows)
            asked, curve = [], []
        else:
            masks = self.masks(layers, job.target.share, latency)
            asked = list(latency.rows)
            curve = latency.curve(largest)  # before the layer's weights are cut
            for name, mask in masks.items():
                job.model.get_parameter(name).masked_fill_(mask.to(job.device), 0)
            rows += [_row(name, masks[f"{name}.weight"]) for name in layers]
        folded = 0
        if self.fold and masks:
            dead = fold_dead_channels(job.model, job.groups, masks, example, job.at_least)
            folded = sum(int(units.sum()) for units in dead.values())
            gone |= dead
        silent = sum(
            int(silent_channels(g, job.model, masks).sum()) for g in job.groups if g.depthwise
        )
        rows += [
            {"name": key, "kind": "pointwise", "before": len(scores[key]), "after": widths[key]}
            for key in widths
        ]
        taps = sum(conv.weight.numel() for conv in layers.values())
        removed = sum(row["before"] - row["after"] for row in rows if row["kind"] == "depthwise")
        structure = shrink_channels(job.model, job.groups, gone, also=[masks])
        return VisionOutcome(
            structure,
            masks,
            record={
                "variant": self.variant,
                "taps": taps,
                "taps_gone": removed,
                "share": removed / taps,
                "filters_share": self.pw,
                "silent_channels": silent,
                "folded_channels": folded,
                "latency": {
                    "source": latency.source,
                    "rows": [list(row) for row in asked],
                    "layer": largest,
                    "curve": curve,
                },
            },
            layers=rows,
            delivered=removed / taps,
        )

    def masks(
        self, layers: Mapping[str, nn.Conv2d], share: float, latency: Latency
    ) -> dict[str, Tensor]:
        """Which taps go: weight name -> bool of its shape (every variant but ``channel``)."""
        weights = {name: conv.weight for name, conv in layers.items()}
        how: Any = "raw" if self.variant == "weight" else self.layers
        counts = choices.layer_counts(weights, share, how)
        if self.variant in ("dcp", "weight"):
            return {f"{n}.weight": choices.dcp(w, counts[n], n) for n, w in weights.items()}
        sizes = {name: weight[0].numel() for name, weight in weights.items()}
        kept = {
            n: max(1, choices.columns(sizes[n], counts[n] / weights[n].numel())) for n in weights
        }
        if self.variant == "bh":
            names = list(weights)
            aligned = choices.recalibrate(
                [kept[n] for n in names],
                [choices.CHANNELS * sizes[n] for n in names],
                lambda layer, width: latency.columns(names[layer], width),
            )
            kept = dict(zip(names, aligned, strict=True))
        choose = choices.fours if self.variant == "fours" else choices.balanced
        return {f"{n}.weight": choose(w, kept[n], n) for n, w in weights.items()}

    def _filters(
        self, job: VisionJob, latency: Latency
    ) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Scores and widths of the PW2 groups."""
        groups = projections(job.model, job.groups) if self.pw else []
        scores = {g.key: filter_scores(unit_filters(job.model, g), self.criterion) for g in groups}
        widths = {g.key: g.n_units - round(self.pw * g.n_units) for g in groups}
        if self.variant == "bh":
            aligned = choices.recalibrate(
                [widths[g.key] for g in groups],
                [g.n_units for g in groups],
                lambda i, n: latency.filters(groups[i].producers, groups[i].consumers, n),
            )
            widths = dict(zip(widths, aligned, strict=True))
        for group in groups:
            least = -(-max(widths[group.key], job.at_least) // job.round_to) * job.round_to
            widths[group.key] = min(least, group.n_units)
        return scores, widths

    def _channels(
        self, job: VisionJob, layers: Mapping[str, nn.Conv2d], rows: list[dict[str, Any]]
    ) -> dict[str, Tensor]:
        """Whole depth-wise channels, by the l2 norm of their taps."""
        gone: dict[str, Tensor] = {}
        parameters = dict(job.model.named_parameters())
        for group in job.groups.prunable:
            mine = [name for name in group.depthwise if name in layers]
            if not mine:
                continue
            score = torch.zeros(group.n_units)
            for part in group.slices:
                if part.parameter.removesuffix(".weight") in mine and part.dim == 0:
                    energy = parameters[part.parameter].flatten(1).square().sum(1).cpu()
                    score += energy[part.index].sum(1)
            width = max(job.at_least, group.n_units - round(job.target.share * group.n_units))
            gone |= lowest_units({group.key: score}, {group.key: width})
            for name in mine:
                taps = layers[name].weight[0].numel()
                rows.append(
                    {
                        "name": name, "kind": "depthwise", "before": group.n_units * taps,
                        "after": width * taps, "channels": group.n_units, "kept_channels": width,
                    }
                )  # fmt: skip
        if not gone:
            raise UsageError(
                "no depth-wise layer can lose channels",
                field="variant",
                value="channel",
                fix="; ".join(g.reason for g in job.groups.fixed if g.depthwise)[:200] or None,
            )
        return gone


def _row(name: str, mask: Tensor) -> dict[str, Any]:
    """What the report says of a depth-wise layer."""
    kept = choices.kept_columns(mask)
    return {
        "name": name,
        "kind": "depthwise",
        "before": mask.numel(),
        "after": int((~mask).sum()),
        "channels": len(mask),
        "kept_channels": int((~mask).flatten(1).any(1).sum()),
        "columns": max(kept),
        "imbalance": choices.imbalance(mask),
        # how many channels keep each tap, row by row of the kernel
        "map": (~mask).sum((0, 1)).tolist(),
    }
