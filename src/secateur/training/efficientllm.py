"""EfficientLLM: pruning-aware pretraining, in which the small model's shape is found on the way.

Xing et al., "EfficientLLM: Unified Pruning-Aware Pretraining for Auto-Designed Compact Language
Models", ACL 2026, arXiv:2502.06663. A trained larger model goes on training, and again and again
the least salient unit goes (a head, an MLP channel, a channel of the residual stream: in every
layer the same number), until a budget of parameters is met; then training goes on. Saliency comes
from the very gradients of training; survivors are updated by the layers' own second moments.

No code was published. What the paper does not say, and what is done here, is in
``docs/methods/efficientllm.md``. The parts: ``group_saliency`` (what a unit is worth),
``unit_ledger`` (what it weighs), ``unit_choice`` (which goes), ``prune_schedule`` (when),
``compensation`` (what survivors become); this file is the hook of the training loop.
"""

from __future__ import annotations

import json
import time
from collections.abc import MutableMapping, Sequence
from copy import copy
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from secateur.errors import UsageError
from secateur.masks.structured import StructuredMask, structure_of
from secateur.models.norms import is_rms, see_all, stem_norms, unmask_norms
from secateur.models.surgery import shrink
from secateur.models.units import Group, parameters_of
from secateur.training.compensation import Compensation
from secateur.training.group_saliency import SaliencySums
from secateur.training.hooks import Hook, Training
from secateur.training.masked_units import mask_units, silence_gradients, view_masked
from secateur.training.prune_options import PruneOptions, find_groups, refuse_unreachable
from secateur.training.unit_choice import Choice, Chooser, type_of
from secateur.training.unit_ledger import UnitLedger

__all__ = ["PruneOptions", "PruningAware"]


