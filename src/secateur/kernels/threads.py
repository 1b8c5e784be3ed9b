"""Numba's kernels on as many threads as torch's: N processes of one machine share its cores."""

from __future__ import annotations

import torch


def as_many_as_torch() -> None:
    """Set numba's number of threads, in this thread, to torch's (at most what numba started with)."""
    import numba

    numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))  # type: ignore[attr-defined]
