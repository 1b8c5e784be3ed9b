"""Tap lists: every form says what torch's convolution says, and a machine without a compiler works."""

import copy
import ctypes
import itertools
import math
import os
import pickle
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from secateur.errors import UsageError
from secateur.kernels import compiled, depthwise
from secateur.kernels.depthwise import Taps

needs_c = pytest.mark.skipif(
    compiled.library("depthwise") is None, reason=f"no C: {compiled.why_not('depthwise')}"
)
FORMS = [pytest.param("c", marks=needs_c), "torch"]


def pruned(channels, kernel, ratio, *, multiplier=1, bias=True, seed=0, **options):
    """A depth-wise layer with a random mask over weights that are not zero, and the mask."""
    generator = torch.Generator().manual_seed(seed)
    conv = nn.Conv2d(
        channels, channels * multiplier, kernel, groups=channels, bias=bias, **options
    ).eval()
    conv.weight.data = torch.randn(conv.weight.shape, generator=generator)
    return conv, torch.rand(conv.weight.shape, generator=generator) < ratio


@torch.no_grad()
def expected(conv, mask, x):
    conv.weight[mask] = 0
    return conv(x)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kernel", [(1, 1), (2, 2), (3, 3), (5, 5), (7, 7), (3, 1), (4, 3)])
@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (1, 2), (3, 4)])
def test_every_shape_is_the_convolution(form, kernel, stride):
    cases = itertools.product(
        [(1, 1), (2, 3)], [(0, 0), (1, 1), (2, 3)], [(7, 7), (13, 20), (70, 61)], [1, 2]
    )
    for dilation, padding, size, multiplier in cases:
        reach = [d * (k - 1) + 1 - 2 * p for d, k, p in zip(dilation, kernel, padding, strict=True)]
        if any(r > n for r, n in zip(reach, size, strict=True)):
            continue
        conv, mask = pruned(
            3, kernel, 0.5, multiplier=multiplier, stride=stride, dilation=dilation, padding=padding
        )
        x = torch.randn(2, 3, *size)
        ours = depthwise.depthwise(x, Taps.of(conv, mask), form)
        assert torch.allclose(ours, expected(conv, mask, x), atol=2e-5), (dilation, padding, size)


@needs_c
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_layer(data):
    draw = data.draw
    kernel = (draw(st.integers(1, 7)), draw(st.integers(1, 7)))
    stride = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    padding = (draw(st.integers(0, 4)), draw(st.integers(0, 4)))
    size = tuple(
        draw(st.integers(max(1, k - 2 * p), 40)) for k, p in zip(kernel, padding, strict=True)
    )
    conv, mask = pruned(
        draw(st.integers(2, 5)), kernel, draw(st.sampled_from([0.0, 0.3, 0.8, 1.0])),
        stride=stride, padding=padding, bias=draw(st.booleans()), seed=draw(st.integers(0, 99)),
    )  # fmt: skip
    x = torch.randn(draw(st.integers(1, 3)), conv.in_channels, *size)
    ours = depthwise.depthwise(x, Taps.of(conv, mask), "c")
    assert torch.allclose(ours, expected(conv, mask, x), atol=2e-5)


@needs_c
def test_large_planes_and_many_taps():
    # larger than the mask tables may be, so rows are walked one by one
    for kernel, size in (((5, 5), (180, 170)), ((3, 3), (300, 301)), ((9, 9), (90, 90))):
        for stride in (1, 2):
            padding = kernel[0] // 2
            conv, mask = pruned(2, kernel, 0.4, stride=stride, padding=padding)
            x = torch.randn(1, 2, *size)
            ours = depthwise.depthwise(x, Taps.of(conv, mask), "c")
            assert torch.allclose(ours, expected(conv, mask, x), atol=5e-5)


