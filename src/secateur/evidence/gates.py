"""Gradients of attention heads' gates, one sample at a time.

A gate xi_h multiplies what head h adds to its layer's output (Michel et al. 2019, "Are Sixteen
Heads Really Better than One?", eq. 2-3). The output projection is linear, so the gate may as
well sit on its input: with c_h the head's context (what enters its columns of the projection),

    dL(x) / dxi_h = sum_t < c_h(t), dL / dc_h(t) >          I_h = E_x | dL(x) / dxi_h |

Both factors are seen by a hook on the projection's input, whatever attention kernel made it:
no model is patched, no weight's gradient is computed, and one backward serves a whole batch
because samples do not meet in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from secateur.errors import NumericsError, UsageError
from secateur.evidence.objectives import Batch, Objective
from secateur.evidence.statistics import all_finite
from secateur.models.state import evaluating
from secateur.models.units import Gqa, Group, units_of
from secateur.progress import SILENT, Progress

Kind = Literal["self", "encoder", "decoder", "cross"]
Mode = Literal["sample", "token"]
Gates = Mapping[str, Tensor]
"""Site name -> (units,) of 0 and 1 (or anything between); sites not named are left alone."""


@dataclass(frozen=True, eq=False)
class GateSite:
    """One attention layer as its gates see it.

    Attributes:
        name: the attention layer's name in the model.
        projection: its output projection, whose input is (..., units * width), unit by unit.
        units: heads; or key-value groups, each the heads that share a key (their gate
            gradients add up before the absolute value is taken).
        kind: ``self``, or in an encoder-decoder ``encoder``, ``decoder`` or ``cross``.
    """

    name: str
    projection: nn.Module
    units: int
    kind: Kind = "self"


@contextmanager
def gated(sites: Iterable[GateSite], gates: Gates) -> Iterator[None]:
    """While active, every unit's contribution is multiplied by its gate.

    Raises:
        UsageError: a gate's size is not its site's number of units.
    """
    with ExitStack() as stack:
        for site in sites:
            if site.name not in gates:
                continue
            gate = gates[site.name]
            if gate.shape != (site.units,):
                raise UsageError(
                    f"'{site.name}' has {site.units} units",
                    field="gates",
                    value=tuple(gate.shape),
                    fix=f"one gate a unit: ({site.units},)",
                )

            def hook(
                module: nn.Module, args: tuple[Any, ...], gate: Tensor = gate, n: int = site.units
            ) -> Any:
                x = args[0]
                scale = gate.to(x).repeat_interleave(x.shape[-1] // n)
                return (x * scale, *args[1:])

            stack.callback(site.projection.register_forward_pre_hook(hook).remove)
        yield


def gate_gradients(
    model: nn.Module,
    sites: Sequence[GateSite],
    batches: Iterable[Batch],
    objective: Objective,
    *,
    mode: Mode = "sample",
    gates: Gates | None = None,
    progress: Progress = SILENT,
) -> dict[str, Tensor]:
    """I_h of every site's units, (units,) float64, averaged over all samples of ``batches``.

    Args:
        batches: tensors by name, samples along the first dimension.
        objective: each sample's loss, (B,); see ``secateur.evidence.objectives``.
        mode: ``sample``: E_x |sum_t <c, dc>|, the paper's formula. ``token``:
            E_x sum_t |<c, dc>|, what the authors' code computes (never smaller).
        gates: gates in force meanwhile (units removed so far); a closed one scores 0.

    Raises:
        NumericsError: a loss or gradient is not finite.
        UsageError: no samples, or a site that the forward never reaches.
    """
    if mode not in ("sample", "token"):
        raise UsageError("unknown", field="mode", value=mode, fix="sample or token")
    totals = {site.name: torch.zeros(site.units, dtype=torch.float64) for site in sites}
    samples = 0
    known = list(batches)
    with (
        evaluating(model),
        gated(sites, gates or {}),
        torch.enable_grad(),
        progress.stage("gate gradients", total=len(known), unit="batches") as advance,
    ):
        for number, batch in enumerate(known):
            with _watching(sites) as seen:
                losses = objective(model, batch)
                if not all_finite(losses.detach()):
                    raise NumericsError(
                        f"the loss of calibration batch {number} is not finite",
                        fix="use --dtype float32, or check the weights and the tokenizer",
                    )
                losses.sum().backward()
            samples += len(losses)
            for site in sites:
                totals[site.name] += _importance(site, seen.get(site.name, []), len(losses), mode)
            advance(1)
    if not samples:
        raise UsageError("no calibration samples", field="calibration", value=0)
    return {name: total / samples for name, total in totals.items()}


def _importance(site: GateSite, products: list[Tensor], batch: int, mode: Mode) -> Tensor:
    """Sum over the batch's samples of |gate gradient|, (units,) float64 on the CPU."""
    if not products:
        raise UsageError(
            f"the objective's forward never reached '{site.name}'",
            field="sites",
            value=site.name,
            fix="leave the layer out, or use an objective that runs it",
        )
    each = [p.reshape(batch, -1, site.units) for p in products]
    if mode == "token":
        found = sum((p.abs().sum((0, 1)) for p in each), torch.zeros(()))
    else:
        # A projection shared by several layers has one gate: its uses add up, sample by sample.
        found = sum((p.sum(1) for p in each), torch.zeros(())).abs().sum(0)
    if not all_finite(found):
        raise NumericsError(
            f"the gate gradients of '{site.name}' are not finite",
            fix="use --dtype float32 (half precision overflows in some models)",
        )
    return found.double().cpu()


