"""Multiplying by a mask: the compiled form and torch's say the same."""

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