@pytest.mark.parametrize("form", FORMS)
def test_clamp_bias_nan_and_empty_channels(form):
    conv, mask = pruned(4, 3, 0.0, padding=1)
    mask[1] = True  # a channel without taps is its clamped bias
    conv.bias.data[1] = 9.0
    x = torch.randn(1, 4, 6, 6)
    x[0, 2, 3, 3] = math.nan
    ours = depthwise.depthwise(x, Taps.of(conv, mask, 0.0, 6.0), form)
    theirs = expected(conv, mask, x).clamp(0, 6)
    assert torch.allclose(ours, theirs, atol=1e-5, equal_nan=True)
    assert bool((ours[0, 1] == 6).all())
    assert int(torch.isnan(ours).sum()) == 9  # a NaN reaches its neighbours and nobody else


@needs_c
def test_what_lies_outside_the_tensor_does_not_matter():
    conv, mask = pruned(3, 5, 0.5, padding=2)
    room = torch.full((1000,), math.nan)
    x = room[300 : 300 + 3 * 49].view(1, 3, 7, 7)
    x.copy_(torch.randn(1, 3, 7, 7))
    ours = depthwise.depthwise(x, Taps.of(conv, mask), "c")
    assert torch.allclose(ours, expected(conv, mask, x.clone()), atol=1e-5)


@needs_c
def test_threads_and_layouts_agree():
    conv, mask = pruned(7, 3, 0.6, padding=1)
    x = torch.randn(3, 7, 19, 23)
    alone = depthwise.depthwise(x, Taps.of(conv, mask))
    torch.set_num_threads(2)
    try:
        both = depthwise.depthwise(x, Taps.of(conv, mask))
    finally:
        torch.set_num_threads(1)
    assert torch.equal(alone, both)
    last = x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(alone, depthwise.depthwise(last, Taps.of(conv, mask)))


@needs_c
def test_vectors_that_every_processor_has(tmp_path, monkeypatch):
    """The half of the source that AVX-512 machines do not use."""
    source = Path(compiled.__file__).with_name("depthwise.c")
    flags = [f for f in compiled.FLAGS if f not in ("-O3", "-march=native")]
    made = tmp_path / "portable.so"
    command = shlex.split(os.environ.get("CC", "cc"))
    subprocess.run([*command, *flags, "-O1", "-DPORTABLE", "-o", made, source], check=True)
    monkeypatch.setattr(compiled, "library", lambda name: ctypes.CDLL(str(made)))
    depthwise._compiled.cache_clear()
    try:
        for kernel, stride, size in itertools.product(
            [(1, 1), (3, 3), (5, 5), (4, 3)], [1, 2, 3], [(5, 4), (7, 7), (13, 20), (70, 61)]
        ):
            conv, mask = pruned(3, kernel, 0.5, stride=stride, padding=2, multiplier=2)
            x = torch.randn(2, 3, *size)
            ours = depthwise.depthwise(x, Taps.of(conv, mask, -1.0, 1.0), "c")
            wanted = expected(conv, mask, x).clamp(-1, 1)
            assert torch.allclose(ours, wanted, atol=2e-5), (kernel, stride, size)
    finally:
        monkeypatch.undo()
        depthwise._compiled.cache_clear()


def test_lists_hold_the_mask_and_the_weight():
    conv, mask = pruned(5, (3, 4), 0.5, multiplier=2)
    taps = Taps.of(conv, mask)
    assert torch.equal(taps.mask(), mask)
    assert torch.equal(taps.dense(), conv.weight.detach().masked_fill(mask, 0))
    assert taps.counts().tolist() == (~mask).flatten(1).sum(1).tolist()
    # zeros that no mask names are taps
    conv.weight.data.zero_()
    assert int(Taps.of(conv).counts().sum()) == conv.weight.numel()


def test_padding_in_words():
    conv, mask = pruned(3, 4, 0.5, padding="same")
    x = torch.randn(1, 3, 9, 9)
    for form in depthwise.backends():
        assert torch.allclose(
            depthwise.depthwise(x, Taps.of(conv, mask), form), expected(conv, mask, x), atol=1e-5
        )


