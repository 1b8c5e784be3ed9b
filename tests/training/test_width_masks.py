"""Distributions over widths: identities, closed forms against autograd, and where they start."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from secateur.errors import NumericsError, UsageError
from secateur.training.width_masks import (
    candidate_widths,
    centred,
    chosen_width,
    expected_width,
    expected_width_gradient,
    first_logits,
    lifted,
    step_mask_gradient,
    step_masks,
    tilted,
    unit_masks,
    width_probabilities,
)

# Draws are small, but the machine may be busy.
relaxed = settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])
groups = st.tuples(st.integers(2, 96), st.integers(1, 40)).filter(lambda g: g[0] > g[1])


def logits_of(widths, seed, spread=2.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(widths), generator=generator, dtype=torch.float64) * spread


@relaxed
@given(groups, st.integers(0, 1000), st.floats(0.2, 5.0), st.floats(-50, 50))
def test_a_mask_is_a_falling_line_whose_mass_is_the_expected_width(group, seed, tau, shift):
    size, divisor = group
    widths = candidate_widths(size, divisor)
    u = logits_of(widths, seed)
    p = width_probabilities(u, tau)
    w = unit_masks(p, widths)
    assert w.shape == (size,)
    assert abs(float(w[0]) - 1) < 1e-12
    assert bool((w[1:] <= w[:-1] + 1e-15).all())
    assert torch.allclose(w.sum(), expected_width(p, widths))
    again = width_probabilities(u + shift, tau)
    assert torch.allclose(again, p, atol=1e-9)
    for how in ("mean", "mid-range", "none"):
        assert torch.allclose(width_probabilities(centred(u, how), tau), p, atol=1e-12)


@relaxed
@given(groups, st.integers(0, 1000), st.floats(0.3, 3.0))
def test_closed_forms_are_autograds(group, seed, tau):
    widths = candidate_widths(*group)
    u = logits_of(widths, seed).requires_grad_()
    p = width_probabilities(u, tau)
    (by_autograd,) = torch.autograd.grad(expected_width(p, widths), u)
    assert torch.allclose(by_autograd, expected_width_gradient(p.detach(), widths, tau), atol=1e-10)
    jacobian = torch.autograd.functional.jacobian(
        lambda v: step_masks(width_probabilities(v, tau)), u.detach()
    )
    assert torch.allclose(jacobian, step_mask_gradient(p.detach(), tau), atol=1e-10)
    assert not jacobian[0].abs().gt(1e-12).any()  # the first step can never be cut


def test_centring_makes_the_logits_as_small_as_they_can_be():
    u = torch.tensor([3.0, 5.0, 10.0])
    for how, order in (("mean", 2), ("mid-range", float("inf"))):
        least = torch.linalg.vector_norm(centred(u, how), order)
        for shift in torch.linspace(-10, 0, 101):
            assert least <= torch.linalg.vector_norm(u + shift, order) + 1e-5


def test_no_width_is_lost_for_good():
    u = torch.tensor([0.0, 500.0, -500.0])
    p = width_probabilities(lifted(u))
    assert bool((p > 1e-9).all())
    assert torch.allclose(p, width_probabilities(u), atol=1e-8)
    assert torch.equal(lifted(u / 100), u / 100)


@relaxed
@given(groups)
def test_candidates_end_at_the_whole_group_and_step_evenly(group):
    widths = candidate_widths(*group)
    steps = torch.diff(widths, prepend=torch.zeros(1, dtype=torch.int64))
    assert int(widths[-1]) == group[0]
    assert len(set(steps.tolist())) == 1
    assert int(steps[0]) <= group[1]


@relaxed
@given(st.integers(1, 400), st.integers(1, 16))
def test_a_whole_expected_width_is_not_rounded_up_by_float_dust(size, multiple):
    p = torch.zeros(size)
    p[-1] = 1
    dusty = float(expected_width(width_probabilities(p * 200), torch.arange(1, size + 1)))
    assert chosen_width(dusty * (1 + 1e-7), size, multiple) == size
    assert chosen_width(size / 2, size, multiple) % multiple == 0 or multiple > size / 2


@pytest.mark.parametrize("tau", [1.0, 2.5])
@pytest.mark.parametrize(("size", "divisor"), [(64, 2), (48, 8), (7, 1), (2, 1)])
def test_the_start_is_almost_dense(size, divisor, tau):
    widths = candidate_widths(size, divisor)
    p = width_probabilities(first_logits(widths, "max", tau=tau), tau)
    assert abs(float(p[-1]) - (size - divisor) / size) < 1e-6
    assert float(p[:-1].std(unbiased=False)) < 1e-6


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("init", ["max-entropy", "min-variance", "min-norm"])
def test_starts_of_a_given_width_are_the_best_of_a_dense_grid(init, share):
    widths = candidate_widths(5, 1)
    wanted = share * 5
    if not wanted > 1:
        wanted, share = 1.5, 0.3
    p = width_probabilities(first_logits(widths, init, share=share).double())
    assert abs(float(expected_width(p, widths)) - wanted) < 5e-3

    def value(q):
        if init == "max-entropy":
            return (q.clamp_min(1e-12).log() * q).sum(-1)
        if init == "min-norm":
            return q.square().sum(-1)
        return (q * (torch.arange(1, 6) - wanted) ** 2).sum(-1)

    # All distributions of that mean: two free coordinates follow from the others.
    grid = torch.linspace(0, 1, 61, dtype=torch.float64)
    a, b, c = torch.meshgrid(grid, grid, grid, indexing="ij")
    rest, mean = 1 - a - b - c, wanted - a - 2 * b - 3 * c
    d, e = 5 * rest - mean, mean - 4 * rest
    tried = torch.stack([a, b, c, d, e], -1)[(d >= 0) & (e >= 0)]
    assert float(value(p)) <= float(value(tried).min()) + 2e-3


def test_a_floor_is_the_first_width():
    assert candidate_widths(12, 2, 5).tolist() == [6, 8, 10, 12]
    assert candidate_widths(12, 3, 20).tolist() == [12]
    w = unit_masks(torch.tensor([0.5, 0.25, 0.125, 0.125]), candidate_widths(12, 2, 5))
    assert w.tolist() == [1.0] * 6 + [0.5] * 2 + [0.25] * 2 + [0.125] * 2


def test_bad_widths_are_refused():
    with pytest.raises(UsageError, match="no narrower width"):
        candidate_widths(8, 8)
    with pytest.raises(UsageError, match="no narrower width"):
        candidate_widths(1)
    with pytest.raises(UsageError, match="at least 1"):
        candidate_widths(8, 0)
    with pytest.raises(UsageError, match="unknown start"):
        first_logits(candidate_widths(8), "dense")
    with pytest.raises(UsageError, match="expected width"):
        first_logits(candidate_widths(8, 2), "min-norm", share=0.1)
    with pytest.raises(NumericsError):
        chosen_width(float("nan"), 8)


@pytest.mark.parametrize("tau", [0.1, 1.0, 4.0])
def test_tilting_gives_the_expected_width_that_is_wanted(tau):
    widths = candidate_widths(64)
    u = logits_of(widths, 0).float() * tau
    for wanted in (2, 3, 17, 40, 63, 64):
        tilt = tilted(u, widths, wanted, tau)
        p = width_probabilities(tilt, tau)
        assert chosen_width(float(expected_width(p, widths)), 64) == wanted
    mean = float(expected_width(width_probabilities(u, tau), widths))
    same = width_probabilities(tilted(u, widths, mean, tau), tau)
    assert torch.allclose(same, width_probabilities(u, tau), atol=1e-5)
