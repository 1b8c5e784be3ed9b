"""PERP's reconstruction: each pruned block is trained to give what its dense original gives.

Block after block, on calibration windows: the inputs X of a block are the outputs of the
blocks before it, pruned and already repaired; the wanted outputs are Y = dense block (X);
what is trained is a part of the block (an adapter, norms, biases, or all of it), to make
||block(X) - Y||² small. Then adapters are merged and the inputs move on. Nothing is
backpropagated beyond a block: one block, its gradients and the hidden states are what has to
be in memory. A block that came out no better than it went in is put back.

Source: Zimmer, Andoni, Spiegel and Pokutta, PERP, arXiv:2312.15230; wanted outputs taken from
the dense model's own stream, and single matrices, as in arXiv:2510.14444.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from secateur.data.windows import Windows
from secateur.errors import UsageError
from secateur.evidence.replay import Replay, Residency, _Stop
from secateur.models.anatomy import Block, Matrix, ModelView
from secateur.models.capture import capture_inputs
from secateur.models.state import evaluating
from secateur.progress import SILENT, Progress
from secateur.training.adapters import AdapterOptions, Adapters
from secateur.training.finished import FinishedBlocks
from secateur.training.local import Dense, Local, fit_local, in_float32
from secateur.training.low_rank import MASKED, Kind
from secateur.training.masked import KeepZeros, check_masks, prove_zeros
from secateur.training.perp import parts, refuse_filling
from secateur.training.settings import TrainSettings
from secateur.training.subsets import choose

if TYPE_CHECKING:
    from secateur.training.recoveries import Task

SAMPLES = 128
"""Windows gone round in every block, as PERP's code has it."""
UNITS = ("block", "matrix")
STREAMS = ("pruned", "dense")


