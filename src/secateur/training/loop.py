"""The training loop every procedure shares, on Hugging Face Accelerate.

Only parameters that require gradients are trained, hold optimizer state and are kept in
checkpoints. A step's windows follow from its number, and so does everything drawn at random
in it: a training that was killed goes on from its last checkpoint with the losses it would
have had, and N processes walk through the same global batches as one.

``Hook`` is the way to carry a procedure of its own (masks kept at zero, drawn masks, surgery
on the way); ``loss`` says what is minimised.
"""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from secateur.data.batches import Batch, Data
from secateur.errors import NumericsError, UsageError
from secateur.files import told_plainly
from secateur.progress import SILENT, Progress
from secateur.training import checkpoint
from secateur.training.hooks import (
    Fitted,
    Hook,
    Loss,
    Training,
    make_optimizer,
    next_token_loss,
    trainable,
)
from secateur.training.precision import Scaling, accelerator_for
from secateur.training.settings import TrainSettings
from secateur.training.sharding import alike, refuse_unshardable, shard, take_over, whole

__all__ = [
    "Batch",
    "Fitted",
    "Hook",
    "Loss",
    "Training",
    "fit",
    "make_optimizer",
    "next_token_loss",
    "trainable",
]


def fit(
    model: nn.Module,
    data: Data,
    settings: TrainSettings,
    *,
    loss: Loss = next_token_loss,
    hooks: Sequence[Hook] = (),
    validate: Callable[[], float] | None = None,
    options: Callable[[str, nn.Parameter], Mapping[str, Any]] | None = None,
    folder: Path | None = None,
    fresh: bool = False,
    identity: Mapping[str, Any] | None = None,
    blocks: Sequence[str] = (),
    progress: Progress = SILENT,
    label: str = "training",
) -> Fitted:
    """Train the parameters of ``model`` that require gradients, in place.

    Args:
        data: windows or images to draw from, in the order they give.
        loss: what is minimised.
        hooks: called in this order.
        validate: a figure to make small, measured every ``settings.validate_every`` steps;
            with ``settings.patience`` the best state wins.
        options: per parameter, what its optimizer group differs in (``lr_scale`` multiplies the
            rate, ``weight_decay`` replaces the settings').
        folder: where the checkpoint and ``metrics.jsonl`` lie; a training already there goes on.
        fresh: throw away what lies there.
        identity: what else the result depends on; another one is refused on resume.
        blocks: names of the modules that ``settings.shard`` gathers one at a time.

    Raises:
        UsageError: nothing to train; the folder holds a training with other settings.
        NumericsError: the loss or the gradient is not finite; the model is back at its last
            good state, which is also what the checkpoint holds.
    """
    named = trainable(model)
    if not named:
        raise UsageError("no parameter is to be trained", field="train", value=[])
    accelerator = accelerator_for(model, settings)
    device = next(model.parameters()).device
    sharded = settings.shard and accelerator.num_processes > 1
    worker = model
    if sharded:
        refuse_unshardable(settings, validate is not None)
        worker = shard(model, blocks)
        named = trainable(worker)
    at = Training(
        worker, settings, named, make_optimizer(named, settings, options), accelerator,
        options=options,
    )  # fmt: skip
    try:
        return _train(
            at, data, loss, tuple(hooks), validate, folder, fresh, identity or {}, progress, label
        )
    finally:
        if sharded:
            take_over(model, at.model, device)


def _train(
    at: Training,
    data: Data,
    loss: Loss,
    hooks: tuple[Hook, ...],
    validate: Callable[[], float] | None,
    folder: Path | None,
    fresh: bool,
    identity: Mapping[str, Any],
    progress: Progress,
    label: str,
) -> Fitted:
    """``fit`` once everything is in place."""
    settings = at.settings
    run = _Run(at, data, loss, hooks, validate, folder, identity)
    with _own_randomness(), _patient_interrupt() as interrupted, run.leaving_order():
        run.restore(fresh)
        for hook in hooks:
            hook.begin(at)
        with progress.stage(label, total=settings.steps, unit="steps") as advance:
            advance(at.step)
            started = time.perf_counter()
            while at.step < settings.steps and not run.stopped_early:
                value = run.step()
                passed = time.perf_counter() - started
                steps = at.step - run.fitted.resumed
                speed = steps * run.tokens_per_step / passed
                of = f"{run.fitted.tokens:,} of {run.tokens_per_step * settings.steps:,}"
                advance(1, f"loss {value:.4f}, {of} {data.unit}, {speed:,.0f}/s")
                run.fitted.seconds = run.seconds_before + passed
                run.log(value, speed)
                run.look()
                if interrupted():
                    run.save()
                    raise KeyboardInterrupt
        run.finish()
        for hook in hooks:
            hook.end(at)
    return run.fitted


