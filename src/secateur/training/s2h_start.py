"""Where an S2HPruner training starts: widths to choose from, first masks, sizes of images; checked."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.errors import UsageError
from secateur.models.channel_graph import ChannelGroups
from secateur.models.state import evaluating
from secateur.training.s2h_options import Learning
from secateur.training.width_masks import candidate_widths, chosen_width, first_logits


def width_choices(groups: ChannelGroups, options: Learning) -> dict[str, Tensor]:
    """Candidate widths of every group that can be narrowed.

    Raises:
        UsageError: there is none; a target below what the narrowest widths cost.
    """
    widths: dict[str, Tensor] = {}
    for group in groups.prunable:
        found = candidate_widths(group.n_units, options.divisor, options.at_least, group.key)
        if len(found) > 1:
            widths[group.key] = found
    if not widths:
        raise UsageError(
            "no group of this network can be narrowed",
            field="structure",
            value="prunable groups: 0",
        )
    narrow = {k: chosen_width(float(w[0]), int(w[-1]), options.multiple) for k, w in widths.items()}
    floor = float(groups.flops(narrow)) / float(groups.flops())
    if options.flops < floor - options.relax:
        raise UsageError(
            f"the narrowest widths still cost {floor:.3f} of the FLOPs",
            field="flops",
            value=options.flops,
            fix=f"at least {math.ceil(1000 * floor) / 1000:g} left, a smaller divisor, or more kinds "
            "of groups",
        )
    return widths


def first_masks(widths: Mapping[str, Tensor], options: Learning) -> dict[str, Tensor]:
    """Logits every group starts from.

    Raises:
        UsageError: an expected width that a group cannot have.
    """
    generator = torch.Generator().manual_seed(options.seed)
    return {
        key: first_logits(
            found, options.init, tau=options.tau, std=options.init_std,
            share=options.init_share, generator=generator,
        )
        for key, found in widths.items()
    }  # fmt: skip


@torch.no_grad()
def check_resolutions(model: nn.Module, images: Tensor, options: Learning) -> None:
    """Refuse sizes of images that the network does not take; nothing is changed.

    Args:
        images: one at least, (B, C, H, W).

    Raises:
        UsageError: naming the factor.
    """
    for factor in options.resolutions:
        if factor == 1:
            continue
        place = next(model.parameters())
        try:
            with evaluating(model):
                model(resized(images[:1].to(place), factor))
        except (RuntimeError, ValueError) as error:
            raise UsageError(
                f"the network does not take images of {factor:g} times their size "
                f"({str(error).splitlines()[0]})",
                field="resolutions",
                value=list(options.resolutions),
                fix="leave it out for networks made for one size, such as vision transformers",
            ) from None


def resized(images: Tensor, factor: float) -> Tensor:
    """Images (B, C, H, W) made smaller by ``factor``, no side below 1."""
    if factor == 1:
        return images
    size = [max(1, int(side * factor)) for side in images.shape[-2:]]
    return F.interpolate(images, size, mode="bilinear", antialias=True)
