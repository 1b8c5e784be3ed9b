"""Training a part of a network on its own: inputs and wanted outputs are given.

The loss of a step is ||f(x) - y||² over its tokens, relative to the mean square norm of a
token's y, so that a learning rate means the same in every block. Batches are taken in a fixed
order, round and round; padding does not count.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from secateur.errors import NumericsError
from secateur.evidence.replay import Residency
from secateur.models.anatomy import Block, ModelView
from secateur.training.loop import Hook, Training, make_optimizer
from secateur.training.settings import TrainSettings


@dataclass
class Dense:
    """The model before it was cut, a block at a time.

    Attributes:
        view: the same blocks.
        resident: makes a block's weights present; None: they are.
    """

    view: ModelView
    resident: Residency | None = None

    def present(self, block: Block) -> AbstractContextManager[Any]:
        """The block's weights in memory, as long as the context lasts."""
        return nullcontext() if self.resident is None else self.resident(block)


@contextmanager
def in_float32(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Half-precision parameters held in float32 while they are trained, then rounded once."""
    kinds = {p: p.dtype for p in parameters if p.dtype != torch.float32}
    for parameter in kinds:
        parameter.data = parameter.data.float()
    try:
        yield
    finally:
        for parameter, kind in kinds.items():
            parameter.data = parameter.data.to(kind)


@dataclass
class Local:
    """What is trained, on what.

    Attributes:
        name: for messages.
        forward: batch number -> outputs (B, L, d), differentiable.
        targets: wanted outputs, per batch.
        keep: (B, L) bool per batch, True for real tokens; None for all.
    """

    name: str
    forward: Callable[[int], Tensor]
    targets: Sequence[Tensor]
    keep: Sequence[Tensor | None]

    def __post_init__(self) -> None:
        tokens = sum(self._tokens(b) for b in range(len(self.targets)))
        energy = sum(float(self._real(b, y).square().sum()) for b, y in enumerate(self.targets))
        self.tokens, energy = _summed(tokens, energy)
        self.energy = energy / self.tokens if energy else 1.0

    def _tokens(self, batch: int) -> int:
        keep = self.keep[batch]
        return int(self.targets[batch][..., 0].numel() if keep is None else keep.sum())

    def _real(self, batch: int, values: Tensor) -> Tensor:
        keep = self.keep[batch]
        return values.float() if keep is None else values.float()[keep]

    def gap(self, batch: int, outputs: Tensor) -> Tensor:
        """||f(x) - y||² of a batch, relative to a token's mean ||y||²; sum over its tokens."""
        apart = self._real(batch, outputs) - self._real(batch, self.targets[batch])
        return apart.square().sum() / self.energy

    def error(self, outputs: Sequence[Tensor] | None = None) -> float:
        """||f(x) - y|| / ||y|| over all batches and processes; ``outputs`` if there are any."""
        with torch.no_grad():
            total = sum(
                float(self.gap(b, self.forward(b) if outputs is None else outputs[b]))
                for b in range(len(self.targets))
            )
        total, _ = _summed(total, 0.0)
        return math.sqrt(total / self.tokens)


def fit_local(
    local: Local,
    named: Mapping[str, nn.Parameter],
    settings: TrainSettings,
    *,
    per_step: int = 1,
    hooks: Sequence[Hook] = (),
    model: nn.Module | None = None,
    advance: Callable[..., None] = lambda *a: None,
) -> list[float]:
    """Train ``named`` in place for ``settings.steps``; returns each step's loss.

    Args:
        per_step: batches in a step (gradients are accumulated).
        hooks: as in ``loop.fit`` (masks kept at zero).

    Raises:
        NumericsError: a loss that is not finite.
    """
    optimizer = make_optimizer(named, settings)
    at = Training(model or nn.Module(), settings, dict(named), optimizer, None)
    for hook in hooks:
        hook.begin(at)
    losses = []
    batches = len(local.targets)
    for step in range(settings.steps):
        chosen = [(step * per_step + i) % batches for i in range(per_step)]
        tokens, _ = _summed(sum(local._tokens(b) for b in chosen), 0.0)
        total = 0.0
        with torch.enable_grad():
            for batch in chosen:
                for hook in hooks:
                    hook.before_forward(at)
                loss = local.gap(batch, local.forward(batch)) / max(1.0, tokens)
                loss.backward()
                total += float(loss.detach())
        _sum_gradients(named)
        total, _ = _summed(total, 0.0)
        for hook in hooks:
            hook.after_backward(at)
        limit = math.inf if settings.clip is None else settings.clip
        norm = float(nn.utils.clip_grad_norm_(list(named.values()), limit))
        if not math.isfinite(total) or not math.isfinite(norm):
            raise NumericsError(
                f"the loss of '{local.name}' is not finite at step {step + 1}",
                field="lr",
                value=settings.lr,
                fix="a lower rate (a third of it)",
            )
        for group in optimizer.param_groups:
            group["lr"] = settings.rate(step) * group["lr_scale"]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        at.step += 1
        for hook in hooks:
            hook.after_step(at)
        losses.append(total)
        advance(1, f"{local.name}, loss {total:.4g}")
    return losses


def _summed(first: float, second: float) -> tuple[float, float]:
    """Both over all processes."""
    if not dist.is_initialized():
        return float(first), float(second)
    pair = torch.tensor([first, second], dtype=torch.float64)
    dist.all_reduce(pair)
    return float(pair[0]), float(pair[1])


def _sum_gradients(named: Mapping[str, nn.Parameter]) -> None:
    if not dist.is_initialized():
        return
    for parameter in named.values():
        if parameter.grad is None:  # this process's tokens did not reach it
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)
