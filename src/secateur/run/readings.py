"""One dense pass over the model for all allocators' readings, kept in a folder if there is one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.evidence.gather import BlockInputs, gather_inputs
from secateur.evidence.readings import BlockFacts, MatrixFacts, Reading, sampled_positions
from secateur.evidence.replay import Replay
from secateur.evidence.store import EvidenceStore
from secateur.models.anatomy import Block, Matrix
from secateur.run.ranks import Ranks
from secateur.run.session import Session

Records = dict[Reading, list[dict[str, Tensor]]]


def gather_readings(session: Session, readings: Sequence[Reading], root: Path | None) -> Records:
    """What each reading says of each block that has matrices; one pass for those not yet kept.

    Args:
        readings: of one allocator or of many.
        root: where they are kept for other allocators and runs, by model, text and reading.
    """
    wanted = list(dict.fromkeys(readings))
    stores = {r: None if root is None else _store(session, r, root) for r in wanted}
    blocks = [b for b in session.view.blocks if b.matrices]
    # Rank 0's folder decides, so that no rank waits for another in a pass that only one makes.
    held = session.ranks.spread(0, [bool(s and s.complete) for s in stores.values()])
    kept = [r for r, there in zip(wanted, held, strict=True) if there]
    missing = [r for r in wanted if r not in kept]
    found: Records = {}
    for reading in kept:
        store = stores[reading]
        assert store is not None
        found[reading] = [store.load_tensors(b.index) for b in blocks]
    if missing:
        found |= _pass(session, missing, stores, blocks)
    return {r: found[r] for r in wanted}


def _pass(
    session: Session,
    readings: Sequence[Reading],
    stores: dict[Reading, EvidenceStore | None],
    blocks: Sequence[Block],
) -> Records:
    found: Records = {r: [] for r in readings}
    tokens = max(r.sample for r in readings)
    inside = max(r.of_matrices for r in readings)
    inputs = any(r.inputs for r in readings)
    stream = _Stream(session, tokens, inside, inputs) if tokens or inputs else None
    label = f"reading blocks for {', '.join(sorted({r.name for r in readings}))}"
    with session.progress.stage(label, total=len(session.view.blocks), unit="blocks") as advance:
        for block in session.view.blocks:
            with session.present(block):
                facts = stream.facts(block) if stream else _facts(block)
                for reading in readings if block.matrices else ():
                    record = {k: v.detach().cpu() for k, v in reading.read(facts).items()}
                    found[reading].append(record)
                    store = stores[reading]
                    if store is not None and session.ranks.leads:
                        store.save_tensors(block.index, record)
            advance(1)
    for reading in readings:
        store = stores[reading]
        if store is not None and session.ranks.leads:
            store.finish()
    session.ranks.barrier()
    return found


def _store(session: Session, reading: Reading, root: Path) -> EvidenceStore:
    windows = session.calibration if reading.inputs or reading.sample else None
    key = {
        "model": session.loaded.fingerprint,
        "calibration": None if windows is None else windows.fingerprint,
        "dtype": str(next(session.loaded.model.parameters()).dtype),
        "matrices": sorted(session.shapes),
        **reading.key(),
    }
    return EvidenceStore(root, reading.name, key)


def _facts(
    block: Block, inputs: BlockInputs | None = None, features: dict[str, Tensor] | None = None
) -> BlockFacts:
    moments = inputs.moments if inputs else {}
    return BlockFacts(
        block.index,
        block.name,
        [
            MatrixFacts(m.name, m.role, m.shape, _weight(m), moments.get(m.name))
            for m in block.matrices
        ],
        features or {},
    )


def _weight(matrix: Matrix) -> Callable[[], Tensor]:
    return lambda: matrix.tensor().to(torch.float32)


class _Stream:
    """Calibration windows moved through the dense blocks, with what readings need of each."""

    def __init__(self, session: Session, tokens: int, inside: int, inputs: bool) -> None:
        windows = session.calibration
        assert windows is not None, "prepare() draws windows when an allocator needs them"
        self.ranks = session.ranks
        self.inputs = inputs
        self.inside = inside
        count, length = windows.ids.shape
        places = sampled_positions(windows.mask, count, length, tokens)
        if not inputs:  # only the windows that hold sampled tokens are run
            upto = int(places.max()) // length + 1
            windows = type(windows)(
                windows.ids[:upto], None if windows.mask is None else windows.mask[:upto]
            )
        self.replay: Replay = session.replay(windows)
        size = [ids.shape[0] for ids in self.replay.ids]
        starts = [sum(size[:b]) for b in range(len(size))]
        # For each batch of this rank: (rows of its flattened tokens, places in the sample).
        self.rows: list[tuple[Tensor, Tensor]] = []
        world, rank = self.ranks.world, self.ranks.rank
        window, position = places // length, places % length
        for start, n in zip(starts, size, strict=True):
            local = window // world - start
            mine = (window % world == rank) & (local >= 0) & (local < n)
            order = mine.nonzero().flatten()
            self.rows.append((local[order] * length + position[order], order))
        self.inner = [(rows[order < inside], order[order < inside]) for rows, order in self.rows]

    @torch.no_grad()
    def facts(self, block: Block) -> BlockFacts:
        """Run the block once; its outputs become the next block's inputs."""
        whole, inside = _Rows(self.rows), _Rows(self.inner)
        for b, hidden in enumerate(self.replay.hidden):
            whole.take("input", b, hidden)
        batch = 0

        def begin(module: Any, args: Any, kwargs: Any) -> None:
            nonlocal batch
            hidden = args[0] if args else kwargs["hidden_states"]
            batch = next(b for b, h in enumerate(self.replay.hidden) if h is hidden)

        def watch(matrix: Matrix) -> Callable[..., None]:
            def hook(module: Any, args: Any, kwargs: Any, output: Tensor) -> None:
                given = args[0] if args else next(iter(kwargs.values()))
                inside.take(f"{matrix.name}|input", batch, given)
                inside.take(f"{matrix.name}|output", batch, output)

            return hook

        with ExitStack() as stack:
            if any(rows.numel() for rows, _ in self.inner):
                hook = block.module.register_forward_pre_hook(begin, with_kwargs=True)
                stack.callback(hook.remove)
                for matrix in block.matrices:
                    if matrix.index is None:
                        handle = matrix.module.register_forward_hook(
                            watch(matrix), with_kwargs=True
                        )
                        stack.callback(handle.remove)
            found: BlockInputs | None = None
            if self.inputs:
                found, outputs = gather_inputs(self.replay, block, gram=False)
            else:
                outputs = self.replay.advance(block)
        if found is not None:
            self.ranks.sum_inputs(found)
        for b, hidden in enumerate(outputs):
            whole.take("output", b, hidden)
        self.replay.hidden = outputs
        features = {**whole.joined(self.ranks), **inside.joined(self.ranks)}
        return _facts(block, found, features)