def test_without_a_compiler_torch_does_it(monkeypatch):
    monkeypatch.setattr(depthwise, "_compiled", lambda: None)
    conv, mask = pruned(3, 3, 0.5)
    x = torch.randn(1, 3, 8, 8)
    assert torch.allclose(
        depthwise.depthwise(x, Taps.of(conv, mask)), expected(conv, mask, x), atol=1e-6
    )
    with pytest.raises(UsageError, match="not there"):
        depthwise.depthwise(x, Taps.of(conv, mask), "c")


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_a_compiler_that_fails_leaves_nothing(compiler, tmp_path, monkeypatch):
    monkeypatch.setenv("CC", compiler)
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path))
    reason = compiled._made.__wrapped__("depthwise")
    assert isinstance(reason, str)
    assert compiler in reason
    assert not list(tmp_path.rglob("*"))


@needs_c
def test_the_library_is_compiled_once(tmp_path, monkeypatch):
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path))
    assert not isinstance(compiled._made.__wrapped__("depthwise"), str)
    assert len(list(tmp_path.rglob("*"))) == 2  # the folder and the library
    monkeypatch.setattr(compiled, "_compile", None)  # would fail if it were called again
    assert not isinstance(compiled._made.__wrapped__("depthwise"), str)


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 4, 3),
        nn.Conv2d(4, 4, 3, groups=2),
        nn.Conv2d(1, 1, 3),
        nn.Conv1d(4, 4, 3, groups=4),
        nn.Conv2d(4, 4, 3, groups=4, padding=1, padding_mode="reflect"),
        nn.Linear(4, 4),
    ],
)
def test_what_is_no_list_of_taps_is_refused(conv):
    with pytest.raises(UsageError):
        Taps.of(conv)


def test_bad_input():
    conv, mask = pruned(4, 3, 0.5)
    taps = Taps.of(conv, mask)
    for x in (torch.randn(1, 3, 8, 8), torch.randn(4, 8, 8), torch.randn(1, 4, 8, 8).double()):
        with pytest.raises(UsageError, match="float32 images of 4"):
            depthwise.depthwise(x, taps)
    with pytest.raises(UsageError, match="does not fit"):
        depthwise.depthwise(torch.randn(1, 4, 2, 8), taps)
    with pytest.raises(UsageError, match="no such backend"):
        depthwise.depthwise(torch.randn(1, 4, 8, 8), taps, "fast")
    with pytest.raises(UsageError, match="mask"):
        Taps.of(conv, mask[:2])
    assert depthwise.depthwise(torch.randn(0, 4, 8, 8), taps).shape == (0, 4, 6, 6)


@needs_c
def test_a_kernel_too_tall_for_the_c_is_left_to_torch():
    conv, mask = pruned(2, (70, 3), 0.5, padding=(35, 1))
    x = torch.randn(1, 2, 80, 12)
    ours = depthwise.depthwise(x, Taps.of(conv, mask), "c")
    assert torch.allclose(ours, expected(conv, mask, x), atol=5e-5)


@needs_c
def test_copies_of_lists_have_memory_of_their_own():
    conv, mask = pruned(4, 3, 0.5, padding=1)
    x, taps = torch.randn(1, 4, 9, 9), Taps.of(conv, mask)
    wanted = depthwise.depthwise(x, taps)
    for other in (copy.deepcopy(taps), pickle.loads(pickle.dumps(taps))):
        assert not other._layouts
        assert not set(other.pointers) & set(taps.pointers)
        assert torch.equal(depthwise.depthwise(x, other), wanted)


class Shifted(nn.Conv2d):
    def forward(self, x):
        return super().forward(nn.functional.pad(x, (0, 2, 0, 2)))


def test_what_computes_otherwise_is_no_list():
    weighted = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3, groups=4))
    for conv in (Shifted(4, 4, 3, groups=4), weighted):
        assert not depthwise.can_list(conv)
        with pytest.raises(UsageError, match="of its own"):
            Taps.of(conv)
    assert depthwise.can_list(nn.Conv2d(4, 4, 3, groups=4))
