"""The CUDA forms: their lists here, their logic by Triton's interpreter, themselves on a device."""

import dataclasses
import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from secateur.kernels import depthwise_triton
from secateur.kernels.depthwise import Taps
from secateur.masks.depthwise import balanced
from secateur.methods import deprune_reference as reference

_INTERPRETED = """
import torch
from torch import nn
from secateur.kernels import depthwise_triton as forms
from secateur.kernels.depthwise import Taps
torch.manual_seed(0)
for c, k, s, d, m, h, w in [(40, 3, 1, 1, 1, 9, 7), (33, 5, 2, 1, 1, 12, 11), (3, 3, 2, 2, 2, 13, 9)]:
    conv = nn.Conv2d(c, c * m, k, s, k // 2, d, groups=c).eval()
    mask = torch.rand(conv.weight.shape) < 0.7
    mask[2] = True
    taps = Taps.of(conv, mask, 0.0, 1.0)
    conv.weight.data[mask] = 0
    x = torch.randn(2, c, h, w)
    wanted = conv(x).clamp(0, 1).detach()
    for form in (forms.direct, forms.gather):
        assert torch.allclose(form(x, taps), wanted, atol=1e-5), (form.__name__, c, k)
print("same")
"""


def layer(channels, ratio=0.7, **options):
    conv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, **options).eval()
    return conv, torch.rand(conv.weight.shape) < ratio


@pytest.mark.parametrize("channels", [32, 40, 5])
def test_columns_are_those_of_the_refactored_form(channels):
    conv, mask = layer(channels)
    matrix, row, tap = depthwise_triton.columns(Taps.of(conv, mask))
    whole = reference.diagonals(conv.weight)
    patches = reference.patches(conv, torch.randn(1, channels, 6, 6))
    for g, (a, b) in enumerate(zip(whole, patches, strict=True)):
        keep = ~mask.flatten(1).split(32)[g].reshape(-1)
        n = int(keep.sum())
        assert torch.equal(matrix[g, : len(a), :n], a[:, keep])
        assert not matrix[g, :, n:].any()
        assert bool((row[g, n:] == -1).all())
        places = (row[g, :n] - 32 * g) * 9 + tap[g, :n]
        assert places.tolist() == keep.nonzero().view(-1).tolist()
        assert torch.allclose(
            matrix[g, : len(a), :n] @ b[0, places.long()], (a[:, keep] @ b[0, keep])
        )
    assert matrix.shape[2] % 32 == 0


def test_width_is_the_fullest_range_rounded_up():
    conv, _ = layer(64)
    for kept in (33, 64, 65):
        taps = Taps.of(conv, balanced(conv.weight, kept))
        assert depthwise_triton.columns(taps)[0].shape[2] == -(-kept // 32) * 32


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_the_kernels_logic_by_the_interpreter():
    seen = subprocess.run(
        [sys.executable, "-c", _INTERPRETED],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert seen.stdout.strip() == "same", seen.stderr[-2000:]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_form_on_a_device(dtype):
    conv, mask = layer(72)
    taps = Taps.of(conv, mask)
    conv.weight.data[mask] = 0
    x = torch.randn(2, 72, 28, 28, device="cuda", dtype=dtype)
    wanted = conv.to("cuda")(x.float())
    for form in depthwise_triton.FORMS:
        seen = depthwise_triton.depthwise_cuda(x, taps, form)
        assert torch.allclose(seen.float(), wanted, atol=1e-4 if dtype is torch.float32 else 2e-2)


@pytest.mark.parametrize("padding", [(1, 1, 1, 1), (0, 1, 0, 1), (2, 2, 1, 1)])
@pytest.mark.parametrize("form", ["torch", "torch channels last"])
def test_torch_forms_pad_as_told(form, padding):
    conv, mask = layer(12)
    taps = dataclasses.replace(Taps.of(conv, mask), padding=padding)
    x = torch.randn(2, 12, 9, 8)
    top, bottom, left, right = padding
    padded = torch.nn.functional.pad(x, (left, right, top, bottom))
    wanted = torch.nn.functional.conv2d(padded, taps.dense(), taps.bias, groups=12)
    assert torch.allclose(depthwise_triton._run(x, taps, form, 0), wanted, atol=1e-5)


def test_without_a_device_nothing_is_offered():
    if torch.cuda.is_available():
        pytest.skip("there is a device")
    assert not depthwise_triton.available()
