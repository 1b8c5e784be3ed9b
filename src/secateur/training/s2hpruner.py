"""S2HPruner: widths are learned with the weights, and a hard network is distilled all along.

One stage, two forwards a step from one set of weights: the soft network (units multiplied by masks
w) and the hard one (units really sliced off, n^ = ceil(E) of each group left)::

    L  = task(soft) + kd G(sg soft, hard)                    trains the weights
    u <- u - lr m(fuse(dtask/du, dG(soft, sg hard)/du, d(F/F_all - T)^2/du))   trains the masks

Units are ranked by the mean L1 norm of their filters. A warm-up leaves the masks alone, the last
part of the training leaves the widths alone; at its beginning FLOPs that are still off the target
are brought to it. The masks are no parameters of the model: the hook carries them.

Source: Lin et al., "S2HPruner: Soft-to-Hard Distillation Bridges the Discretization Gap in
Pruning", NeurIPS 2024 (arXiv 2410.07046), and its published code. Its hyper-parameters were not
published: the defaults here are ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.data.batches import ImageBatch
from secateur.errors import NumericsError, UsageError
from secateur.models.channel_graph import ChannelGroups
from secateur.models.dual_path import DualPath, filter_norms
from secateur.models.vision.outputs import logits_of
from secateur.training.hooks import Hook, Loss, Training
from secateur.training.mask_fusion import fuse, norm, pressure
from secateur.training.s2h_options import Learning
from secateur.training.s2h_start import first_masks, resized, width_choices
from secateur.training.soft_hard import gaps, jensen_shannon
from secateur.training.width_masks import (
    centred,
    chosen_width,
    expected_width,
    expected_width_gradient,
    lifted,
    tilted,
    unit_masks,
    width_probabilities,
)

SETTLING = 500
"""Most FLOPs-only steps of the masks in one descent; they need no images."""


WATCHED = ("step", "flops", "divergence", "soft", "hard")
"""What is noted of a training, before the widths: share of the FLOPs, Jensen-Shannon divergence
(nats) and accuracies of both networks over the training images since the last note."""


class LearnedWidths(Hook):
    """The masks of a model's groups: a hook of the training loop, and the loss it minimises.

    Args:
        model: what is trained.
        groups: its channel groups, of which those that are prunable get masks.
        options: how.

    Raises:
        UsageError: no group can be narrowed; a target below what the narrowest widths cost.
    """

    def __init__(self, model: nn.Module, groups: ChannelGroups, options: Learning) -> None:
        self.model, self.groups, self.options = model, groups, options
        self.paths = DualPath(model, groups)
        self.device = next(model.parameters()).device
        self.widths = width_choices(groups, options)
        self.logits = {
            key: u.to(self.device).requires_grad_()
            for key, u in first_masks(self.widths, options).items()
        }
        self.speed = {key: torch.zeros_like(u) for key, u in self.logits.items()}
        self.order: dict[str, Tensor] = {}
        self.history: list[list[float]] = []
        self.seen = torch.zeros(4, dtype=torch.float64)  # images, divergence, right: soft, hard
        self.all_flops = float(self.groups.flops())
        self._step, self._done, self._moving, self._counted = 0, 0.0, False, 0
        self._gap: dict[str, Tensor] = {}
        self._fused: dict[str, Tensor] = {}
        self._broken = ""
        self.frozen_from = math.nan
        """F/F_all when the masks were frozen, before FLOPs alone moved them."""

    # -- the masks as they are -------------------------------------------------------------------

    def probabilities(self) -> dict[str, Tensor]:
        """p (n,) of each group, with gradients to the logits."""
        return {k: width_probabilities(u, self.options.tau) for k, u in self.logits.items()}

    def chosen(self, p: Mapping[str, Tensor] | None = None) -> dict[str, int]:
        """The hard network's width of each group."""
        with torch.no_grad():
            return {
                k: chosen_width(
                    float(expected_width(q, self.widths[k])),
                    int(self.widths[k][-1]),
                    self.options.multiple,
                )
                for k, q in (p or self.probabilities()).items()
            }

    def rank(self) -> None:
        """Rank the units by their filters as they are now."""
        if self.options.order == "fixed" and self.order:
            return
        for group in self.groups.prunable:
            if group.key not in self.widths:
                continue
            if self.options.order == "identity":
                order = torch.arange(group.n_units)
            else:
                norms = filter_norms(self.model, group)
                order = norms.argsort(descending=True, stable=True)
            self.order[group.key] = order

    def kept(self) -> dict[str, Tensor]:
        """(n_units,) bool of each group: the units of the hard network."""
        out = {}
        for key, width in self.chosen().items():
            units = torch.zeros(int(self.widths[key][-1]), dtype=torch.bool)
            units[self.order[key][:width]] = True
            out[key] = units
        return out

    def gates(self) -> dict[str, Tensor]:
        """(n_units,) of each group: what the soft network multiplies its units by."""
        out = {}
        for key, p in self.probabilities().items():
            ranked = unit_masks(p, self.widths[key])
            place = self.order[key].argsort().to(ranked.device)
            out[key] = ranked[place]
        return out

    def flops_share(self) -> float:
        """F/F_all of the hard network."""
        return float(self.groups.flops(self.chosen())) / self.all_flops

    # -- one step ----------------------------------------------------------------------------------

    def begin(self, at: Training) -> None:
        """See ``Hook``: all processes start from the masks of the first one.

        Raises:
            UsageError: a sharded training, whose weights no process has whole.
        """
        if at.settings.shard and at.accelerator.num_processes > 1:
            raise UsageError(
                "the hard network is sliced out of whole weights",
                field="shard",
                value=True,
                fix="shard: false",
            )
        at.model.train()
        if at.accelerator.num_processes > 1:
            for value in (*self.logits.values(), *self.speed.values()):
                torch.distributed.broadcast(value.data, 0)

    def before_forward(self, at: Training) -> None:
        """See ``Hook``: the ranking holds for a step."""
        if not self.order or at.step != self._step:
            self.rank()
        self._step, self._done = at.step, at.done
        self._moving = self.options.warmup <= at.done < 1 - self.options.freeze
        for u in self.logits.values():
            u.requires_grad_(self._moving)

    def loss(self, augment: Callable[[Tensor], Tensor] | None = None) -> Loss:
        """What the loop minimises; ``augment`` changes the images first."""

        def both(model: nn.Module, batch: ImageBatch) -> Tensor:
            pixels = batch.pixels if augment is None else augment(batch.pixels)
            pixels = self._resized(pixels)
            gates, kept = self.gates(), self.kept()
            if self.options.train == "hard":
                # The value of a sliced unit is 0 or 1, its gradient the soft mask's.
                gates = {k: kept[k].to(g) + g - g.detach() for k, g in gates.items()}
            with self.paths.soft(gates):
                soft = logits_of(model(pixels))
            value = F.cross_entropy(soft.float(), batch.labels)
            if self.options.distillation != "none":
                hard = logits_of(self.paths.hard(kept, pixels))
                self._watch(soft.detach(), hard.detach(), batch.labels)
                found = gaps(soft, hard, self.options.distillation, self.options.auto_temperature)
                if found.joint is not None:
                    value = value + self.options.kd * found.joint
                looks = self._moving and self._step % self.options.gap_every == 0
                if found.masks is not None and looks:
                    self._look(found.masks, len(batch.labels))
            return value

        return both

    def _resized(self, pixels: Tensor) -> Tensor:
        factors = self.options.resolutions
        which = int(torch.randint(len(factors), ())) if len(factors) > 1 else 0
        return resized(pixels, factors[which])

    @torch.no_grad()
    def _watch(self, soft: Tensor, hard: Tensor, labels: Tensor) -> None:
        """The gap on the training images, for the record."""
        right = [(logits.argmax(-1) == labels).sum() for logits in (soft, hard)]
        row = [jensen_shannon(soft, hard).sum(), *right]
        self.seen += torch.tensor([len(labels), *(float(v) for v in row)], dtype=torch.float64)

    def _look(self, gap: Tensor, count: int) -> None:
        """The gap's gradient for the masks alone; the weights never see it."""
        grads = torch.autograd.grad(gap, list(self.logits.values()), retain_graph=True)
        for key, grad in zip(self.logits, grads, strict=True):
            self._gap[key] = self._gap.get(key, 0) + count * grad
        self._counted += count

    def after_backward(self, at: Training) -> None:
        """See ``Hook``: the masks' three gradients become one."""
        if not self._moving:
            return
        task = {
            k: u.grad if u.grad is not None else torch.zeros_like(u) for k, u in self.logits.items()
        }
        gap = {k: self._gap.get(k, torch.zeros_like(u)) for k, u in self.logits.items()}
        counted = self._counted
        if at.accelerator.num_processes > 1:
            counted = _summed([*task.values(), *gap.values()], counted)
        gap = {k: g / counted for k, g in gap.items()} if counted else {}
        # Raised after the step, unless the loop finds the loss itself broken and puts things right.
        self._broken = next(
            (k for part in (task, gap) for k, g in part.items() if not torch.isfinite(g).all()), ""
        )
        scaler = at.accelerator.scaler
        if self._broken and scaler is not None and scaler.get_scale() > 1:
            self._broken = (
                ""  # float16's loss was scaled too high: the loop leaves the step out too
            )
            return
        flops, share = self._flops_gradient()
        self._fused = fuse(
            task, gap, flops, pressure(share, self.options.flops, self.options.relax),
            kd_scale=self.options.kd_scale, dis_scale=self.options.dis_scale,
        )  # fmt: skip

    def _flops_gradient(self) -> tuple[dict[str, Tensor], float]:
        """d(F/F_all - T)^2/du, through the widths as if they were the expected ones; and F/F_all."""
        with torch.no_grad():
            p = self.probabilities()
            chosen = self.chosen(p)
        widths = {k: torch.tensor(float(n), requires_grad=True) for k, n in chosen.items()}
        share = self.groups.flops(widths) / self.all_flops
        slopes = torch.autograd.grad(share, list(widths.values()), allow_unused=True)
        off = 2 * (float(share.detach()) - self.options.flops)
        return {
            k: off * (0.0 if slope is None else float(slope))
            * expected_width_gradient(p[k], self.widths[k], self.options.tau)
            for k, slope in zip(widths, slopes, strict=True)
        }, float(share.detach())  # fmt: skip

    @torch.no_grad()
    def after_step(self, at: Training) -> None:
        """See ``Hook``: the masks' own step; the widths settle when their time is over."""
        if self._broken:
            raise NumericsError(
                f"the gradient of the group's mask is not finite at step {at.step}",
                field="group",
                value=self._broken,
                fix="a lower lr, or auto_temperature: true",
            )
        if self._moving:
            settings = at.settings
            rate = self.options.lr * settings.rate(at.step - 1) / settings.lr
            for key, gradient in self._fused.items():
                u, speed = self.logits[key], self.speed[key]
                speed.mul_(self.options.momentum).add_(gradient + self.options.weight_decay * u)
                self._move(u, rate * speed)
            if at.done >= 1 - self.options.freeze:
                self.frozen_from = self.flops_share()
                self.settle()
        for u in self.logits.values():
            u.grad = None
        self._gap, self._fused, self._counted = {}, {}, 0
        if at.step % max(1, at.settings.steps // 100) == 0 or at.step == at.settings.steps:
            self._note(at)

    def _move(self, u: Tensor, by: Tensor) -> None:
        u.copy_(centred(lifted(u - by, self.options.tau), self.options.centre))

    @torch.no_grad()
    def settle(self) -> None:
        """FLOPs alone move the masks until they are within the tolerance, or as near as they come."""
        least = math.inf
        while (off := self._descend()) < 0.9 * least and off > self.options.relax:
            least = off  # a start far away takes more than one descent
        if off > self.options.relax:
            self._step_widths()

    def _descend(self) -> float:
        """Down the FLOPs' gradient with falling steps; how far off the masks are then."""
        best, least, idle = {k: u.clone() for k, u in self.logits.items()}, math.inf, 0
        rate, relax = 0.5 * self.options.tau, self.options.relax
        for _ in range(SETTLING):
            with torch.enable_grad():
                gradients, share = self._flops_gradient()
            off = abs(share - self.options.flops)
            idle += 1
            if off < least:
                best, least, idle = {k: u.clone() for k, u in self.logits.items()}, off, 0
            size = norm(gradients) / math.sqrt(len(gradients))
            if off <= relax / 2 or size == 0 or (least <= relax and idle >= 50):
                break
            for key, gradient in gradients.items():
                self._move(self.logits[key], rate * gradient / size)
            rate *= 0.99
        for key, u in best.items():
            self.logits[key].copy_(u)
        return least

    def _step_widths(self) -> None:
        """One width at a time, as long as that brings the FLOPs nearer: no gradient moves just one."""
        chosen, step = self.chosen(), self.options.multiple

        def off(widths: Mapping[str, int]) -> float:
            return abs(float(self.groups.flops(widths)) / self.all_flops - self.options.flops)

        before, least = dict(chosen), off(chosen)
        while least > self.options.relax:
            ways = [
                chosen | {key: width}
                for key, now in chosen.items()
                for width in (-(-now // step) * step - step, now // step * step + step)
                if self._least_width(key) <= width < int(self.widths[key][-1]) + step
            ]
            ways = [{k: min(n, int(self.widths[k][-1])) for k, n in way.items()} for way in ways]
            nearest = min(ways, key=off, default=chosen)
            if off(nearest) >= least:
                break
            chosen, least = nearest, off(nearest)
        for key, width in chosen.items():
            if width != before[key]:
                u = tilted(self.logits[key], self.widths[key], width, self.options.tau)
                self.logits[key].copy_(centred(u, self.options.centre))

    def _least_width(self, key: str) -> int:
        widths = self.widths[key]
        return chosen_width(float(widths[0]), int(widths[-1]), self.options.multiple)

    def end(self, at: Training) -> None:
        """See ``Hook``: whatever happened, what is delivered costs what was asked for."""
        if abs(self.flops_share() - self.options.flops) > self.options.relax:
            self.settle()

    def _note(self, at: Training) -> None:
        if at.accelerator.num_processes > 1:
            self._same_everywhere()
        widths, images = self.chosen(), float(self.seen[0])
        watched = (self.seen[1:] / images).tolist() if images else [math.nan] * 3
        self.seen.zero_()
        self.history.append(
            [at.step, self.flops_share(), *watched, *(widths[k] for k in self.widths)]
        )

    def _same_everywhere(self) -> None:
        """Refuse to go on with masks that differ between processes.

        Raises:
            NumericsError: naming the first group.
        """
        for key, u in self.logits.items():
            high, low = u.detach().clone(), u.detach().clone()
            torch.distributed.all_reduce(high, torch.distributed.ReduceOp.MAX)
            torch.distributed.all_reduce(low, torch.distributed.ReduceOp.MIN)
            if not torch.equal(high, low):
                raise NumericsError(
                    "the mask is not the same on every process",
                    field="group",
                    value=key,
                    fix="start the training again from its last checkpoint",
                )

    # -- checkpoints -------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """See ``Hook``: masks, their momentum, the ranking, and how the widths went."""
        out = {f"logits/{k}": u.detach().clone() for k, u in self.logits.items()}
        out |= {f"speed/{k}": s.clone() for k, s in self.speed.items()}
        out |= {f"order/{k}": o.clone() for k, o in self.order.items()}
        history = torch.tensor(self.history, dtype=torch.float64)
        out["history"] = history.reshape(-1, len(WATCHED) + len(self.widths))
        frozen = torch.tensor(self.frozen_from, dtype=torch.float64)
        return out | {"seen": self.seen.clone(), "frozen_from": frozen}

    @torch.no_grad()
    def restore(self, state: dict[str, Tensor], at: Training) -> None:
        """See ``Hook``."""
        for key, u in self.logits.items():
            u.copy_(state[f"logits/{key}"])
            self.speed[key].copy_(state[f"speed/{key}"])
        self.order = {k: state[f"order/{k}"] for k in self.widths if f"order/{k}" in state}
        self.history, self.seen = state["history"].tolist(), state["seen"].clone()
        self.frozen_from = float(state["frozen_from"])

    def record(self) -> dict[str, Any]:
        """For JSON: the widths, the FLOPs they cost, and the way there."""
        chosen, share = self.chosen(), self.flops_share()
        return {
            "flops": share,
            "target": self.options.flops,
            "relax": self.options.relax,
            "within": abs(share - self.options.flops) <= self.options.relax,
            "frozen_from": None if math.isnan(self.frozen_from) else self.frozen_from,
            "widths": {k: [n, int(self.widths[k][-1])] for k, n in chosen.items()},
            "history": {
                "columns": [*WATCHED, *self.widths],
                "rows": [[_short(value) for value in row] for row in self.history],
            },
        }


def _short(value: float) -> float | int | None:
    if math.isnan(value):
        return None
    return int(value) if value == int(value) else round(value, 6)


def _summed(tensors: list[Tensor], count: int) -> int:
    """Sum tensors over processes in place, in one message, and a count with them."""
    parts = [t.reshape(-1).double() for t in tensors]
    flat = torch.cat([*parts, parts[0].new_tensor([float(count)])])
    torch.distributed.all_reduce(flat)
    for tensor, part in zip(tensors, flat[:-1].split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))
    return int(flat[-1])
