"""Conjugate gradients against a Cholesky per row, and what can go wrong with them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from secateur.errors import NumericsError, UsageError
from secateur.solvers.least_squares import masked_least_squares, masked_least_squares_exact
from secateur.solvers.obs import factorise, sweep

F64 = torch.float64


def layer(
    d_out: int, d_in: int, tokens: int = 0, seed: int = 0, dtype: torch.dtype = F64
) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs (tokens, d_in) with unequal scales, E[x x^T], and a weight."""
    generator = torch.Generator().manual_seed(seed)
    tokens = tokens or 8 * d_in
    mix = torch.randn(d_in, d_in, generator=generator, dtype=F64) / d_in**0.5
    scales = torch.randn(d_in, generator=generator, dtype=F64).exp()
    x = torch.randn(tokens, d_in, generator=generator, dtype=F64) @ (mix + torch.eye(d_in)) * scales
    weight = torch.randn(d_out, d_in, generator=generator, dtype=F64)
    return x.to(dtype), (x.T @ x / tokens).to(dtype), weight.to(dtype)


def random_mask(weight: Tensor, share: float = 0.5, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(weight.shape, generator=generator) < share


@settings(max_examples=40, deadline=None)
@given(
    d_out=st.integers(1, 6),
    d_in=st.integers(1, 24),
    share=st.floats(0, 1),
    damping=st.sampled_from([0.0, 0.01, 0.3]),
    seed=st.integers(0, 100),
)
def test_agrees_with_a_cholesky_per_row(d_out, d_in, share, damping, seed):
    _, moment, weight = layer(d_out, d_in, seed=seed)
    mask = random_mask(weight, share)
    exact = masked_least_squares_exact(weight, mask, moment, damping=damping)
    ours, solved = masked_least_squares(
        weight, mask, moment, iterations=500, tolerance=1e-12, damping=damping
    )
    assert solved.converged == solved.rows == d_out
    assert (ours[mask] == 0).all()
    assert torch.allclose(ours, exact, atol=1e-7)


def test_the_optimum_is_that_of_ordinary_least_squares():
    x, moment, weight = layer(5, 16)
    mask = random_mask(weight)
    exact = masked_least_squares_exact(weight, mask, moment, damping=0.0)
    for row in range(5):
        keep = ~mask[row]
        fit = torch.linalg.lstsq(x[:, keep], (x @ weight[row])[:, None]).solution.squeeze(1)
        assert torch.allclose(exact[row, keep], fit, atol=1e-9)


def test_damping_pulls_to_the_dense_weight():
    _, moment, weight = layer(4, 12)
    mask = random_mask(weight)
    heavy = masked_least_squares_exact(weight, mask, moment, damping=1e9)
    assert torch.allclose(heavy, weight.masked_fill(mask, 0), atol=1e-6)


def test_targets_of_another_stream():
    """Reproduce W x_dense from x: brute-force least squares on the tokens themselves."""
    x, moment, weight = layer(4, 10)
    dense = x + 0.1 * torch.randn(x.shape, dtype=F64, generator=torch.Generator().manual_seed(5))
    mask = random_mask(weight)
    target = weight @ (dense.T @ x / len(x))
    options = {"target": target, "damping": 0.0}
    exact = masked_least_squares_exact(weight, mask, moment, **options)
    ours, _ = masked_least_squares(weight, mask, moment, iterations=300, tolerance=1e-12, **options)
    for row in range(4):
        keep = ~mask[row]
        fit = torch.linalg.lstsq(x[:, keep], (dense @ weight[row])[:, None]).solution.squeeze(1)
        assert torch.allclose(exact[row, keep], fit, atol=1e-9)
    assert torch.allclose(ours, exact, atol=1e-8)


def test_float32_reaches_the_optimum_of_an_ill_conditioned_layer():
    x, moment, weight = layer(32, 128, tokens=400, dtype=torch.float32)
    x[:, :3] *= 30  # outlier features, as in real language models
    moment = x.T @ x / len(x)
    mask = random_mask(weight)
    ours, solved = masked_least_squares(weight, mask, moment, iterations=200, tolerance=1e-5)
    exact = masked_least_squares_exact(weight, mask, moment)
    outputs = [(x @ (w - weight).T).norm() / (x @ weight.T).norm() for w in (ours, exact)]
    assert float(outputs[0]) <= float(outputs[1]) * 1.001
    assert solved.residual < 1e-4


def test_a_warm_start_saves_iterations_and_changes_nothing():
    _, moment, weight = layer(16, 64)
    mask = random_mask(weight)
    start = sweep(weight, factorise(moment, dtype=F64), mask=mask).weight
    tight = {"iterations": 400, "tolerance": 1e-8}
    cold, slow = masked_least_squares(weight, mask, moment, **tight)
    warm, fast = masked_least_squares(weight, mask, moment, start, **tight)
    assert torch.allclose(cold, warm, atol=1e-6)
    assert fast.iterations <= slow.iterations
    exact = masked_least_squares_exact(weight, mask, moment)
    again, done = masked_least_squares(weight, mask, moment, exact, tolerance=1e-6)
    assert done.iterations == 0
    assert torch.allclose(again, exact, atol=1e-12)


def test_rows_that_converge_early_are_left_alone():
    """Rows of very different difficulty: some leave the iteration, all end at their optimum."""
    _, moment, weight = layer(40, 48)
    mask = random_mask(weight, 0.5)
    mask[:30] = False  # thirty rows keep everything: solved at the start
    ours, solved = masked_least_squares(weight, mask, moment, iterations=300, tolerance=1e-10)
    assert torch.allclose(ours, masked_least_squares_exact(weight, mask, moment), atol=1e-7)
    assert torch.allclose(ours[:30], weight[:30], atol=1e-12)
    assert solved.converged == 40


def test_dead_inputs_everything_pruned_and_nothing_pruned():
    _, moment, weight = layer(3, 8)
    moment[:, 2] = moment[2] = 0
    for mask in (random_mask(weight), torch.ones(3, 8).bool(), torch.zeros(3, 8).bool()):
        ours, _ = masked_least_squares(weight, mask, moment, iterations=100, tolerance=1e-10)
        assert torch.isfinite(ours).all()
        assert (ours[mask] == 0).all()
        assert torch.allclose(ours[:, 2], weight[:, 2].masked_fill(mask[:, 2], 0))


def test_fewer_tokens_than_inputs():
    _, moment, weight = layer(4, 32, tokens=5)
    mask = random_mask(weight)
    ours, _ = masked_least_squares(weight, mask, moment, iterations=300, tolerance=1e-10)
    assert torch.allclose(ours, masked_least_squares_exact(weight, mask, moment), atol=1e-6)


def test_dtype_is_kept_and_bad_input_is_refused():
    _, moment, weight = layer(3, 8, dtype=torch.float32)
    mask = random_mask(weight)
    assert masked_least_squares(weight.bfloat16(), mask, moment)[0].dtype == torch.bfloat16
    with pytest.raises(UsageError, match="start"):
        masked_least_squares(weight, mask, moment, weight[:2])
    with pytest.raises(NumericsError, match="'up'"):
        masked_least_squares(weight, mask, moment * float("nan"), name="up")
    with pytest.raises(NumericsError, match="'up'"):
        masked_least_squares(weight * float("inf"), mask, moment, name="up")
