"""Numba's kernels on as many threads as torch's: N processes of one machine share its cores."""

from __future__ import annotations

import torch


def as_many_as_torch() -> None:
    """Set numba's number of threads, in this thread, to torch's (at most what numba started with).

    Numba's first parallel call sets OpenMP's number of threads for the process, which is torch's
    too; it is put back here, so that results do not depend on which kernels ran before.
    """
    import numba

    threads = torch.get_num_threads()
    most: int = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
    numba.set_num_threads(min(threads, most))
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
