"""Block after block: gather what a group's reader sees, decide, repair, zero, move on.

The blocks' replay of calibration data is that of the unstructured engine: later groups and
blocks see what earlier ones have become.
"""

from __future__ import annotations

import time
from typing import Any, cast

import torch
from torch import Tensor

from secateur.allocation.plan import Plan
from secateur.errors import NumericsError, UsageError, VerificationError
from secateur.evidence.gather import gather_inputs
from secateur.evidence.replay import Replay
from secateur.masks.structured import StructuredMask
from secateur.methods.structured_base import StructuredMethod, UnitDecision, UnitProblem
from secateur.models.anatomy import Block, Matrix
from secateur.models.surgery import apply_mask
from secateur.models.units import Group, Units, stack_of
from secateur.run.folder import RunFolder
from secateur.run.session import Session
from secateur.solvers.retarget import dense_map
from secateur.tensorfile import opened, save_tensors

BOUNDARY_SECONDS = 20.0
"""Least time between two saved states: a resumed run repeats at most this much work."""


def prune_unit_blocks(
    session: Session, units: Units, plan: Plan, folder: RunFolder | None
) -> tuple[StructuredMask, list[dict[str, Any]]]:
    """Every block in turn, from the last saved state on.

    Returns:
        What is gone, and a record per group.
    """
    if session.calibration is None:
        raise UsageError("needs calibration text", field="calibration", value=None)
    walk = _Walk(session, units, plan, session.replay(session.calibration))
    start = walk.restore(folder)
    blocks = session.view.blocks
    with session.progress.stage("pruning", total=len(blocks), unit="blocks") as advance:
        advance(start)
        last = time.monotonic()
        for block in blocks[start:]:
            walk.block(block)
            final = block.index + 1 == len(blocks)
            if folder is not None and (final or time.monotonic() - last > BOUNDARY_SECONDS):
                walk.save(folder, block.index + 1)
                last = time.monotonic()
            advance(1)
    return walk.mask, walk.records


