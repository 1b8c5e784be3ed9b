"""The gradient evidence of a session: gathered once on the dense model, kept where asked."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from secateur.errors import UsageError
from secateur.evidence.gradients import direct_gradients, gradients_by_block
from secateur.evidence.store import EvidenceStore
from secateur.run.engine import Gradients
from secateur.run.session import Session


def gather_gradients(session: Session, root: Path | None) -> Gradients | None:
    """Gradient sums of the dense model by block, gathered once and kept in ``root`` if given."""
    wanted = sorted(n for n in session.needs if n.startswith("grad-"))
    if not wanted or session.calibration is None:
        return None
    norms = tuple(n.removeprefix("grad-") for n in wanted)
    windows = session.calibration
    key = {
        "model": session.loaded.fingerprint,
        "calibration": windows.fingerprint,
        "norms": norms,
        "dtype": str(next(session.loaded.model.parameters()).dtype),
        "matrices": sorted(session.shapes),
    }
    store = None if root is None else EvidenceStore(root, "gradients", key)
    if store is not None and store.complete:
        return partial(store.load_gradients, device=session.device)
    if session.resident is not None:
        if store is None:
            raise UsageError("gradients of a streamed model need --out", field="stream", value=True)
        if session.ranks.world > 1:
            raise UsageError(
                "gradients of a streamed model are gathered by one process", field="stream"
            )
        replay = session.replay(windows, batch_size=1)
        store.clear()
        gradients_by_block(
            replay,
            norms,
            lambda block, sums: store.add_gradients(block.index, sums),
            progress=session.progress,
        )
        store.finish()
        return partial(store.load_gradients, device=session.device)
    sums = direct_gradients(
        session.view,
        session.ranks.share(windows.ids),
        None if windows.mask is None else session.ranks.share(windows.mask),
        norms,
        device=session.device,
        progress=session.progress,
    )
    session.ranks.sum_gradients(sums)
    keys = [{m.key for m in block.matrices} for block in session.view.blocks]
    if store is None or session.ranks.world > 1:
        return lambda block: {k: sums[k] for k in keys[block]}
    for block in session.view.blocks:
        store.save_gradients(block.index, {k: sums[k] for k in keys[block.index]})
    store.finish()
    return partial(store.load_gradients, device=session.device)
