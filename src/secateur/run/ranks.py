"""Several processes on one run: evidence is summed over ranks, solves are shared out.

Started by ``torchrun -m secateur prune ...``. Every rank holds the model and a share of the
calibration batches; rank 0 alone writes. With one process everything here does nothing.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from secateur.evidence.gather import BlockInputs
from secateur.evidence.statistics import GradientMoments, InputMoments
from secateur.models.anatomy import Matrix

T = TypeVar("T")


class Ranks:
    """This process among ``world`` of them.

    Statistics are plain sums, so N ranks give what one gives, up to the order of float32
    additions.
    """

    def __init__(self, rank: int = 0, world: int = 1) -> None:
        self.rank = rank
        self.world = world

    @classmethod
    def from_environment(cls, device: str = "auto") -> Ranks:
        """As torchrun says; joins the process group on first use (NCCL on GPUs, else gloo)."""
        world = int(os.environ.get("WORLD_SIZE", "1"))
        if world == 1:
            return cls()
        if not dist.is_initialized():
            # One rank evaluates alone while the others wait for it.
            patience = timedelta(hours=12)
            if torch.cuda.is_available() and device != "cpu":
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
                # Masks and counts lie on the CPU, moments and weights on the GPU.
                dist.init_process_group("cpu:gloo,cuda:nccl", timeout=patience)
            else:
                dist.init_process_group("gloo", timeout=patience)
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def leads(self) -> bool:
        """True on the one rank that writes and reports."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world > 1:
            dist.barrier()

    def share(self, rows: Tensor) -> Tensor:
        """This rank's rows (dim 0), every ``world``-th."""
        return rows[self.rank :: self.world]

    def owner(self, matrices: Sequence[Matrix]) -> dict[str, int]:
        """Which rank solves which matrix: largest first, to the least loaded (d_out * d_in^2)."""
        load = [0] * self.world
        out: dict[str, int] = {}
        for matrix in sorted(matrices, key=lambda m: (-m.shape[0] * m.shape[1] ** 2, m.name)):
            rank = load.index(min(load))
            out[matrix.name] = rank
            load[rank] += matrix.shape[0] * matrix.shape[1] ** 2
        return out

    def sum_scalars(self, *values: float) -> list[float]:
        """Each value summed over ranks."""
        if self.world == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return [float(v) for v in total]

    def agreed(self, value: int) -> int:
        """``value`` if all ranks hold the same, else 0."""
        if self.world == 1:
            return value
        everyone = [0] * self.world
        dist.all_gather_object(everyone, value)
        return value if len(set(everyone)) == 1 else 0

    def sum_inputs(self, inputs: BlockInputs) -> None:
        """Sum a block's moments over ranks, in place; an expert may be unseen on some ranks."""
        if self.world == 1:
            return
        mine = {n: (inputs.leader(n), len(m.diagonal)) for n, m in inputs.moments.items()}
        everyone: list[dict[str, tuple[str, int]]] = [{} for _ in range(self.world)]
        dist.all_gather_object(everyone, mine)
        known = {name: pair for part in everyone for name, pair in part.items()}
        gram = any(m.gram is not None for m in inputs.moments.values())
        device = next((m.diagonal.device for m in inputs.moments.values()), torch.device("cpu"))
        totals: dict[str, InputMoments] = {}
        for leader, features in sorted(set(known.values())):
            moments = inputs.moments.get(leader) or InputMoments(features, gram=gram, device=device)
            tokens = torch.tensor(moments.tokens)
            dist.all_reduce(tokens)
            moments.tokens = int(tokens)
            if moments.total is not None:
                dist.all_reduce(moments.total)
            if moments.gram is None:
                dist.all_reduce(moments.diagonal)
            else:
                dist.all_reduce(moments.gram)
                moments.diagonal = moments.gram.diagonal()
                if moments.cross is not None:
                    dist.all_reduce(moments.cross)
            totals[leader] = moments
        inputs.adopt({name: leader for name, (leader, _) in known.items()}, totals)

    def sum_gradients(self, sums: dict[str, GradientMoments]) -> None:
        """Sum gradient statistics over ranks, in place."""
        if self.world == 1:
            return
        for moments in sums.values():
            samples = torch.tensor(moments.samples)
            dist.all_reduce(samples)
            moments.samples = int(samples)
            for norm in moments.norms:
                dist.all_reduce(moments.sums[norm])

    def gather(self, item: T) -> list[T]:
        """Every rank's item (a small object of our own making), in the order of ranks."""
        everyone: list[Any] = [item]
        if self.world > 1:
            everyone = [None] * self.world
            dist.all_gather_object(everyone, item)
        return everyone

    def spread(self, source: int, item: T | None) -> T:
        """``item`` of rank ``source`` on every rank (a small object of our own making)."""
        box: list[Any] = [item]
        if self.world > 1:
            dist.broadcast_object_list(box, src=source)
        return box[0]

    def spread_tensor(self, source: int, tensor: Tensor) -> Tensor:
        """Broadcast a tensor whose shape and type all ranks know; returns it."""
        if self.world > 1:
            dist.broadcast(tensor, src=source)
        return tensor