class _Walk:
    def __init__(self, session: Session, units: Units, plan: Plan, replay: Replay) -> None:
        self.session = session
        self.units = units
        self.plan = plan
        self.replay = replay
        self.mask = StructuredMask()
        self.records: list[dict[str, Any]] = []
        self.method = cast(StructuredMethod, session.method)
        dense = session.recipe.reconstruct == "dense"
        self.reference: list[Tensor] | None = list(replay.hidden) if dense else None
        self.parameters = dict(session.loaded.model.named_parameters())

    @torch.no_grad()
    def block(self, block: Block) -> None:
        """Cut one block's groups and move the calibration data past it."""
        whole = {m.key: m.tensor().clone() for m in block.matrices} if self.reference else {}
        dense_outputs: list[Tensor] | None = None
        for group in self.units.in_block(block.index, stack_of(block.name)):
            count = self.plan.units[group.key].removed
            if not count:
                continue
            start = time.perf_counter()
            reader = self._reader(block, group)
            inputs, _ = gather_inputs(
                self.replay,
                block,
                gram=True,
                matrices=[reader],
                keep_outputs=False,
                dense=self.reference,
                dense_block=lambda: _Dense(block, whole),
            )
            if self.reference is not None and dense_outputs is None:
                dense_outputs = inputs.dense_outputs
            moments = inputs.moments[reader.name]
            weight = reader.tensor().to(torch.float32)
            if not torch.isfinite(weight).all():
                raise NumericsError(f"the weights of '{reader.name}' hold NaN or infinity")
            if moments.cross is not None:
                weight = weight @ dense_map(moments, name=reader.name)
            (part,) = group.reads()
            bias = reader.module._parameters.get("bias")
            problem = UnitProblem(
                group.key,
                group.kind,
                weight,
                part.index.to(weight.device),
                moments,
                count,
                self.mask.of(group),
                group.even,
                block.index,
                len(self.session.view.blocks),
                None if bias is None else bias.detach().to(torch.float32),
            )
            decision = self.method.decide(problem)
            self._take(group, reader, problem, decision)
            self._record(group, decision, moments.tokens, time.perf_counter() - start)
        if self.reference is not None:
            if dense_outputs is None:
                dense_outputs = [self.replay.run(block, b, h) for b, h in enumerate(self.reference)]
            self.reference = dense_outputs
        self.replay.hidden = self.replay.advance(block)

    def _reader(self, block: Block, group: Group) -> Matrix:
        readers = group.reads()
        name = readers[0].parameter.removesuffix(".weight") if len(readers) == 1 else ""
        found = next((m for m in block.matrices if m.name == name), None)
        if found is None:
            raise UsageError(
                f"'{group.key}' is not read by one matrix of the block",
                field="method",
                value=self.session.recipe.method,
                fix="a method that ranks by scores",
            )
        return found

    def _take(
        self, group: Group, reader: Matrix, problem: UnitProblem, decision: UnitDecision
    ) -> None:
        gone = decision.gone.cpu()
        if gone.shape != (group.n_units,) or int(gone.sum()) != problem.count:
            raise VerificationError(
                f"'{group.key}' should lose {problem.count} units, not {int(gone.sum())}",
                fix="the method does not honour the exact count: report it to its author",
            )
        if decision.weight is not None:
            reader.write(decision.weight)
        elif problem.moments.cross is not None:
            reader.write(problem.weight)
        if decision.bias is not None:
            cast(Tensor, reader.module._parameters["bias"]).copy_(decision.bias)
        self.mask.remove(group, gone)
        if self.session.recipe.structure.gqa == "duplicate" and group.kind == "head":
            self.mask.duplicated.add(group.key)
        apply_mask(
            self.session.loaded.model, StructuredMask({group.key: self.mask.gone[group.key]})
        )

    def _record(self, group: Group, decision: UnitDecision, tokens: int, seconds: float) -> None:
        score = decision.score
        self.records.append(
            {
                "key": group.key,
                "scores": None if score is None else [float(s) for s in score],
                "notes": decision.notes,
                "tokens": tokens,
                "seconds": round(seconds, 4),
            }
        )

    # -- resume --------------------------------------------------------------------------------

    def save(self, folder: RunFolder, reached: int) -> None:
        """The weights of finished blocks, what is gone, and the next block's inputs."""
        inside = self._inside(reached)
        save_tensors(
            folder.inner / "state" / "weights.safetensors", inside, {"block": str(reached)}
        )
        folder.save("state/units.json", {"mask": self.mask.record(), "records": self.records})
        folder.save_boundary(reached, [*self.replay.hidden, *(self.reference or [])])
        folder.event("blocks", reached=reached)

    @torch.no_grad()
    def restore(self, folder: RunFolder | None) -> int:
        """Take up the last saved state; returns the first block to do."""
        if folder is None:
            return 0
        record = folder.read("state/units.json")
        weights = folder.inner / "state" / "weights.safetensors"
        boundary = folder.load_boundary(self.replay.device)
        if record is None or boundary is None or not weights.is_file():
            return 0
        with opened(weights) as file:
            if int(file.metadata()["block"]) != boundary[0]:
                return 0  # killed between the two writes: that state is done again
            for name in self._inside(boundary[0]):
                self.parameters[name].copy_(file.get_tensor(name))
        self.mask = StructuredMask.parse(record["mask"], "state/units.json")
        self.records = record["records"]
        batches = len(self.replay.ids)
        self.replay.hidden = boundary[1][:batches]
        if self.reference is not None:
            self.reference = boundary[1][batches:]
        folder.event("resumed", blocks=boundary[0])
        return boundary[0]

    def _inside(self, reached: int) -> dict[str, Tensor]:
        names = {f"{b.name}." for b in self.session.view.blocks[:reached]}
        return {
            n: p.detach()
            for n, p in self.parameters.items()
            if any(n.startswith(prefix) for prefix in names)
        }


class _Dense:
    """The block's matrices as they were, for a moment."""

    def __init__(self, block: Block, whole: dict[str, Tensor]) -> None:
        self.pairs = [(m, whole[m.key]) for m in block.matrices] if whole else []
        self.now: list[Tensor] = []

    def __enter__(self) -> None:
        self.now = [m.tensor().clone() for m, _ in self.pairs]
        for matrix, old in self.pairs:
            matrix.tensor().copy_(old)

    def __exit__(self, *_exception: object) -> None:
        for (matrix, _old), new in zip(self.pairs, self.now, strict=True):
            matrix.tensor().copy_(new)