@contextmanager
def _watching(sites: Sequence[GateSite]) -> Iterator[dict[str, list[Tensor]]]:
    """Site name -> for each use of its projection <c, dc> (..., units), float32, after backward."""
    seen: dict[str, list[Tensor]] = {}
    with ExitStack() as stack:
        for site in sites:

            def hook(module: nn.Module, args: tuple[Any, ...], site: GateSite = site) -> Any:
                context: Tensor = args[0]
                if not context.requires_grad:  # weights are frozen: the first layer starts a graph
                    context = context.detach().requires_grad_(True)

                def product(gradient: Tensor) -> None:
                    terms = context.detach().float() * gradient.float()
                    found = terms.unflatten(-1, (site.units, -1)).sum(-1)
                    seen.setdefault(site.name, []).append(found)

                context.register_hook(product)
                return (context, *args[1:])

            stack.callback(site.projection.register_forward_pre_hook(hook).remove)
        yield seen


# -- where the gates are -----------------------------------------------------------------------


def gate_sites(model: nn.Module, gqa: Gqa | None = None) -> list[GateSite]:
    """Every attention layer of a transformer, in the order of its modules.

    Decoders, encoders of the BERT kind, and encoder-decoders.

    Args:
        gqa: what a unit is where heads share keys: ``groups`` (with their keys), or single
            query heads (``even``, ``duplicate``). None: groups, but query heads where one
            key serves them all.

    Raises:
        UsageError: no attention layer is found.
    """
    return sites_of(model, head_groups(model, gqa))


def head_groups(model: nn.Module, gqa: Gqa | None = None) -> list[Group]:
    """The groups of heads behind ``gate_sites``."""
    try:
        return list(units_of(model, ("head",), gqa or "groups"))
    except UsageError as error:
        if gqa is None and error.field == "gqa":
            return list(units_of(model, ("head",), "even"))
        raise


def sites_of(model: nn.Module, groups: Iterable[Group]) -> list[GateSite]:
    """The gates of groups of heads; groups of other kinds have none and are left out."""
    paired = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    out = []
    for group in groups:
        if group.kind not in ("head", "kv_group"):
            continue
        name = group.reads()[0].parameter.removesuffix(".weight")
        kind: Kind = "self"
        if group.attention == "cross":
            kind = "cross"
        elif paired:
            kind = "encoder" if group.stack == "encoder" else "decoder"
        out.append(GateSite(group.key, model.get_submodule(name), group.n_units, kind))
    return out
