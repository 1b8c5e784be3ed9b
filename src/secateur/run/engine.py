"""The main loop: gather, decide, update and propagate, one block after another."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from secateur.allocation.plan import Plan
from secateur.errors import NumericsError, UsageError, VerificationError
from secateur.evidence.gather import BlockInputs, gather_inputs
from secateur.evidence.gradients import of_matrix
from secateur.evidence.replay import Replay
from secateur.evidence.statistics import Evidence, GradientMoments, InputMoments, all_finite
from secateur.evidence.store import EvidenceStore
from secateur.masks.target import Scope
from secateur.methods.base import Method, Need, Update
from secateur.methods.magnitude import Magnitude
from secateur.methods.prune_matrix import Pruned, prune_matrix
from secateur.models.anatomy import Block, Matrix, ModelView
from secateur.run.ranks import Ranks
from secateur.run.records import module_record
from secateur.solvers.retarget import dense_map

Gradients = Callable[[int], dict[str, GradientMoments]]


@dataclass
class BlockResult:
    """What one block became: masks by matrix name, a record per matrix, its output error."""

    index: int
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    modules: list[dict[str, Any]] = field(default_factory=list)
    error: float | None = None
    """||pruned(x) - dense(x)|| / ||dense(x)|| of the whole block on the calibration inputs."""
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass
class Engine:
    """Prunes block after block of ``view`` according to ``plan``.

    Args:
        view: the model; a streamed one makes each block resident while it is worked on.
        method: ranks weights, perhaps updates them.
        plan: exact counts.
        scope: among which weights the least important are sought.
        update: what survivors become.
        replay: calibration inputs moved along; None when no evidence from inputs is needed.
        gradients: sums of one block's gradients by parameter key; None when not needed.
        propagate: whether later blocks see the pruned or the dense model's activations.
        true_sequential: re-run the block after each group of matrices with a common input.
        store: where dense evidence is kept for other runs (only with ``propagate="dense"``).
        ranks: the processes that share this run.
        reference: the dense model's hidden states per batch, moved along beside the replay's;
            then matrices are fitted to the dense model's outputs (see ``solvers.retarget``).
        sequences: calibration sequences over all ranks.
        stored: narrower type the weights are written in; survivors are rounded to it at once,
            so that what is measured in memory is what lies on disk.
    """

    view: ModelView
    method: Method
    plan: Plan
    scope: Scope
    update: Update
    replay: Replay | None = None
    gradients: Gradients | None = None
    propagate: str = "pruned"
    true_sequential: bool = False
    store: EvidenceStore | None = None
    ranks: Ranks = field(default_factory=Ranks)
    reference: list[Tensor] | None = None
    sequences: int = 0
    stored: torch.dtype | None = None

    @property
    def needs_gram(self) -> bool:
        """Whether full second moments are gathered."""
        return Need.GRAM in self.method.requirements() or self.update != "none"

    @torch.no_grad()
    def block(self, block: Block) -> BlockResult:
        """Prune one resident block and move the replay past it.

        Raises:
            VerificationError: a mask does not hold exactly what the plan asks.
            NumericsError: NaN or infinity in weights or activations.
        """
        result = BlockResult(block.index)
        clock = _Clock(result.seconds)
        if self.replay is None:
            self._prune(block, block.matrices, BlockInputs(), result)
            clock("solve")
            return result
        if self.store is not None and self.store.complete:
            inputs = BlockInputs()
            inputs.moments = self.store.load_inputs(block.index, str(self.replay.device))
            self._prune(block, block.matrices, inputs, result)
            clock("solve")
            return result
        if self.true_sequential:
            inputs, dense = self._prune_in_order(block, result, clock)
        else:
            inputs, dense = self._gather(block)
            if self.store is not None:
                self.store.save_inputs(block.index, inputs.moments)
            clock("calibrate")
            self._prune(block, block.matrices, inputs, result)
            clock("solve")
        if self.reference is not None:
            self.reference = inputs.dense_outputs
        if self.propagate == "dense":
            self.replay.hidden = dense
        else:
            self.replay.hidden = self.replay.advance(block)
            result.error = self._relative_error(self.replay.hidden, dense)
        clock("propagate")
        return result

    def _prune_in_order(
        self, block: Block, result: BlockResult, clock: _Clock
    ) -> tuple[BlockInputs, list[Tensor]]:
        """Group after group, each seeing the groups before it already pruned."""
        originals = [m.tensor().clone() for m in block.matrices]
        first, dense = self._gather(block)
        clock("calibrate")
        by_name = {m.name: m for m in block.matrices}
        for n, names in enumerate(first.order):
            group = [by_name[name] for name in names]
            inputs = first
            if n:
                inputs, _ = self._gather(block, group, originals)
                clock("calibrate")
            self._prune(block, group, inputs, result)
            clock("solve")
        seen = {name for names in first.order for name in names}
        self._prune(block, [m for m in block.matrices if m.name not in seen], first, result)
        return first, dense

    def _prune(
        self, block: Block, matrices: list[Matrix], inputs: BlockInputs, result: BlockResult
    ) -> None:
        sums = self.gradients(block.index) if self.gradients is not None else None
        owner = self.ranks.owner(matrices)
        mine: dict[str, tuple[Pruned, dict[str, Any]]] = {}
        maps: dict[int, Tensor] = {}  # q, k and v share one
        for matrix in matrices:
            if owner[matrix.name] == self.ranks.rank:
                evidence = Evidence(
                    matrix.name,
                    inputs.moments.get(matrix.name),
                    None if sums is None else of_matrix(sums, matrix),
                    self.sequences,
                )
                mine[matrix.name] = self._solve(block, matrix, evidence, maps)
        for matrix in matrices:
            source = owner[matrix.name]
            pruned, record = mine.get(matrix.name, (None, None))
            result.modules.append(self.ranks.spread(source, record))
            mask = torch.empty(matrix.shape, dtype=torch.uint8)
            weight = torch.empty(matrix.shape, device=matrix.stored.device)
            if pruned is not None:
                mask, weight = pruned.mask.cpu().view(torch.uint8), pruned.weight
            mask = self.ranks.spread_tensor(source, mask)
            weight = self.ranks.spread_tensor(source, weight)
            matrix.write(weight if self.stored is None else weight.to(self.stored))
            result.masks = {**result.masks, matrix.name: mask.view(torch.bool)}

    def _solve(
        self, block: Block, matrix: Matrix, evidence: Evidence, maps: dict[int, Tensor]
    ) -> tuple[Pruned, dict[str, Any]]:
        """Prune one matrix and describe what was done; the model is not touched."""
        start = time.perf_counter()
        pruned, notes = self._decide(matrix, evidence, maps)
        asked = self.plan.cut(matrix.name, self.scope)
        delivered = int(pruned.mask.count_nonzero())
        if delivered != asked.count and not self.method.inexact:
            raise VerificationError(
                f"'{matrix.name}' should lose {asked.count} weights, not {delivered}",
                fix="the method does not honour the exact count: report it to its author",
            )
        record = module_record(matrix, block.index, asked, self.scope, self.update, pruned)
        record["tokens"] = None if evidence.inputs is None else evidence.inputs.tokens
        record["notes"] = notes
        record["solve"] = pruned.notes
        record["seconds"] = round(time.perf_counter() - start, 4)
        return pruned, record

    def _gather(
        self,
        block: Block,
        group: list[Matrix] | None = None,
        originals: list[Tensor] | None = None,
    ) -> tuple[BlockInputs, list[Tensor]]:
        """Input moments over all ranks; with ``group`` only its own, and no outputs."""
        assert self.replay is not None
        inputs, outputs = gather_inputs(
            self.replay,
            block,
            gram=self.needs_gram,
            matrices=group,
            keep_outputs=group is None,
            dense=self.reference,
            dense_block=lambda: _swapped(block.matrices, originals),
        )
        self.ranks.sum_inputs(inputs)
        return inputs, outputs

    def _relative_error(self, pruned: list[Tensor], dense: list[Tensor]) -> float | None:
        """||pruned - dense|| / ||dense|| over all ranks' batches."""
        gap = sum(
            float((p.float() - d.float()).square().sum())
            for p, d in zip(pruned, dense, strict=True)
        )
        norm = sum(float(d.float().square().sum()) for d in dense)
        gap, norm = self.ranks.sum_scalars(gap, norm)
        return (gap / norm) ** 0.5 if norm else None

    def _decide(
        self, matrix: Matrix, evidence: Evidence, maps: dict[int, Tensor]
    ) -> tuple[Pruned, list[str]]:
        weight = matrix.tensor().to(torch.float32)
        if not all_finite(weight):
            raise NumericsError(
                f"the weights of '{matrix.name}' hold NaN or infinity",
                fix="repair the checkpoint, or leave the matrix out with --exclude",
            )
        cut = self.plan.cut(matrix.name, self.scope)
        gone = weight == 0
        zeros = int(gone.count_nonzero())
        if zeros > cut.count + 0.01 * weight.numel():
            raise UsageError(
                f"'{matrix.name}' is {zeros / weight.numel():.1%} zeros already, more than asked",
                field="sparsity",
                value=round(cut.sparsity, 6),
                fix="ask for more than it has, or leave it out with --exclude",
            )
        notes: list[str] = []
        moments: InputMoments | None = evidence.inputs
        if self.replay is not None:
            if moments is None or moments.tokens == 0:
                # An expert nobody was routed to: its statistics are empty, not zero.
                notes.append("no calibration token reached it: chosen by magnitude, not updated")
                plain = Evidence(matrix.name)
                return prune_matrix(Magnitude(), weight, plain, cut, "none"), notes
            dead = int((moments.diagonal == 0).sum())
            if dead:
                notes.append(f"{dead} of {weight.shape[1]} inputs are always zero")
            if moments.tokens < weight.shape[1] and self.needs_gram:
                notes.append(
                    f"only {moments.tokens} tokens for {weight.shape[1]} inputs: "
                    "the second moments are rank-deficient and rest on damping"
                )
            if moments.cross is not None and cut.count:
                if id(moments) not in maps:
                    maps[id(moments)] = dense_map(moments, name=matrix.name)
                weight = weight @ maps[id(moments)]
        return prune_matrix(self.method, weight, evidence, cut, self.update, gone), notes


@contextmanager
def _swapped(matrices: list[Matrix], weights: list[Tensor] | None) -> Iterator[None]:
    """The matrices with other weights for a moment."""
    if weights is None:
        yield
        return
    now = [m.tensor().clone() for m in matrices]
    for matrix, weight in zip(matrices, weights, strict=True):
        matrix.tensor().copy_(weight)
    try:
        yield
    finally:
        for matrix, weight in zip(matrices, now, strict=True):
            matrix.tensor().copy_(weight)


class _Clock:
    """Adds the time since the last call to a named account."""

    def __init__(self, accounts: dict[str, float]) -> None:
        self.accounts = accounts
        self.last = time.perf_counter()

    def __call__(self, account: str) -> None:
        now = time.perf_counter()
        self.accounts[account] = self.accounts.get(account, 0.0) + now - self.last
        self.last = now