class _Rows:
    """Rows of sampled tokens, picked batch by batch, put in the sample's order in the end."""

    def __init__(self, rows: Sequence[tuple[Tensor, Tensor]]) -> None:
        self.rows = rows
        self.parts: dict[str, list[Tensor]] = {}

    def take(self, key: str, batch: int, x: Tensor) -> None:
        """The sampled tokens' rows of a batch's activations (B, L, d)."""
        rows = self.rows[batch][0]
        if rows.numel():
            flat = x.reshape(-1, x.shape[-1])
            self.parts.setdefault(key, []).append(flat[rows.to(x.device)].float().cpu())

    def joined(self, ranks: Ranks) -> dict[str, Tensor]:
        """All ranks' rows under each key, (T, d)."""
        order = [o for _, o in self.rows if o.numel()]
        places = torch.cat(order) if order else torch.zeros(0, dtype=torch.int64)
        mine = (places, {key: torch.cat(rows) for key, rows in self.parts.items()})
        everyone = [(p, rows) for p, rows in ranks.gather(mine) if p.numel()]
        if not everyone:
            return {}
        back = torch.cat([p for p, _ in everyone]).argsort()
        keys = list(everyone[0][1])
        return {key: torch.cat([rows[key] for _, rows in everyone])[back] for key in keys}
