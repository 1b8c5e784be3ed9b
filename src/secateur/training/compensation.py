"""Survivors make up for the units that go: layer by layer, from inputs seen in one training step.

When units go, the linears that read them (the attention's output projection, the MLP's down
projection, everything that reads the residual stream) lose columns. Their other columns become
what ``solvers.column_removal`` says, from inputs sampled while the step before the cut runs
anyway: no extra forward, nothing kept between steps. Linears of one module that read the same
inputs (q, k, v; gate, up) share one solve.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from secateur.models.discovery import is_conv1d
from secateur.models.units import Group
from secateur.solvers.column_removal import Solver, proven_coefficients


@dataclass
class _Site:
    """Linears that read the same inputs, and which of these go."""

    linears: list[nn.Module]
    gone: Tensor
    kept: Tensor
    name: str
    seen: list[Tensor] = field(default_factory=list)


class Compensation:
    """Samples inputs of the linears that will lose columns, then updates what stays of them.

    Args:
        model: as it is before the cut.
        groups: groups that lose units.
        units: group key -> unit numbers that go.
        dead: group key -> bool (n_units,), units that are zero already.
        tokens: inputs to sample in the step, over all windows and processes.
        windows: windows in the step, over all processes.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[Group],
        units: Mapping[str, Sequence[int]],
        dead: Mapping[str, Tensor],
        *,
        tokens: int,
        windows: int,
        damping: float = 0.01,
        solver: Solver = "auto",
    ) -> None:
        self.per_window = max(1, -(-tokens // windows))
        self.damping, self.solver = damping, solver
        self._awaited: set[str] = set()  # sites that the forward under way has not reached
        self.sites: dict[str, _Site] = {}
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for group in groups:
            if not units.get(group.key):
                continue
            embedded = {id(parameters[s.parameter]) for s in group.slices if s.role == "embed"}
            for part in group.reads():
                if id(parameters[part.parameter]) in embedded:
                    continue  # a tied head cannot change without the embedding
                name = part.parameter.rpartition(".")[0]
                key = name.rpartition(".")[0] if group.kind == "stem" else name
                linear = model.get_submodule(name)
                if key in self.sites:
                    self.sites[key].linears.append(linear)
                    continue
                gone = part.index[list(units[group.key])].reshape(-1)
                stays = torch.ones(part.index.numel(), dtype=torch.bool)
                stays[part.index[dead[group.key]].reshape(-1)] = False
                stays[gone] = False
                self.sites[key] = _Site([linear], gone, stays.nonzero().reshape(-1), name)
        self._handles = [
            site.linears[0].register_forward_pre_hook(self._sampler(key, site))
            for key, site in self.sites.items()
        ]

    def look(self) -> None:
        """Sample inputs in the forward that comes, once: computed again in backward, not again."""
        self._awaited = set(self.sites)

    def rest(self) -> None:
        """Sample nothing: what comes is not a training step's forward."""
        self._awaited = set()

    def _sampler(self, key: str, site: _Site) -> Any:
        def sample(module: nn.Module, args: tuple[Any, ...]) -> None:
            if key not in self._awaited:
                return
            self._awaited.discard(key)
            x = args[0].detach()
            if x.dim() == 2:
                x = x.unsqueeze(0)
            length = x.shape[1]
            take = min(self.per_window, length)
            places = torch.arange(take, device=x.device) * length // take
            chosen = x[:, places]
            half = x.dtype in (torch.bfloat16, torch.float16)
            site.seen.append(chosen.float() if half else chosen)

        return sample

    def release(self) -> None:
        """Stop looking at inputs."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @torch.no_grad()
    def apply(self, processes: int = 1) -> None:
        """Update the survivors' weights; every process must call it.

        Raises:
            NumericsError: inputs that are not finite, naming the linear.
        """
        self.release()
        for site in self.sites.values():
            x = _everyones(site, processes)
            device = site.linears[0]._parameters["weight"].device  # type: ignore[union-attr]
            kept, gone = site.kept.to(device), site.gone.to(device)
            change = proven_coefficients(x, kept, gone, self.damping, self.solver, site.name)
            for linear in site.linears:
                stored = linear._parameters["weight"]
                assert stored is not None
                weight = stored.T if is_conv1d(linear) else stored
                weight[:, kept] += (weight[:, gone].to(change.dtype) @ change).to(weight.dtype)
            site.seen = []


def _everyones(site: _Site, processes: int) -> Tensor:
    """(n, c) inputs that all processes sampled, in the order in which one process has them.

    Processes with fewer windows are padded with zeros, which change nothing.
    """
    weight = site.linears[0]._parameters["weight"]
    assert weight is not None
    if site.seen:
        x = torch.cat(site.seen)
    else:
        width = weight.shape[0] if is_conv1d(site.linears[0]) else weight.shape[1]
        kind = torch.float64 if weight.dtype == torch.float64 else torch.float32
        x = torch.zeros(0, 0, width, dtype=kind, device=weight.device)
    if processes == 1:
        return x.flatten(0, 1)
    mine = torch.tensor(x.shape[:2], device=x.device)
    sizes = [torch.zeros_like(mine) for _ in range(processes)]
    torch.distributed.all_gather(sizes, mine)
    windows, tokens = torch.stack(sizes).amax(0).tolist()
    padded = x.new_zeros(windows, tokens, x.shape[2])
    padded[: x.shape[0], : x.shape[1]] = x
    parts = [torch.empty_like(padded) for _ in range(processes)]
    torch.distributed.all_gather(parts, padded)
    # Windows are dealt out to processes in turn.
    return torch.stack(parts, 1).flatten(0, 2)
