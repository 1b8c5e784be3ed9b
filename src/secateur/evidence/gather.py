"""Input statistics of one block's matrices, shared by those that see the same input."""

from __future__ import annotations

from collections.abc import Sequence

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
) -> tuple[BlockInputs, list[Tensor]]:
    """One pass of ``block`` over all batches, gathering its matrices' input moments.

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

        def count(
            matrix: Matrix,
            x: Tensor,
            batch: int = batch,
            seen: dict[int, str] = seen,
            alive: list[Tensor] = alive,
            left: set[str] = left,
        ) -> None:
            alive.append(x)
            if found.lead(matrix.name, x, seen):
                if matrix.name not in found.moments:
                    found.moments[matrix.name] = InputMoments(
                        x.shape[-1], gram=gram, device=x.device
                    )
                found.moments[matrix.name].update(x, _real(replay.keep[batch], capture))
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


def _real(keep: Tensor | None, capture: Capture) -> Tensor | None:
    """Which of the tokens now seen are real; an expert sees a selection of the batch's rows."""
    if keep is None or capture.rows is None:
        return keep
    return keep.reshape(-1)[capture.rows]