class _Run:
    """One call of ``fit``: its position, its best state and its files."""

    def __init__(
        self,
        at: Training,
        data: Data,
        loss: Loss,
        hooks: tuple[Hook, ...],
        validate: Callable[[], float] | None,
        folder: Path | None,
        identity: Mapping[str, Any],
    ) -> None:
        self.at, self.loss, self.hooks, self.validate = at, loss, hooks, validate
        self.data, self.folder = data, folder
        self.order = data.order(at.settings.seed)
        self.device = next(iter(at.named.values())).device
        self.scaling = Scaling(at.accelerator.scaler)
        self.tokens_per_step = at.settings.batch * data.length
        total = sum(p.numel() for p in at.model.parameters())
        trained = sum(p.numel() for p in at.named.values())
        self.fitted = Fitted(0, [], trained, total, 0, 0.0)
        self.identity = {
            **at.settings.identity(),
            **identity,
            "data": data.fingerprint,
            "trained": {n: list(p.shape) for n, p in at.named.items()},
            "processes": at.accelerator.num_processes,
        }
        self.best: dict[str, Tensor] = {}
        self.best_value, self.worse, self.stopped_early = math.inf, 0, False
        self.seconds_before = 0.0
        self.reverted = False
        self.shapes = self._shapes()
        # Without a folder the last good state is kept in memory.
        self.good: dict[str, Tensor] = {} if folder else self._copied()

    @contextmanager
    def leaving_order(self) -> Iterator[None]:
        """Whatever ends the training early, hooks put the model in order."""
        try:
            yield
        except BaseException:
            for hook in self.hooks:
                hook.abort(self.at, self.reverted)
            raise

    @property
    def leads(self) -> bool:
        return bool(self.at.accelerator.is_main_process)

    @torch.no_grad()
    def _put(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            parameter = self.at.named[name]
            parameter.copy_(value if isinstance(value, DTensor) else alike(value, parameter))

    def _copied(self) -> dict[str, Tensor]:
        return {n: p.detach().clone() for n, p in self.at.named.items()}

    # -- one step ------------------------------------------------------------------------------

    def step(self) -> float:
        """Accumulate, reduce, clip, update; returns the loss over the global batch."""
        at, settings = self.at, self.at.settings
        world, rank = at.accelerator.num_processes, at.accelerator.process_index
        rows = self._rows()
        everyones = self.data.scored(rows)
        mine = rows[rank::world]
        torch.manual_seed(_mixed(settings.seed, at.step, rank))
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        size = settings.micro_batch or max(1, len(mine))
        for start in range(0, len(mine), size):
            batch = self.data.batch(mine[start : start + size]).to(self.device)
            for hook in self.hooks:
                hook.before_forward(at)
            # Weighted by what is scored, so that no split into forwards or processes matters.
            share = batch.predicted / max(1, everyones)
            with at.accelerator.autocast():
                value = self.loss(at.model, batch) * share
            at.accelerator.backward(value)
            total += value.detach().double()
        self._reduce(total)
        self.scaling.unscale(at.optimizer)
        for hook in self.hooks:
            hook.after_backward(at)
        loss = float(total)
        trained = list(at.named.values())
        norm = nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
        size_of_gradient = float(whole(norm))
        overflowed = not math.isfinite(size_of_gradient) and not self.scaling.gives
        if not math.isfinite(loss) or overflowed:
            self._diverged(loss)
        if settings.clip is not None:
            nn.utils.clip_grads_with_norm_(trained, settings.clip, norm)
        for group in at.optimizer.param_groups:
            group["lr"] = settings.rate(at.step) * group["lr_scale"]
        self.scaling.step(at.optimizer)
        at.optimizer.zero_grad(set_to_none=True)
        at.step += 1
        for hook in self.hooks:
            hook.after_step(at)
        self._follow_shapes()
        self.fitted.losses.append(loss)
        self.fitted.steps = at.step
        self.fitted.tokens = at.step * self.tokens_per_step
        return loss

    def _rows(self) -> list[int]:
        """The step's samples; where there are no more, what was trained so far is kept."""
        try:
            return self.order.rows(self.at.step * self.at.settings.batch, self.at.settings.batch)
        except UsageError:
            self.save()
            raise

    def _shapes(self) -> dict[str, torch.Size]:
        return {n: p.shape for n, p in self.at.named.items()}

    def _follow_shapes(self) -> None:
        """After surgery on the way there is no going back to states of other shapes."""
        shapes = self._shapes()
        if shapes == self.shapes:
            return
        self.shapes = shapes
        self.best, self.best_value, self.worse = {}, math.inf, 0
        if self.folder is None:
            self.good = self._copied()

    def _reduce(self, total: Tensor) -> None:
        """Sum loss and gradients over processes; one message for each type of number."""
        if self.at.accelerator.num_processes == 1:
            return
        torch.distributed.all_reduce(total)
        if self.at.settings.shard:  # summed already, and divided by the number of processes
            for parameter in self.at.named.values():
                if parameter.grad is not None:
                    parameter.grad.mul_(self.at.accelerator.num_processes)
            return
        by_type: dict[torch.dtype, list[nn.Parameter]] = {}
        for parameter in self.at.named.values():
            if parameter.grad is None:  # this process's windows did not reach it
                parameter.grad = torch.zeros_like(parameter)
            by_type.setdefault(parameter.dtype, []).append(parameter)
        for parameters in by_type.values():
            grads = [p.grad for p in parameters if p.grad is not None]
            flat = torch.cat([g.reshape(-1) for g in grads])
            torch.distributed.all_reduce(flat)
            for grad, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
                grad.copy_(part.view_as(grad))

    def _diverged(self, loss: float) -> None:
        """Back to the last good state, and say so."""
        what = "loss"
        if math.isfinite(loss):
            bad = (n for n, p in self.at.named.items() if not _finite_gradient(p))
            what = f"gradient of '{next(bad, 'all parameters together')}'"
        self.at.optimizer.zero_grad(set_to_none=True)
        good, kept = self.good, "the model is as it was before training, or since it was last cut"
        if self.folder is not None:
            found = checkpoint.load(self.folder)
            good = found[0]["parameter"] if found else {}
            if found:
                kept = f"the checkpoint of step {found[1]['step']} is kept"
        if all(good[n].shape == s for n, s in self._shapes().items() if n in good):
            self._put(good)
            self.reverted = self.folder is None
        raise NumericsError(
            f"the {what} is not finite at step {self.at.step + 1}; {kept}",
            field="lr",
            value=self.at.settings.lr,
            fix="a lower rate (a third of it), or a longer warm-up",
        )

    # -- files ---------------------------------------------------------------------------------

    def restore(self, fresh: bool) -> None:
        """Take up the training that lies in the folder, if any."""
        if self.folder is None:
            return
        if fresh and self.leads:
            for name in (checkpoint.FILE, checkpoint.METRICS):
                (self.folder / name).unlink(missing_ok=True)
        self.at.accelerator.wait_for_everyone()
        found = checkpoint.load(self.folder)
        # Nobody writes the first checkpoint before everybody has looked for one.
        self.at.accelerator.wait_for_everyone()
        if found is None:
            self.save()
            return
        tensors, record = found
        checkpoint.refuse_other(record["identity"], self.identity, self.folder)
        for index, hook in enumerate(self.hooks):
            own = f"{index}/"
            hook.restore(
                {n[len(own) :]: t for n, t in tensors["hook"].items() if n.startswith(own)}, self.at
            )
        self._put(tensors["parameter"])
        checkpoint.restore_optimizer(self.at.optimizer, self.at.named, tensors["optimizer"])
        self.at.step = record["step"]
        self.best = tensors["best"]
        self.best_value = math.inf if record["best"] is None else record["best"]
        self.worse, self.stopped_early = record["worse"], record["stopped"]
        self.scaling.restore(record.get("scaling"))
        self.seconds_before = record["seconds"]
        lines = checkpoint.trim_metrics(self.folder, self.at.step) if self.leads else []
        fitted = self.fitted
        fitted.resumed = fitted.steps = self.at.step
        fitted.losses = [row["loss"] for row in lines if "loss" in row]
        fitted.validations = [tuple(pair) for pair in record["validations"]]
        fitted.tokens = self.at.step * self.tokens_per_step
        fitted.seconds = self.seconds_before
        self.shapes = self._shapes()

    def save(self) -> None:
        """Write the checkpoint (rank 0), or remember the good state in memory."""
        if self.folder is None:
            self.good = self._copied()
            return
        record = {
            "identity": json.loads(json.dumps(self.identity)),
            "step": self.at.step,
            "best": None if math.isinf(self.best_value) else self.best_value,
            "worse": self.worse,
            "scaling": self.scaling.state(),
            "stopped": self.stopped_early,
            "seconds": self.fitted.seconds,
            "validations": self.fitted.validations,
        }
        hooked = {
            f"{i}/{n}": t for i, hook in enumerate(self.hooks) for n, t in hook.state().items()
        }
        checkpoint.save(
            self.folder, self.at.named, self.at.optimizer, self.best, hooked, record,
            leads=self.leads,
        )  # fmt: skip
        self.at.accelerator.wait_for_everyone()

    def log(self, loss: float, speed: float) -> None:
        """One line of metrics for the step just done."""
        if self.folder is None or not self.leads:
            return
        rate = self.at.settings.rate(self.at.step - 1)
        row = {"step": self.at.step, "loss": loss, "lr": rate, "tokens_per_second": round(speed, 1)}
        for hook in self.hooks:
            row |= hook.metrics()
        self._append(row)

    def _append(self, row: dict[str, Any]) -> None:
        assert self.folder is not None
        path = self.folder / checkpoint.METRICS
        with told_plainly(path), open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def look(self) -> None:
        """Validate and save when it is time."""
        settings, step = self.at.settings, self.at.step
        last = step == settings.steps
        if self.validate is not None and (step % settings.validate_every == 0 or last):
            value = self.validate()
            self.fitted.validations.append((step, value))
            if self.folder is not None and self.leads:
                self._append({"step": step, "validation": value})
            if value < self.best_value:
                self.best_value, self.worse = value, 0
                if settings.patience is not None:
                    self.best = self._copied()
            else:
                self.worse += 1
                self.stopped_early = settings.patience is not None and (
                    self.worse >= settings.patience
                )
        every = settings.checkpoint_every
        if last or self.stopped_early or (every is not None and step % every == 0):
            self.save()

    def finish(self) -> None:
        """Put the best state back where one was looked for."""
        self.fitted.stopped = "early" if self.stopped_early else "finished"
        self._put(self.best)


def _finite_gradient(parameter: nn.Parameter) -> bool:
    return parameter.grad is None or bool(torch.isfinite(whole(parameter.grad)).all())


# -- surroundings -----------------------------------------------------------------------------


def _mixed(*numbers: int) -> int:
    """One seed of several numbers."""
    mixed = 0x9E3779B97F4A7C15
    for number in numbers:
        mixed = ((mixed ^ number) * 0xBF58476D1CE4E5B9 + 1) % 2**63
    return mixed


@contextmanager
def _own_randomness() -> Iterator[None]:
    """Every step seeds torch for itself; the caller's generators go on as they were."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        yield


@contextmanager
def _patient_interrupt() -> Iterator[Callable[[], bool]]:
    """The first Ctrl-C lets the step end and the checkpoint be written, the second does not."""
    asked = False

    def note(signum: int, frame: Any) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)
