"""The adapters' maths against the formulas written out, and against finite differences."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck
from torch.nn import functional as F

from secateur.kernels.masking import ROWS, keep_only
from secateur.training.low_rank import (
    KINDS,
    MASKED,
    Drop,
    added_linear,
    dropped,
    effective,
    masked_linear,
    merged,
    start,
)


def case(rows=7, columns=11, rank=3, seed=0, dtype=torch.float64, sparsity=0.5):
    """W zero where it is gone, K, A, B (leaves)."""
    g = torch.Generator().manual_seed(seed)
    keep = (torch.rand(rows, columns, generator=g) >= sparsity).to(torch.uint8)
    weight = torch.randn(rows, columns, generator=g, dtype=dtype) * keep
    a = torch.randn(rank, columns, generator=g, dtype=dtype, requires_grad=True)
    b = torch.randn(rows, rank, generator=g, dtype=dtype, requires_grad=True)
    return weight, keep, a, b


def written_out(kind, weight, keep, a, b, scale, part=None):
    """The effective weights as the papers write them, by plain autograd operations."""
    ba = b @ a
    if part is not None:
        ba = ba * part / (1 if kind == "scale-lora" else 0.7)
    return {
        "lora": weight + scale * ba,
        "lora-prune": weight + scale * ba,
        "mask-lora": weight + scale * (keep * ba),
        "scale-lora": weight * (ba if part is None else ba + (1 - part)),
        "spp": weight + scale * (weight * ba),
    }[kind]


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("kind", MASKED)
def test_gradients_are_those_of_finite_differences(kind, dropout):
    weight, keep, a, b = case()
    x = torch.randn(2, 5, 11, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(7, dtype=torch.float64, requires_grad=True)
    drop = Drop(0.3, 7) if dropout else None
    assert gradcheck(
        lambda *t: masked_linear(t[0], weight, keep, t[1], t[2], t[3], 2.0, kind, drop),
        (x, a, b, bias),
    )


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("kind", MASKED)
def test_the_fused_layer_is_the_formula_written_out(kind, dropout):
    weight, keep, a, b = case(rows=ROWS + 9)
    x = torch.randn(4, 11, dtype=torch.float64, requires_grad=True)
    drop = Drop(0.3, 5) if dropout else None
    part = dropped(weight.shape, drop, weight.device) if drop else None
    upstream = torch.randn(4, ROWS + 9, dtype=torch.float64)
    y = masked_linear(x, weight, keep, a, b, None, 1.5, kind, drop)
    ours = torch.autograd.grad(y, (x, a, b), upstream)
    plain = F.linear(x, written_out(kind, weight, keep, a, b, 1.5, part))
    torch.testing.assert_close(y, plain)
    for got, wanted in zip(ours, torch.autograd.grad(plain, (x, a, b), upstream), strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("kind", ["lora", "lora-prune"])
def test_added_to_the_output_it_is_the_weight_written_out(kind):
    weight, keep, a, b = case()
    x = torch.randn(2, 3, 11, dtype=torch.float64)
    y = added_linear(x, F.linear(x, weight), a, b, 0.5)
    torch.testing.assert_close(y, F.linear(x, written_out(kind, weight, keep, a, b, 0.5)))


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(KINDS),
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(1, 50),
    st.floats(0, 1),
    st.integers(0, 2**31),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_merging_keeps_every_zero_and_starts_from_the_weight(
    kind, rows, columns, rank, sparsity, seed, dtype
):
    """For any shape (all-zero rows, r beyond both sides), start and update."""
    weight, keep, a, b = case(rows, columns, rank, seed, torch.float32, sparsity)
    weight = weight.to(dtype)
    gone = keep == 0
    generator = torch.Generator().manual_seed(seed)
    for init in ("broken", "ones"):
        a0, b0 = start(kind, (rows, columns), rank, generator, init)
        same = effective(kind, weight, keep, a0, b0, 2.0)
        torch.testing.assert_close(same, weight)
        if kind != "scale-lora" or init == "broken":
            assert torch.equal(same, weight), "to the bit, unless 1/√r squared is not 1/r"
    new = merged(kind, weight, keep, a.detach(), b.detach(), 2.0)
    assert (new[gone] == 0).all()
    assert not torch.signbit(new[gone]).any(), "no negative zeros"
    if dtype == torch.float32 and kind in MASKED:
        assert torch.equal(new, effective(kind, weight, keep, a.detach(), b.detach(), 2.0) + 0.0)


def test_lora_prune_loses_on_merging_what_lies_on_the_zeros():
    weight, keep, a, b = case(dtype=torch.float32)
    a, b = a.detach(), b.detach()
    trained, new = (f("lora-prune", weight, keep, a, b, 1.0) for f in (effective, merged))
    kept = keep == 1
    torch.testing.assert_close(trained[kept], new[kept])
    assert (trained[~kept] != 0).all()


def test_a_kept_weight_that_is_zero_may_learn():
    """The mask is explicit: W = 0 does not mean gone."""
    weight, keep = torch.zeros(2, 3), torch.tensor([[1, 0, 1], [0, 1, 1]], dtype=torch.uint8)
    new = merged("mask-lora", weight, keep, torch.ones(1, 3), torch.ones(2, 1), 1.0)
    assert torch.equal(new, keep.float())


@pytest.mark.parametrize("kind", MASKED)
def test_only_the_input_is_kept_for_backward(kind):
    """No weight-sized tensor beside the weight and its mask lives between forward and backward."""
    weight, keep, a, b = case(64, 48, dtype=torch.float32)
    x = torch.randn(5, 48, requires_grad=True)
    y = masked_linear(x, weight, keep, a, b, None, 1.0, kind)
    saved = y.grad_fn.saved_tensors
    assert {t.data_ptr() for t in saved} == {t.data_ptr() for t in (x, weight, keep, a, b)}


def test_nothing_is_computed_for_what_wants_no_gradient():
    weight, keep, a, b = case()
    x = torch.randn(5, 11, dtype=torch.float64)
    masked_linear(x, weight, keep, a, b, None, 1.0, "mask-lora").sum().backward()
    assert x.grad is None
    assert a.grad is not None
    x = x.requires_grad_()
    out = masked_linear(x, weight, keep, a.detach(), b.detach(), None, 1.0, "mask-lora")
    out.sum().backward()
    assert x.grad is not None


def test_the_mask_is_applied_beyond_the_first_rows():
    keep = torch.zeros(2 * ROWS + 1, 3, dtype=torch.uint8)
    keep[-1, 0] = 1
    masked = keep_only(torch.ones(2 * ROWS + 1, 3, dtype=torch.bfloat16), keep)
    assert masked.sum() == 1
    assert masked[-1, 0] == 1


def train(kind, init, steps=300, rank=8, rows=24, columns=32):
    """Full-batch Adam on one masked layer towards a random one; A, B and the two losses."""
    g = torch.Generator().manual_seed(0)
    weight, keep, *_ = case(rows, columns, dtype=torch.float32)
    wanted = torch.randn(rows, columns, generator=g) * keep
    x = torch.randn(256, columns, generator=g)
    a, b = (t.requires_grad_() for t in start(kind, (rows, columns), rank, g, init))
    optimizer = torch.optim.Adam([a, b], lr=0.02)
    losses = []
    for _ in range(steps):
        y = masked_linear(x, weight, keep, a, b, None, 1.0, kind)
        loss = (y - x @ wanted.T).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return a.detach(), b.detach(), losses


def test_scale_lora_as_published_stays_of_rank_one_and_the_broken_start_does_not():
    def spectrum(init):
        a, b, losses = train("scale-lora", init)
        values = torch.linalg.svdvals((b @ a).double())
        return float(values[1] / values[0]), losses[-1]

    ones, stuck = spectrum("ones")
    broken, free = spectrum("broken")
    assert ones < 1e-5
    assert broken > 0.1
    assert free < 0.9 * stuck


def test_with_enough_rank_mask_lora_reaches_each_rows_masked_least_squares():
    """The oracle: one lstsq a row over the columns it keeps."""
    rows, columns = 24, 32
    g = torch.Generator().manual_seed(1)
    weight, keep, *_ = case(rows, columns, sparsity=0.5)
    x = torch.randn(200, columns, generator=g, dtype=torch.float64)
    y = torch.randn(200, rows, generator=g, dtype=torch.float64)
    best = torch.zeros_like(weight)
    for j in range(rows):
        mine = keep[j].bool()
        best[j, mine] = torch.linalg.lstsq(x[:, mine], y[:, j]).solution
    a, b = (t.double().requires_grad_() for t in start("mask-lora", weight.shape, columns, g))
    # L-BFGS: a smooth problem whose optimum is known wants no learning rate.
    optimizer = torch.optim.LBFGS(
        [a, b],
        max_iter=3000,
        tolerance_grad=1e-12,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def loss():
        optimizer.zero_grad()
        out = masked_linear(x, weight, keep, a, b, None, 1.0, "mask-lora")
        value = (out - y).square().mean()
        value.backward()
        return value

    optimizer.step(loss)
    got = effective("mask-lora", weight, keep, a.detach(), b.detach(), 1.0)
    torch.testing.assert_close(got, best, atol=1e-4, rtol=0)