class PruningAware(Hook):
    """The hook that carries EfficientLLM through a training.

    Args:
        options: see ``PruneOptions``.
        also: more tensors by parameter name (weight averages, master copies) to be cut along.

    Attributes:
        events: what went: one entry a choice, see ``_noted``.
        spans: stretches of steps in one shape: first step, parameters, FLOPs of a token's
            forward, steps, seconds in them (without events), seconds of the fastest.
        initial: parameters at the start.
    """

    def __init__(
        self, options: PruneOptions, also: Sequence[MutableMapping[str, Tensor]] = ()
    ) -> None:
        self.options, self.also = options, list(also)
        self.sums = SaliencySums(options.saliency, options.memory)
        self.events: list[dict[str, Any]] = []
        self.spans: list[list[float]] = []
        self.seconds = {"saliency": 0.0, "events": 0.0, "steps": 0.0}
        self.initial = 0
        self.parameters = 0
        self.settled = False
        self.keys: list[str] = []
        self._groups: list[Group] = []
        self._gone: dict[str, Tensor] = {}
        self._waiting = 0  # events since the last compaction
        self._spent = 0
        self._next: list[Choice] = []
        self._compensation: Compensation | None = None
        self._started: tuple[int, float] | None = None
        self._ledger: UnitLedger | None = None
        self._model: nn.Module | None = None
        self._planned = False
        # On a CPU the process's own time: other work on the machine does not count.
        self._clock = time.perf_counter

    # -- the model as it is --------------------------------------------------------------------

    def _look(self, model: nn.Module) -> None:
        """Find the units there are; nothing is masked just after."""
        self._groups = find_groups(model, self.options)
        self.sums.follow(self._groups, parameters_of(model))
        self._gone = {g.key: torch.zeros(g.n_units, dtype=torch.bool) for g in self._groups}
        self._ledger = UnitLedger(model, self._groups, self.options.context / 2)
        self._waiting = 0

    @property
    def groups(self) -> list[Group]:
        """The units that may go, in the model as it is."""
        return self._groups

    def _now(self) -> UnitLedger:
        assert self._ledger is not None
        return self._ledger

    def begin(self, at: Training) -> None:
        """See ``Hook``."""
        if at.settings.shard and at.accelerator.num_processes > 1:
            raise UsageError(
                "surgery needs whole weights in every process, and sharded ones are slices",
                field="shard",
                value=True,
                fix="leave shard out: data parallel training works",
            )
        if next(at.model.parameters()).device.type == "cpu":
            self._clock = time.process_time
        if self._model is None:
            self.prepare(at.model)
        if self._planned:
            self._prepare_cut(at)
        else:
            self._new_span(at.step)
            self._plan(at)
        self.parameters = self._now().now().parameters

    def prepare(self, model: nn.Module) -> None:
        """Find the units of a model that was not trained yet.

        Raises:
            UsageError: a kind it cannot lose, or a budget that cannot be reached.
        """
        self._model = model
        self._look(model)
        self.initial = self._now().now().parameters
        self.keys = [g.key for g in self._groups]
        refuse_unreachable(self._groups, self._now(), self.options)

    # -- every step ----------------------------------------------------------------------------

    def before_forward(self, at: Training) -> None:
        """See ``Hook``."""
        if self._started is None or self._started[0] != at.step:
            self._started = (at.step, self._clock())
        if self._compensation is not None:
            self._compensation.look()

    def after_backward(self, at: Training) -> None:
        """See ``Hook``: the step's gradients, summed over processes, not yet clipped."""
        if self._compensation is not None:
            self._compensation.rest()
        if self._waiting:
            silence_gradients(at.model, self._groups, self._gone)
        if self.settled:
            return
        if at.accelerator.scaler is not None and not _finite(at):
            return  # the scaled loss overflowed: the step will be skipped, and says nothing
        device = next(iter(at.named.values())).device
        if device.type == "cuda":  # else the clock would count the backward's end
            torch.cuda.synchronize(device)
        start = self._clock()
        self.sums.add()
        self.seconds["saliency"] += self._clock() - start

    def after_step(self, at: Training) -> None:
        """See ``Hook``: cut what was planned, and plan what goes after the next step."""
        now = self._clock()
        if self._started is not None and self._started[0] == at.step - 1:
            passed = now - self._started[1]
            self.seconds["steps"] += passed
            self.spans[-1][3] += 1
            self.spans[-1][4] += passed
            self.spans[-1][5] = min(self.spans[-1][5] or passed, passed)
        if self._next:
            self._execute(at)
            self._new_span(at.step)
        self._plan(at)
        self.seconds["events"] += self._clock() - now

    def end(self, at: Training) -> None:
        """See ``Hook``."""
        if self._compensation is not None:
            self._compensation.release()
        if self._waiting:
            self._compact(at)

    def abort(self, at: Training, reverted: bool) -> None:
        """See ``Hook``: no zeros, no masked norms and no look at inputs are left in the model."""
        if self._compensation is not None:
            self._compensation.release()
        if not self._waiting:
            return
        if not reverted:
            self._compact(at)
            return
        for group in self._groups:
            if group.kind == "stem":
                for norm in stem_norms(at.model, group).values():
                    see_all(norm)
        unmask_norms(at.model)
        self._look(at.model)

    def metrics(self) -> dict[str, Any]:
        """See ``Hook``."""
        return {"parameters": self.parameters}

    def _new_span(self, step: int) -> None:
        now = self._now().now()
        if self.spans and self.spans[-1][3] == 0:
            self.spans.pop()
        self.spans.append([step, now.parameters, now.flops, 0, 0.0, 0.0])

    # -- planning ------------------------------------------------------------------------------

    def _plan(self, at: Training) -> None:
        """Choose what goes after the step that comes, so that its forward can be looked at."""
        self._next, self._compensation, self._planned = [], None, True
        step, schedule, budget = at.step + 1, self.options.schedule, self.options.budget
        if self.settled or not (schedule.due(step) or step > schedule.stop):
            return
        if self.sums.weight == 0:  # every step since the last event was skipped: wait for one
            return
        chooser = Chooser(
            self._groups, self._scores(at), {k: g.numpy() for k, g in self._gone.items()},
            copy(self._now()),  # its arrays are replaced, never written to
            self.options.rules,
        )  # fmt: skip
        while not chooser.settled(budget):
            if not self._due(step, chooser):
                break
            choice = chooser.choose(budget)
            if choice is None:
                break
            self._spent += self._channels(choice)
            self._next.append(choice)
        self.settled = chooser.settled(budget)
        if self._next:
            self.sums.restart()
            self._prepare_cut(at)

    def _prepare_cut(self, at: Training) -> None:
        """Look at the inputs of what will lose columns after the next step."""
        if self._next and self.options.second_order:
            self._compensation = Compensation(
                at.model, self._groups, joint(self._next), self._gone,
                tokens=self.options.hessian_tokens, windows=at.settings.batch,
                damping=self.options.damping, solver=self.options.solver,
            )  # fmt: skip

    def _due(self, step: int, chooser: Chooser) -> bool:
        schedule = self.options.schedule
        if step >= schedule.stop:
            return True
        if schedule.pace == "every_n_batches":
            return self._spent < schedule.channels(step)
        allowed = schedule.allowed(step, self.initial, self.options.budget)
        return chooser.ledger.now().parameters > allowed

    def _channels(self, choice: Choice) -> int:
        """What a choice counts at the fixed pace: a head as many channels as it has."""
        group = next(g for g in self._groups if g.key in choice.units)
        if type_of(group) != "head":
            return 1
        return group.heads * group.head_dim * group.even

    def _scores(self, at: Training) -> dict[str, np.ndarray]:
        """The same numbers in every process, so that every process takes the same units."""
        scores = self.sums.scores()
        if at.accelerator.num_processes > 1:
            device = next(at.model.parameters()).device
            flat = torch.cat([scores[g.key] for g in self._groups]).to(device)
            torch.distributed.broadcast(flat, 0)
            parts = flat.cpu().split([g.n_units for g in self._groups])
            scores = {g.key: part for g, part in zip(self._groups, parts, strict=True)}
        return {key: score.numpy() for key, score in scores.items()}

    # -- an event ------------------------------------------------------------------------------

    def _execute(self, at: Training) -> None:
        if self._compensation is not None:
            self._compensation.apply(at.accelerator.num_processes)
            self._compensation = None
        for choice in self._next:
            self._now().take({k: len(u) for k, u in choice.units.items()})
            self.events.append(self._noted(choice, at.step))
        chosen = joint(self._next)
        self._next = []
        self.parameters = self._now().now().parameters
        self._waiting += 1
        every = self.options.compact_every
        if self.settled or (every and self._waiting >= every):
            self._mark(chosen)
            self._compact(at)
        else:
            mask_units(at.model, self._groups, chosen, self._gone, at.optimizer, self.also)
            self._mark(chosen)

    def _mark(self, chosen: dict[str, list[int]]) -> None:
        for key, units in chosen.items():
            self._gone[key][units] = True

    def _compact(self, at: Training) -> None:
        """Cut out what is gone: weights, gradients, moments, averages and accumulators."""
        mask = StructuredMask()
        for group in self._groups:
            if self._gone[group.key].any():
                mask.remove(group, self._gone[group.key])
                self.sums.cut(group.key, self._gone[group.key])
        shrink(at.model, mask, optimizers=[at.optimizer], also=self.also)
        self._look(at.model)

    def _noted(self, choice: Choice, step: int) -> dict[str, Any]:
        """A choice for the record; units by their original numbers, groups by their place in ``keys``."""
        by_key = {g.key: g for g in self._groups}
        units = [
            [self.keys.index(key), by_key[key].original[chosen].reshape(-1).tolist()]
            for key, chosen in choice.units.items()
        ]
        return {
            "step": step,
            "type": choice.type,
            "units": units,
            "saliency": choice.saliency,
            "price": choice.price,
            "rivals": dict(choice.rivals),
            "parameters": self._now().now().parameters,
        }

    # -- checkpoints ---------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """See ``Hook``: the shape manifest, what is masked, what is planned, the accumulators."""
        if self._model is None:  # before the first step: there is nothing to keep
            return {}
        record = {
            "planned": self._planned,
            "events": self.events,
            "spans": self.spans,
            "seconds": self.seconds,
            "initial": self.initial,
            "keys": self.keys,
            "waiting": self._waiting,
            "weight": self.sums.weight,
            "settled": self.settled,
            "spent": self._spent,
            "next": [asdict(choice) for choice in self._next],
        }
        words = bytearray(json.dumps(record).encode())
        out = {"record": torch.frombuffer(words, dtype=torch.uint8).clone()}
        for key, gone in self._gone.items():
            out[f"masked/{key}"] = gone.to(torch.uint8)
            out[f"saliency/{key}"] = self.sums.sums[key].clone()
        for key, gone in (structure_of(self._model) or StructuredMask()).gone.items():
            out[f"cut/{key}"] = gone.to(torch.uint8)
        for name, (norm, field_) in self._epsilons().items():
            out[f"eps/{name}"] = torch.tensor(getattr(norm, field_), dtype=torch.float64)
        return out

    def restore(self, state: dict[str, Tensor], at: Training) -> None:
        """See ``Hook``: the surgery done so far, on the model as it was at the start."""
        if not state:
            return
        self._model = at.model
        parts: dict[str, dict[str, Tensor]] = {"cut": {}, "masked": {}, "saliency": {}, "eps": {}}
        for full, tensor in state.items():
            kind, _, name = full.partition("/")
            if kind in parts:
                parts[kind][name] = tensor
        before = structure_of(at.model)
        cut = StructuredMask({k: t.bool() for k, t in parts["cut"].items()})
        if cut.gone and (before is None or before != cut):
            shrink(at.model, cut, optimizers=[at.optimizer], also=self.also)
        self.sums.sums = {}  # those of the model as it was before
        self._look(at.model)
        record = json.loads(bytes(state["record"].tolist()).decode())
        for name in ("events", "spans", "seconds", "initial", "keys", "settled"):
            setattr(self, name, record[name])
        self._waiting, self._spent = record["waiting"], record["spent"]
        self._planned = record["planned"]
        self._next = [Choice(**choice) for choice in record["next"]]
        self.sums.weight = record["weight"]
        for group in self._groups:
            self.sums.sums[group.key] = parts["saliency"][group.key].clone()
            self._gone[group.key] = parts["masked"][group.key].bool()
            self._now().take({group.key: int(self._gone[group.key].sum())})
            if group.kind == "stem":
                view_masked(at.model, group, self._gone[group.key])
        for name, (norm, field_) in self._epsilons().items():
            setattr(norm, field_, float(parts["eps"][name]))

    def _epsilons(self) -> dict[str, tuple[nn.Module, str]]:
        """Where the norms of the residual stream keep their eps, which surgery scales."""
        assert self._model is not None
        stem = next((g for g in self._groups if g.kind == "stem"), None)
        if stem is None:
            return {}
        norms = stem_norms(self._model, stem)
        return {
            name: (norm, field_)
            for name, norm in norms.items()
            for field_ in ("variance_epsilon", "eps")
            if is_rms(norm) and hasattr(norm, field_)
        }


def _finite(at: Training) -> bool:
    """Whether every gradient is."""
    norm = nn.utils.get_total_norm([p.grad for p in at.named.values() if p.grad is not None])
    return bool(torch.isfinite(norm))


def joint(choices: Sequence[Choice]) -> dict[str, list[int]]:
    """Units of several choices together, by group."""
    out: dict[str, list[int]] = {}
    for choice in choices:
        for key, units in choice.units.items():
            out.setdefault(key, []).extend(units)
    return out