@dataclass
class Reconstruction:
    """Repairs the blocks of ``view`` one after another, in place.

    Args:
        masks: matrix name -> (d_out, d_in) bool, True where the weight is gone, and stays gone.
        dense: where wanted outputs come from.
        settings: of each block's training; ``batch`` is in windows.
        train: subsets and at most one kind of adapter (``perp.parts``); a head has no block.
        adapter: options of that adapter.
        unit: train a whole ``block`` at a time, or each group of matrices with a common input.
        stream: wanted outputs are the dense block's on what the ``pruned`` model feeds it, or on
            what the ``dense`` model does.
        resident: makes a block of ``view`` present.
        written: called with each repaired block while it is present, also on resuming.
        folder: where finished blocks are kept; the same call goes on from there.
        identity: what else they depend on.
    """

    view: ModelView
    masks: Mapping[str, Tensor]
    dense: Dense
    settings: TrainSettings
    train: Sequence[str]
    adapter: Mapping[str, Any] = field(default_factory=dict)
    unit: Literal["block", "matrix"] = "block"
    stream: Literal["pruned", "dense"] = "pruned"
    resident: Residency | None = None
    written: Any = None
    folder: Path | None = None
    identity: Mapping[str, Any] = field(default_factory=dict)
    progress: Progress = SILENT

    def __post_init__(self) -> None:
        subsets, self.kind = parts(self.train)
        if self.kind is not None:
            self._options(0)  # refused now rather than at the first block
        self.subsets = [name for name in subsets if name != "head"]
        refuse_filling(self.kind, any(bool(mask.any()) for mask in self.masks.values()))
        refuse_senseless(self.train, self.unit, self.stream)
        self._same_blocks()

    def _same_blocks(self) -> None:
        ours, theirs = self.view, self.dense.view
        for what, mine, other in (
            ("blocks", len(ours.blocks), len(theirs.blocks)),
            ("hidden size", ours.hidden_size, theirs.hidden_size),
        ):
            if mine != other:
                raise UsageError(
                    f"the dense model has {what} {other}, the cut one {mine}",
                    field="teacher",
                    value=type(theirs.model).__name__,
                    fix="give the very model that was cut; blocks taken out whole cannot be rebuilt",
                )

    def run(self, data: Windows) -> dict[str, Any]:
        """Repair every block on ``data``; a JSON-able record.

        Raises:
            NumericsError: a loss or an activation that is not finite; finished blocks stay.
            VerificationError: a zero was lost.
        """
        started = time.perf_counter()
        world = dist.get_world_size() if dist.is_initialized() else 1
        rank = dist.get_rank() if dist.is_initialized() else 0
        if len(data) < world:
            raise UsageError(
                f"{world} processes have nothing to share",
                field="recovery.samples",
                value=len(data),
                fix="more text, or fewer processes",
            )
        per_process = max(1, self.settings.batch // world)
        micro = min(self.settings.micro_batch or per_process, per_process)
        self._per_step = max(1, per_process // micro)
        done = FinishedBlocks(self.folder, self._identity(data, world), leads=rank == 0)
        records: list[dict[str, Any]] = []
        kept_random = torch.random.fork_rng(devices=[])
        with evaluating(self.view.model), evaluating(self.dense.view.model), kept_random:
            rows = slice(rank, None, world)
            self.replay = Replay(
                self.view,
                data.ids[rows],
                None if data.mask is None else data.mask[rows],
                batch_size=micro,
                device=self._device(),
                resident=self.resident,
            ).start()
            stream = list(self.replay.hidden)
            total = len(self.view.blocks) * self.settings.steps
            with self.progress.stage("reconstructing", total=total, unit="steps") as advance:
                self._advance: Any = advance
                for block, dense in zip(self.view.blocks, self.dense.view.blocks, strict=True):
                    record, stream = self._one(block, dense, stream, done)
                    records.append(record)
        return self._summary(records, time.perf_counter() - started, len(data))

    def _device(self) -> torch.device:
        places = (p.device for p in self.view.model.parameters())
        return next((d for d in places if d.type != "meta"), torch.device("cpu"))

    def _one(
        self, block: Block, dense: Block, stream: list[Tensor], done: FinishedBlocks
    ) -> tuple[dict[str, Any], list[Tensor]]:
        """One block: wanted outputs, training unless it is done, inputs of the next."""
        replay = self.replay
        record = done.record(block)
        follow = self.stream == "dense"
        wanted: list[Tensor] = []
        if record is None or follow:
            given = stream if follow else replay.hidden
            with self.dense.present(dense), torch.no_grad():
                wanted = [
                    replay.checked(dense, replay.run(dense, b, x)) for b, x in enumerate(given)
                ]
        with replay.resident(block):
            if record is None:
                record, outputs = self._repair(block, dense, wanted)
                if block is self.view.blocks[0]:
                    size = sum(p.numel() for p in block.module.parameters())
                    share = record["trained"] / max(1, size)
                    self.progress.note(f"training {share:.3%} of each block's parameters")
                done.save(block, record)
            else:
                done.restore(block)
                self._advance(self.settings.steps)
                outputs = replay.advance(block)
            if self.written is not None:
                self.written(block)
        replay.hidden = outputs
        return record, wanted if follow else stream

    def _repair(
        self, block: Block, dense: Block, wanted: list[Tensor]
    ) -> tuple[dict[str, Any], list[Tensor]]:
        """Train a block; its record, and its outputs on the stream."""
        started = time.perf_counter()
        replay = self.replay
        one = ModelView(self.view.model, self.view.path, [block], self.view.family)
        masks = {m.name: self.masks[m.name] for m in block.matrices if m.name in self.masks}
        zeros = check_masks(one, masks)
        whole = Local(block.name, lambda b: replay.run(block, b), wanted, replay.keep)
        before = whole.error()
        light = self._light(block)
        kept = [
            (p, p.detach().clone()) for p in block.module.parameters() if p.dim() == 1 or not light
        ]
        if self.unit == "block":
            trained, losses = self._train(one, masks, whole, before if light else None)
        else:
            with self.dense.present(dense):
                trained, losses = self._train_matrices(one, dense, masks)
        outputs = replay.advance(block)
        after = whole.error(outputs)
        better = after <= before
        if not better:
            with torch.no_grad():
                for parameter, value in kept:
                    parameter.copy_(value)
            outputs = replay.advance(block)
        prove_zeros(one, masks, zeros)
        record = {
            "block": block.index,
            "before": before,
            "after": after if better else before,
            "kept": better,
            "trained": trained,
            "zeros": zeros,
            "first_loss": losses[0] if losses else None,
            "last_loss": losses[-1] if losses else None,
            "seconds": round(time.perf_counter() - started, 3),
        }
        return record, outputs

    def _light(self, block: Block) -> bool:
        """True if no matrix has to be copied to be put back.

        Either none changes, or only by an adapter whose error is known before it is merged
        (what is merged is what was trained, and is not rounded).
        """
        vectors = set(self.subsets) <= {"norms", "biases"}
        exact = self.kind is None or self.kind in MASKED
        whole = all(p.dtype == torch.float32 for p in block.module.parameters())
        return self.unit == "block" and vectors and exact and whole

    def _train(
        self,
        one: ModelView,
        masks: Mapping[str, Tensor],
        local: Local,
        limit: float | None,
    ) -> tuple[int, list[float]]:
        """Train the chosen part of one block, merge; (parameters trained, losses).

        With ``limit`` an adapter that leaves a larger error than that is not merged.
        """
        block = one.blocks[0]
        chosen = choose(one, self.subsets, within=block.module)
        adapters = None
        try:
            if self.kind is not None:
                adapters = Adapters.attach(one, masks, self._options(block.index))
            named = {n: p for n, p in block.module.named_parameters() if p.requires_grad}
            trained = sum(p.numel() for p in named.values())
            with in_float32(named.values()):
                losses = self._fit(local, named, one, masks, adapters)
            if adapters is not None:
                if limit is None or local.error() <= limit:
                    adapters.merge()
                else:
                    adapters.detach()
            chosen.finish()
        except BaseException:
            if adapters is not None:
                adapters.detach()
            chosen.abandon()
            raise
        finally:
            one.model.requires_grad_(False)
        return trained, losses

    def _train_matrices(
        self, one: ModelView, dense: Block, masks: Mapping[str, Tensor]
    ) -> tuple[int, list[float]]:
        """Group after group of matrices with a common input, each on what it now sees."""
        block, trained, losses = one.blocks[0], 0, []
        twins = {m.name: m.module for m in dense.matrices}
        groups = self._groups(block)
        for group in groups:
            inputs = self._inputs(block, group[0])
            one.blocks = [replace(block, matrices=group)]
            with torch.no_grad():
                wanted = [torch.cat([twins[m.name](x) for m in group], -1) for x in inputs]
            modules = {m.name: m.module for m in group}
            adapters = None
            one.model.requires_grad_(False)
            try:
                if self.kind is not None:
                    adapters = Adapters.attach_to(
                        one.model, group, masks, self._options(block.index)
                    )
                    modules = dict(adapters.modules)
                named = self._chosen_of(group, adapters)
                if not named:  # biases, of matrices that have none
                    self._advance(self.settings.steps / len(groups))
                    continue
                trained += sum(p.numel() for p in named.values())

                def forward(batch: int, inputs: Any = inputs, modules: Any = modules) -> Tensor:
                    return torch.cat([module(inputs[batch]) for module in modules.values()], -1)

                local = Local(group[0].name, forward, wanted, self.replay.keep)
                with in_float32(named.values()):
                    losses += self._fit(local, named, one, masks, adapters, 1 / len(groups))
                if adapters is not None:
                    adapters.merge()
            except BaseException:
                if adapters is not None:
                    adapters.detach()
                raise
            finally:
                one.model.requires_grad_(False)
                one.blocks = [block]
        if not trained:
            raise UsageError(
                f"the matrices of '{block.name}' have nothing of that kind",
                field="train",
                value=list(self.train),
                fix="an adapter, or all",
            )
        return trained, losses

    def _groups(self, block: Block) -> list[list[Matrix]]:
        """Matrices with a common input, in the order of use; fused experts have no layer."""
        leaders: dict[int, list[Matrix]] = {}
        alive = []  # an id is only unique while its tensor lives

        def see(matrix: Matrix, x: Tensor) -> None:
            if matrix.index is None:
                alive.append(x)
                leaders.setdefault(id(x), []).append(matrix)

        with capture_inputs(block.matrices, see), torch.no_grad():
            self.replay.run(block, 0)
        return list(leaders.values())

    def _inputs(self, block: Block, matrix: Matrix) -> list[Tensor]:
        """What ``matrix`` now sees, per batch; each forward ends there."""
        found: list[Tensor] = []

        def see(_: Matrix, x: Tensor) -> None:
            found.append(x.detach())
            raise _Stop

        for batch in range(len(self.replay.hidden)):
            with capture_inputs([matrix], see), torch.no_grad():
                try:
                    self.replay.run(block, batch)
                except _Stop:
                    continue
        return found

    def _chosen_of(
        self, group: Sequence[Matrix], adapters: Adapters | None
    ) -> dict[str, nn.Parameter]:
        """What is trained of a group of matrices."""
        named = {} if adapters is None else adapters.parameters()
        for matrix in group:
            own = matrix.module._parameters
            if "all" in self.subsets:
                named |= {f"{matrix.name}.{n}": p for n, p in own.items() if p is not None}
            elif "biases" in self.subsets and own.get("bias") is not None:
                named[f"{matrix.name}.bias"] = matrix.module.bias  # type: ignore[assignment]
        for parameter in named.values():
            parameter.requires_grad_(True)
        return named

    def _options(self, index: int) -> AdapterOptions:
        options = AdapterOptions.of(cast(Kind, self.kind), self.adapter)
        return replace(options, seed=options.seed + index, head=False)

    def _fit(
        self,
        local: Local,
        named: Mapping[str, nn.Parameter],
        view: ModelView,
        masks: Mapping[str, Tensor],
        adapters: Adapters | None,
        share: float = 1.0,
    ) -> list[float]:
        half = next((t.dtype for t in local.targets if t.dtype != torch.float32), None)
        device = self.replay.device.type
        hooks = [KeepZeros(view, masks), *(adapters.hooks() if adapters is not None else [])]
        torch.manual_seed(self.settings.seed)  # dropout, the same in every process and on resuming
        with torch.autocast(device, dtype=half or torch.bfloat16, enabled=half is not None):
            return fit_local(
                local,
                named,
                self.settings,
                per_step=self._per_step,
                hooks=hooks,
                model=view.model,
                advance=lambda steps, detail: self._advance(steps * share, detail),
            )

    def _identity(self, data: Windows, world: int) -> dict[str, Any]:
        return {
            **self.settings.identity(),
            "train": list(self.train),
            "adapter": dict(self.adapter),
            "unit": self.unit,
            "stream": self.stream,
            "data": data.fingerprint,
            "processes": world,
            **self.identity,
        }

    def _summary(
        self, records: list[dict[str, Any]], seconds: float, windows: int
    ) -> dict[str, Any]:
        total = sum(p.numel() for p in self.view.model.parameters())
        trained = sum(r["trained"] for r in records)
        return {
            "method": "reconstruct",
            "train": list(self.train),
            "unit": self.unit,
            "stream": self.stream,
            "windows": windows,
            "steps": self.settings.steps,
            "trained": trained,
            "total": total,
            "share": trained / max(1, total),
            "zeros": sum(r["zeros"] for r in records),
            "seconds": round(seconds, 3),
            "blocks": records,
        }


def refuse_senseless(train: Sequence[str], unit: str, stream: str) -> None:
    """Requests no reconstruction can meet, whatever the model.

    Raises:
        UsageError: naming the field.
    """
    subsets, kind = parts(train)
    if kind is None and set(subsets) <= {"head"}:
        raise UsageError(
            "a head lies in no block, so there is nothing to reconstruct",
            field="train",
            value=list(train),
            fix="add norms, biases, all or an adapter, or retrain the head with perp",
        )
    for name, value, known in (("unit", unit, UNITS), ("stream", stream, STREAMS)):
        if value not in known:
            raise UsageError("unknown", field=name, value=value, fix=f"one of {known}")
    if unit == "matrix" and {"norms", "rescale"} & set(subsets):
        raise UsageError(
            "a single matrix holds no norms",
            field="train",
            value=list(train),
            fix="an adapter, biases or all; or unit: block",
        )
    if unit == "matrix" and stream == "dense":
        raise UsageError(
            "a single matrix is fitted to the dense matrix on the inputs it now sees",
            field="stream",
            value="dense",
            fix="unit: block, or stream: pruned",
        )


def recover(task: Task) -> dict[str, Any]:
    """The recovery ``reconstruct`` of a cut model; ``settings.steps`` are those of each block.

    Raises:
        UsageError: there is no dense model to learn from.
    """
    if task.teacher is None:
        raise UsageError(
            "reconstruction needs the model as it was before the cut",
            field="teacher",
            fix="give the run's folder, or --dense MODEL",
        )
    how = dict(task.reconstruction)
    samples = int(how.pop("samples", SAMPLES))
    data, mask = task.data, task.data.mask
    if len(data) > samples:
        rows = slice(0, samples)  # they come in a drawn order already
        data = Windows(data.ids[rows], None if mask is None else mask[rows], data.record)
    return Reconstruction(
        task.view,
        task.masks,
        Dense(ModelView.of(task.teacher())),
        task.settings,
        task.train,
        adapter=task.adapter,
        folder=task.folder,
        identity=task.identity,
        progress=task.progress,
        **how,
    ).run(data)
