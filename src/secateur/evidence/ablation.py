"""What each attention head is worth, by taking it away (or all others in its layer).

The expensive and exact counterpart of ``gates``: one evaluation a head. Two things make it
affordable. A layer's heads are tried together, the batch repeated once a head with a gate of
its own; and the blocks before the layer, whose outputs no head of it can change, are not run
again but answer with what they gave the first time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from secateur.evidence.gates import Gates, GateSite, gated
from secateur.evidence.objectives import Batch, Objective
from secateur.models.state import evaluating
from secateur.progress import SILENT, Progress


@dataclass
class Ablation:
    """Means over samples of an objective.

    Attributes:
        baseline: with every head in place.
        values: site name -> (units,) float64: without the unit, or with it alone in its layer.
    """

    baseline: float
    values: dict[str, Tensor] = field(default_factory=dict)

    def changes(self) -> dict[str, Tensor]:
        """How much worse (higher) than the baseline each is."""
        return {name: value - self.baseline for name, value in self.values.items()}


@torch.no_grad()
def ablate(
    model: nn.Module,
    sites: Sequence[GateSite],
    batches: Iterable[Batch],
    objective: Objective,
    *,
    alone: bool = False,
    gates: Gates | None = None,
    rows: int = 128,
    progress: Progress = SILENT,
) -> Ablation:
    """Evaluate with each unit of each site closed, one at a time.

    Args:
        batches: tensors by name, samples along the first dimension.
        objective: each sample's loss (or error, 0 or 1), (B,).
        alone: instead close every *other* unit of the layer ("all but one").
        gates: gates in force meanwhile (units removed so far), which stay closed.
        rows: at most so many samples in one forward (a batch repeated for many heads).
    """
    known = list(batches)
    base, samples = 0.0, 0
    totals = {site.name: torch.zeros(site.units, dtype=torch.float64) for site in sites}
    with (
        evaluating(model),
        gated(sites, gates or {}),
        progress.stage("head ablation", total=len(known) * len(sites), unit="layers") as advance,
    ):
        for batch in known:
            blocks = repeated_blocks(model)
            with _recorded(blocks.values()) as outputs:
                losses = objective(model, batch)
            count = len(losses)
            base += float(losses.double().sum())
            samples += count
            for site in sites:
                before = _before(blocks, site)
                at_once = max(1, rows // count)
                for first in range(0, site.units, at_once):
                    units = range(first, min(first + at_once, site.units))
                    closed = torch.zeros(len(units), site.units)
                    closed[range(len(units)), units] = 1
                    gate = closed if alone else 1 - closed
                    many = {k: _repeated(v, count, len(units)) for k, v in batch.items()}
                    with (
                        _answering({b: _repeated(outputs[b], count, len(units)) for b in before}),
                        _row_gates(site, gate.repeat_interleave(count, 0)),
                    ):
                        found = objective(model, many).double().view(len(units), count).sum(1)
                    totals[site.name][list(units)] += found.cpu()
                advance(1)
    return Ablation(base / max(1, samples), {n: t / max(1, samples) for n, t in totals.items()})


def repeated_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The outermost lists' children, by name, in the order in which they run."""
    out: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        parent = model.get_submodule(name.rpartition(".")[0]) if "." in name else None
        inside = any(name.startswith(f"{outer}.") for outer in out)
        if isinstance(parent, nn.ModuleList) and not inside:
            out[name] = module
    return out


def _before(blocks: Mapping[str, nn.Module], site: GateSite) -> list[nn.Module]:
    """Blocks that have run when the site's block begins."""
    found: list[nn.Module] = []
    for name, module in blocks.items():
        if site.name == name or site.name.startswith(f"{name}."):
            return found
        found.append(module)
    return []  # in no block: nothing can be skipped


@contextmanager
def _recorded(blocks: Iterable[nn.Module]) -> Iterator[dict[nn.Module, Any]]:
    outputs: dict[nn.Module, Any] = {}

    def record(module: nn.Module, args: Any, output: Any) -> None:
        outputs[module] = output

    with ExitStack() as stack:
        for block in blocks:
            stack.callback(block.register_forward_hook(record).remove)
        yield outputs


@contextmanager
def _answering(answers: Mapping[nn.Module, Any]) -> Iterator[None]:
    """These modules return what they are told instead of running."""
    before = {module: module.__dict__.get("forward") for module in answers}
    for module, answer in answers.items():
        module.forward = lambda *args, answer=answer, **kwargs: answer
    try:
        yield
    finally:
        for module, own in before.items():
            del module.forward
            if own is not None:
                module.forward = own


@contextmanager
def _row_gates(site: GateSite, gate: Tensor) -> Iterator[None]:
    """Gates (rows, units), each row of the batch its own."""

    def hook(module: nn.Module, args: tuple[Any, ...]) -> Any:
        x: Tensor = args[0]
        scale = gate.to(x).repeat_interleave(x.shape[-1] // site.units, 1)
        tokens = x.numel() // (scale.numel())
        return ((x.view(len(gate), tokens, -1) * scale[:, None]).view_as(x), *args[1:])

    handle = site.projection.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _repeated(value: Any, batch: int, times: int) -> Any:
    """``value`` with every tensor of ``batch`` rows repeated; the rest (biases, masks) as it is."""
    if isinstance(value, Tensor):
        alike = value.dim() > 0 and value.shape[0] == batch
        return value.repeat(times, *[1] * (value.dim() - 1)) if alike else value
    if isinstance(value, tuple | list):
        return type(value)(_repeated(v, batch, times) for v in value)
    return value
