"""Input statistics of one block's matrices, shared by those that see the same input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from secateur.evidence.replay import Replay, _Stop
from secateur.evidence.statistics import InputMoments
from secateur.models.anatomy import Block, Matrix
from secateur.models.capture import Capture, capture_inputs


class BlockInputs:
    """Moments per matrix name; q/k/v (and gate/up) point to one and the same object.

    ``order`` lists the groups of matrices that share an input, in order of use.
    """

    def __init__(self) -> None:
        self.moments: dict[str, InputMoments] = {}
        self.dense_outputs: list[Tensor] = []
        self._leader: dict[str, str] = {}

    @property
    def order(self) -> list[list[str]]:
        """Groups of names with a common input, in the order the block uses them."""
        groups: dict[str, list[str]] = {}
        for name, leader in self._leader.items():
            groups.setdefault(leader, []).append(name)
        return list(groups.values())

    def leader(self, name: str) -> str:
        """The matrix whose statistic ``name`` shares."""
        return self._leader[name]

    def adopt(self, leaders: dict[str, str], moments: dict[str, InputMoments]) -> None:
        """Take the statistics all ranks have summed: leader of each name, moments of each leader."""
        self._leader = leaders
        self.moments = {name: moments[leader] for name, leader in leaders.items()}

    def lead(self, name: str, x: Tensor, seen: dict[int, str]) -> bool:
        """True when ``name`` is the one to count ``x`` for its group."""
        if name not in self._leader:
            self._leader[name] = seen.get(id(x), name)
        seen.setdefault(id(x), name)
        return self._leader[name] == name


@torch.no_grad()
def gather_inputs(
    replay: Replay,
    block: Block,
    *,
    gram: bool,
    matrices: Sequence[Matrix] | None = None,
    keep_outputs: bool = True,
    dense: Sequence[Tensor] | None = None,
    dense_block: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> tuple[BlockInputs, list[Tensor]]:
    """One pass of ``block`` over all batches, gathering its matrices' input moments.

    With ``dense`` (the dense model's hidden states per batch) the cross moments between its
    inputs and the replay's are gathered too, at the price of a second forward.

    With ``matrices`` only those are watched and each forward ends as soon as all were seen
    (true-sequential pruning needs no more); then no outputs are returned.

    Returns:
        The moments, and the block's outputs per batch when the forwards ran to the end.
    """
    watched = list(block.matrices if matrices is None else matrices)
    found = BlockInputs()
    outputs: list[Tensor] = []
    for batch in range(len(replay.hidden)):
        seen: dict[int, str] = {}
        alive: list[Tensor] = []  # an id is only unique while its tensor lives
        left = {m.name for m in watched}
        dense_inputs: dict[str, Tensor] = {}
        if dense is not None:
            with dense_block():
                dense_inputs, output = _inputs_of(replay, block, batch, watched, dense[batch])
                found.dense_outputs.append(output)

        def count(
            matrix: Matrix,
            x: Tensor,
            batch: int = batch,
            seen: dict[int, str] = seen,
            alive: list[Tensor] = alive,
            left: set[str] = left,
            dense_inputs: dict[str, Tensor] = dense_inputs,
        ) -> None:
            alive.append(x)
            if found.lead(matrix.name, x, seen):
                if matrix.name not in found.moments:
                    found.moments[matrix.name] = InputMoments(
                        x.shape[-1], gram=gram, device=x.device
                    )
                real = _real(replay.keep[batch], capture)
                found.moments[matrix.name].update(x, real)
                if matrix.name in dense_inputs:
                    found.moments[matrix.name].update_cross(dense_inputs[matrix.name], x, real)
            left.discard(matrix.name)
            if matrices is not None and not left:
                raise _Stop

        with capture_inputs(watched, count) as capture:
            try:
                output = replay.run(block, batch)
                if keep_outputs:
                    outputs.append(replay.checked(block, output))
            except _Stop:
                pass
    for name, leader in found._leader.items():
        found.moments[name] = found.moments[leader]
        found.moments[name].check(name)
    return found, outputs


def _inputs_of(
    replay: Replay, block: Block, batch: int, watched: Sequence[Matrix], hidden: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    """What each matrix sees when the block is fed with ``hidden``, and the block's output.

    Experts are left out: the two streams may route a token differently.
    """
    seen: dict[str, Tensor] = {}

    def keep(matrix: Matrix, x: Tensor) -> None:
        if matrix.index is None:
            seen[matrix.name] = x

    with capture_inputs(watched, keep):
        output = replay.run(block, batch, hidden)
    return seen, output


def _real(keep: Tensor | None, capture: Capture) -> Tensor | None:
    """Which of the tokens now seen are real; an expert sees a selection of the batch's rows."""
    if keep is None or capture.rows is None:
        return keep
    return keep.reshape(-1)[capture.rows]
