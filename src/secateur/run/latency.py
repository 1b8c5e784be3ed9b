"""Time as the target: measured on this machine, on copies of the model with fewer units."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from secateur.allocation.align import align_by_benefit
from secateur.allocation.plan import UnitCut
from secateur.masks.structured import StructuredMask
from secateur.models.surgery import shrink
from secateur.models.units import Group
from secateur.progress import SILENT, Progress

if TYPE_CHECKING:
    from secateur.recipe import Structure

_REPEATS = 5


@torch.no_grad()
def prefill_seconds(model: Any, tokens: int, repeats: int = _REPEATS) -> float:
    """Median seconds of one forward over ``tokens`` tokens."""
    device = next(model.parameters()).device
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = (torch.arange(tokens, device=device) * 7 % vocabulary)[None]
    times = []
    for turn in range(repeats + 1):
        start = time.perf_counter()
        model(input_ids=ids, use_cache=False)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if turn:
            times.append(time.perf_counter() - start)
    return median(times)


def saved_time(
    model: Any,
    groups: Sequence[Group],
    tokens: int,
    counts: Callable[[float], Mapping[str, UnitCut]],
    progress: Progress = SILENT,
) -> Callable[[float], float]:
    """A function from a share of units to the share of time that it saves, measured.

    Which units go makes no difference to the time, so the first ones do. The dense model is
    timed again beside each candidate: a machine that slows down slows both.
    """
    known: dict[tuple[int, ...], float] = {}

    def saved(share: float) -> float:
        cuts = counts(share)
        key = tuple(cuts[g.key].removed for g in groups)
        if key not in known:
            with progress.stage(f"timing a cut of {share:.0%}"):
                smaller = first_units_gone(model, groups, cuts)
                dense = [prefill_seconds(model, tokens, 2)]
                fast = [prefill_seconds(smaller, tokens, 3), prefill_seconds(smaller, tokens, 2)]
                dense.append(prefill_seconds(model, tokens, 2))
                known[key] = 1 - median(fast) / median(dense)
        return known[key]

    return saved


def first_units_gone(model: Any, groups: Sequence[Group], cuts: Mapping[str, UnitCut]) -> Any:
    """A copy of ``model`` of the shapes that ``cuts`` gives."""
    mask = StructuredMask()
    for group in groups:
        gone = torch.zeros(group.even, group.n_units // group.even, dtype=torch.bool)
        gone[:, : cuts[group.key].removed // group.even] = True
        if gone.any():
            mask.remove(group, gone.reshape(-1))
            if group.kind == "head":
                mask.duplicated.add(group.key)
    smaller = deepcopy(model)
    shrink(smaller, mask)
    return smaller


def width_seconds(
    d_model: int, matrices: int, tokens: int, device: torch.device
) -> Callable[[int], float]:
    """Measured seconds of an MLP's products at a width (``matrices`` of width x d_model)."""

    def seconds(width: int) -> float:
        x = torch.ones(tokens, d_model, device=device)
        up = torch.ones(width, d_model, device=device)
        down = torch.ones(d_model, width, device=device)
        times = []
        for turn in range(8):
            start = time.perf_counter()
            for _ in range(matrices - 1):
                hidden = x @ up.T
            hidden @ down.T
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if turn:
                times.append(time.perf_counter() - start)
        return median(times)

    return seconds


def align_widths(
    model: Any,
    groups: Sequence[Group],
    cuts: Mapping[str, UnitCut],
    structure: Structure,
    progress: Progress = SILENT,
    tile: int = 32,
) -> tuple[dict[str, UnitCut], str]:
    """MLP widths moved to multiples of ``tile`` where measured times say that it pays.

    Returns:
        The cuts, their total within half a tile of what it was, and a sentence on what was done.
    """
    ffn = [g for g in groups if g.kind == "ffn" and g.n_units % tile == 0]
    widths = [g.n_units - cuts[g.key].removed for g in ffn]
    known: dict[tuple[int, int, int], float] = {}
    device = next(model.parameters()).device

    def benefit(index: int, width: int) -> float:
        group = ffn[index]
        matrices = 1 + len({s.parameter for s in group.writes() if s.parameter.endswith("weight")})
        d_model = group.weights // max(1, matrices)
        key = (d_model, matrices, width)
        if key not in known:
            known[key] = width_seconds(d_model, matrices, structure.context, device)(width)
        return known[key]

    with progress.stage("timing widths"):
        found = align_by_benefit(widths, [g.n_units for g in ffn], tile, benefit)
    out = dict(cuts)
    for group, width in zip(ffn, found, strict=True):
        out[group.key] = UnitCut(group.n_units, group.n_units - width, cuts[group.key].weights)
    moved = sum(a != b for a, b in zip(widths, found, strict=True))
    return out, f"align: {moved} of {len(ffn)} MLP widths were moved to multiples of {tile}"
