"""Multiplying by a mask: the compiled form and torch's say the same."""

import os
import subprocess
import sys

import pytest
import torch

from secateur.kernels import masking
from secateur.kernels.masking import keep_only


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_what_is_gone_becomes_zero_in_place(dtype, transposed, compiled, monkeypatch):
    if compiled:
        pytest.importorskip("numba")
    else:
        monkeypatch.setattr(masking, "_compiled", lambda: None)
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(700, 5, generator=generator).to(dtype)
    keep = (torch.rand(700, 5, generator=generator) < 0.5).to(torch.uint8)
    if transposed:
        matrix, keep = matrix.T, keep.T
    wanted = torch.where(keep.bool(), matrix, torch.zeros((), dtype=dtype))
    assert keep_only(matrix, keep) is matrix
    assert torch.equal(matrix, wanted)


def test_no_mask_keeps_all():
    matrix = torch.randn(3, 4)
    assert torch.equal(keep_only(matrix.clone(), None), matrix)


ALONE = """
import torch
torch.set_num_threads(1)
from secateur.kernels.masking import keep_only
keep_only(torch.ones(8, 8), torch.ones(8, 8, dtype=torch.uint8))
print(torch.get_num_threads())
"""


def test_torch_has_as_many_threads_afterwards():
    # In a process of its own: it is the first parallel call that used to change them.
    pytest.importorskip("numba")
    environment = {**os.environ, "NUMBA_NUM_THREADS": "2", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", ALONE], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.stdout.strip() == "1", done.stderr[-2000:]
