"""The OBS sweep against exact identities, brute force and the textbook loop."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from secateur.errors import NumericsError, UsageError
from secateur.masks.selection import select
from secateur.masks.target import Cut, Scope, Target
from secateur.solvers.obs import Factor, factorise, sweep
from secateur.solvers.obs_reference import factorise_reference, sweep_reference

F64 = torch.float64


def moments(d_in: int, tokens: int = 0, seed: int = 0, dead: tuple[int, ...] = ()) -> Tensor:
    """E[x x^T] of correlated inputs, float64."""
    generator = torch.Generator().manual_seed(seed)
    tokens = tokens or 4 * d_in
    mix = torch.randn(d_in, d_in, generator=generator, dtype=F64) / d_in**0.5
    x = torch.randn(tokens, d_in, generator=generator, dtype=F64) @ (mix + torch.eye(d_in))
    x[:, list(dead)] = 0
    return x.T @ x / tokens


def weights(d_out: int, d_in: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(d_out, d_in, generator=generator, dtype=F64)


def damped(moment: Tensor, factor: Factor) -> Tensor:
    alive = moment.diagonal()[~factor.dead].mean()
    out = moment.clone()
    out.diagonal().masked_fill_(factor.dead, alive.item()).add_(factor.damping * alive)
    return out


def quadratic(difference: Tensor, moment: Tensor) -> float:
    return float(0.5 * (difference @ moment * difference).sum())


def restricted(weight: Tensor, mask: Tensor, moment: Tensor) -> Tensor:
    """The exact optimum row by row, by brute-force normal equations."""
    out = torch.zeros_like(weight)
    for i in range(weight.shape[0]):
        keep = ~mask[i]
        if keep.any():
            rhs = moment[keep] @ weight[i]
            out[i, keep] = torch.linalg.solve(moment[keep][:, keep], rhs)
    return out


# --- the factor ------------------------------------------------------------------------------


def test_factor_holds_the_inverses_of_all_trailing_blocks():
    h = moments(12)
    factor = factorise(h, dtype=F64)
    upper, full = factor.upper, damped(h, factor)
    assert torch.equal(upper, upper.triu())
    assert torch.allclose(upper.T @ upper, torch.linalg.inv(full), atol=1e-12)
    for j in range(12):
        inverse = torch.linalg.inv(full[j:, j:])
        assert abs(float(upper[j, j] ** 2 - inverse[0, 0])) < 1e-12
        assert torch.allclose(upper[j, j:] / upper[j, j], inverse[0] / inverse[0, 0], atol=1e-11)


def test_factor_equals_the_three_step_form():
    h = moments(300)  # large enough to invert by halves
    ours, theirs = factorise(h, dtype=F64), factorise_reference(h)
    assert torch.allclose(ours.upper, theirs.upper, atol=1e-11)


def test_factor_scales_with_its_moment():
    h = moments(8)
    assert torch.allclose(
        factorise(h, dtype=F64).upper, 5 * factorise(25 * h, dtype=F64).upper, atol=1e-12
    )


def test_few_tokens_work_with_damping():
    factor = factorise(moments(32, tokens=5))
    assert factor.damping == 0.01
    assert torch.isfinite(factor.upper).all()


def test_damping_is_raised_and_recorded_when_needed():
    h = moments(16)
    vector = torch.linalg.eigh(h).eigenvectors[:, 0]
    indefinite = h - 0.05 * h.diagonal().mean() * torch.outer(vector, vector) * 10
    factor = factorise(indefinite, damping=0.01)
    assert 0.01 < factor.damping <= 1.0
    assert torch.isfinite(factor.upper).all()


def test_hopeless_matrix_names_module_and_tokens():
    indefinite = torch.eye(4) - 5 * torch.ones(4, 4) * (1 - torch.eye(4))
    with pytest.raises(NumericsError, match=r"'blocks\.3\.up' \(17 tokens\) cannot be factored"):
        factorise(indefinite, name="blocks.3.up", tokens=17)


def test_not_finite_and_all_zero_are_refused_by_name():
    with pytest.raises(NumericsError, match="'q' are not finite"):
        factorise(torch.full((3, 3), float("nan")), name="q")
    with pytest.raises(NumericsError, match=r"'expert\.7' saw nothing but zeros"):
        factorise(torch.zeros(3, 3), name="expert.7")


# --- the sweep -------------------------------------------------------------------------------

CUTS = [("0.5", "block:16"), ("0.5", "row"), ("0.7", "layer"), ("2:4", "row"), ("4:8", "row")]


@pytest.mark.parametrize(("target", "scope"), [*CUTS, ("16:32", "row")])
@pytest.mark.parametrize("dead", [(), (3, 17)])
def test_loss_is_the_damped_quadratic(target, scope, dead):
    h, w = moments(64, dead=dead), weights(24, 64)
    factor = factorise(h, dtype=F64)
    cut = Cut.of((24, 64), Target.parse(target), Scope.parse(scope))
    done = sweep(w, factor, cut, block_size=16)
    difference = w - done.weight
    difference[:, factor.dead] = 0  # a dead input costs nothing
    assert float(done.loss) == pytest.approx(quadratic(difference, damped(h, factor)), rel=1e-10)
    assert int(done.mask.sum()) == cut.count
    assert (done.weight[done.mask] == 0).all()
    assert not torch.signbit(done.weight[done.mask]).any()  # +0.0, not -0.0


def test_pruning_a_prefix_is_exact_least_squares():
    h, w = moments(24), weights(6, 24)
    factor = factorise(h, dtype=F64)
    mask = torch.zeros(6, 24, dtype=torch.bool)
    mask[:, :9] = True
    expected = restricted(w, mask, damped(h, factor))
    assert torch.allclose(sweep(w, factor, mask=mask).weight, expected, atol=1e-11)


@pytest.mark.parametrize("block_size", [1, 7, 16, 64])
def test_a_fixed_mask_does_not_see_the_block_size(block_size):
    h, w = moments(64), weights(8, 64)
    factor, mask = factorise(h, dtype=F64), torch.rand(8, 64) < 0.5
    ours = sweep(w, factor, mask=mask, block_size=block_size)
    oracle = sweep_reference(w, factor, mask=mask, block_size=block_size)
    whole = sweep_reference(w, factor, mask=mask, block_size=64)
    assert torch.allclose(ours.weight, oracle.weight, atol=1e-12)
    assert torch.allclose(oracle.weight, whole.weight, atol=1e-12)
    assert float(ours.loss) == pytest.approx(float(whole.loss), rel=1e-12)


def test_diagonal_moments_move_no_survivor():
    diagonal = torch.rand(32, dtype=F64) + 0.1
    w = weights(10, 32)
    factor = factorise(torch.diag(diagonal), dtype=F64)
    cut = Cut.of((10, 32), Target.parse(0.5), Scope("block", 32))
    done = sweep(w, factor, cut)
    assert torch.allclose(done.weight, w.masked_fill(done.mask, 0), atol=1e-14)
    damped_diagonal = diagonal + 0.01 * diagonal.mean()
    assert torch.equal(done.mask, select(w.square() * damped_diagonal, cut))


def test_input_scale_changes_only_the_loss():
    h, w = moments(32), weights(8, 32)
    cut = Cut.of((8, 32), Target.parse(0.5), Scope("block", 16))
    small, large = (sweep(w, factorise(m, dtype=F64), cut) for m in (h, 9 * h))
    assert torch.equal(small.mask, large.mask)
    assert torch.allclose(small.weight, large.weight, atol=1e-12)
    assert float(large.loss) == pytest.approx(9 * float(small.loss), rel=1e-10)


def test_a_fixed_mask_is_linear_in_the_rows():
    h, w = moments(16), weights(4, 16)
    factor, mask = factorise(h, dtype=F64), torch.rand(4, 16) < 0.5
    scale = torch.tensor([[1.0], [-2.0], [0.1], [30.0]], dtype=F64)
    one, two = sweep(w, factor, mask=mask).weight, sweep(scale * w, factor, mask=mask).weight
    assert torch.allclose(scale * one, two, atol=1e-11)


def test_update_helps_and_exact_helps_more():
    h, w = moments(48), weights(16, 48)
    factor = factorise(h, dtype=F64)
    full = damped(h, factor)
    mask = torch.rand(16, 48) < 0.6
    none = quadratic(w * mask, full)
    swept = quadratic(w - sweep(w, factor, mask=mask).weight, full)
    exact = quadratic(w - restricted(w, mask, full), full)
    assert none > swept > exact


def test_removing_one_weight_costs_what_obs_says():
    h = moments(7)
    full = damped(h, factorise(h, dtype=F64))
    w = weights(1, 7)
    inverse = torch.linalg.inv(full)
    for j in range(7):
        mask = torch.zeros(1, 7, dtype=torch.bool)
        mask[0, j] = True
        brute = quadratic(w - restricted(w, mask, full), full)
        assert brute == pytest.approx(float(0.5 * w[0, j] ** 2 / inverse[j, j]), rel=1e-10)


def test_removing_one_weight_with_a_gradient():
    """-g H^-1 g / 2 + (w - (H^-1 g)_m)^2 / (2 [H^-1]_mm): OBS that keeps the first-order term."""
    h = moments(5) + 0.1 * torch.eye(5, dtype=F64)
    w, g = weights(1, 5)[0], weights(1, 5, seed=9)[0]
    inverse = torch.linalg.inv(h)
    for m in range(5):
        others = [j for j in range(5) if j != m]
        # minimise g.d + d H d / 2 with d_m = -w_m over the other coordinates
        delta = torch.empty(5, dtype=F64)
        delta[m] = -w[m]
        rhs = -g[others] + h[others, m] * w[m]
        delta[others] = torch.linalg.solve(h[others][:, others], rhs)
        brute = g @ delta + 0.5 * delta @ h @ delta
        pull = inverse @ g
        formula = -0.5 * g @ pull + (w[m] - pull[m]) ** 2 / (2 * inverse[m, m])
        assert float(brute) == pytest.approx(float(formula), rel=1e-9)


def test_shared_inputs_share_one_factor():
    """q, k and v swept together are q, k and v swept alone (fixed masks)."""
    h = moments(32)
    factor = factorise(h, dtype=F64)
    parts = [weights(n, 32, seed=n) for n in (8, 4, 4)]
    masks = [torch.rand(part.shape) < 0.5 for part in parts]
    together = sweep(torch.cat(parts), factor, mask=torch.cat(masks)).weight
    alone = [sweep(part, factor, mask=m).weight for part, m in zip(parts, masks, strict=True)]
    assert torch.allclose(together, torch.cat(alone), atol=1e-12)


@pytest.mark.parametrize("target", ["0.5", "0.9", "2:4", "1:4"])
@pytest.mark.parametrize("columns", [256, 200])
def test_adaptive_mask_equals_the_textbook_loop(target, columns):
    h, w = moments(columns).float(), weights(64, columns).float()
    factor = factorise(h)
    cut = Cut.of((64, columns), Target.parse(target), Scope("block"))
    ours, oracle = sweep(w, factor, cut), sweep_reference(w, factor, cut)
    assert torch.equal(ours.mask, oracle.mask)
    assert torch.allclose(ours.weight, oracle.weight, atol=1e-5)
    assert float(ours.loss) == pytest.approx(float(oracle.loss), rel=1e-5)


def test_reference_threshold_takes_one_too_many_per_block():
    h, w = moments(256), weights(8, 256)
    cut = Cut.of((8, 256), Target.parse(0.5), Scope("block"))
    original = sweep_reference(w, factorise_reference(h), cut, inclusive=True)
    assert int(original.mask.sum()) == cut.count + 2


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 6),
    columns=st.integers(1, 40),
    share=st.floats(0, 1),
    scope=st.sampled_from(["row", "layer", "block:1", "block:7", "block:128"]),
    block_size=st.sampled_from([1, 5, 128]),
    integers=st.booleans(),
)
def test_adaptive_counts_are_exact(rows, columns, share, scope, block_size, integers):
    h, w = moments(columns, tokens=3), weights(rows, columns)
    w = w.round() if integers else w
    cut = Cut((rows, columns), round(share * rows * columns), Scope.parse(scope))
    done = sweep(w, factorise(h, dtype=F64), cut, block_size=block_size)
    assert int(done.mask.sum()) == cut.count
    assert (done.weight[done.mask] == 0).all()
    assert torch.isfinite(done.weight).all()
    if scope == "row":
        per_row = done.mask.sum(1)
        assert int(per_row.max() - per_row.min()) <= 1


def test_groups_are_exact_even_when_all_tie():
    w = torch.ones(4, 24, dtype=F64)
    cut = Cut.of((4, 24), Target.parse("2:4"), Scope("row"))
    done = sweep(w, factorise(torch.eye(24, dtype=F64), dtype=F64), cut)
    assert (done.mask.view(4, 6, 4).sum(-1) == 2).all()
    assert done.mask[0, :4].tolist() == [True, True, False, False]


@pytest.mark.parametrize(("target", "scope"), CUTS)
def test_forced_weights_go_first(target, scope):
    h, w = moments(64), weights(16, 64) * 100
    forced = torch.zeros(16, 64, dtype=torch.bool)
    forced[:, ::8] = True
    cut = Cut.of((16, 64), Target.parse(target), Scope.parse(scope))
    done = sweep(w, factorise(h, dtype=F64), cut, block_size=16, forced=forced)
    assert done.mask[forced].all()
    assert int(done.mask.sum()) == cut.count


def test_dead_inputs_go_first_and_survivors_keep_their_values():
    h, w = moments(32, dead=(5,)), weights(8, 32) * 10
    factor = factorise(h, dtype=F64)
    done = sweep(w, factor, Cut.of((8, 32), Target.parse(0.25), Scope("block", 32)))
    assert done.mask[:, 5].all()
    untouched = sweep(w, factor, mask=torch.zeros(8, 32, dtype=torch.bool))
    assert torch.equal(untouched.weight, w)
    assert float(untouched.loss) == 0


def test_half_precision_in_half_precision_out():
    h, w = moments(16).float(), weights(4, 16).to(torch.bfloat16)
    done = sweep(w, factorise(h), Cut.of((4, 16), Target.parse(0.5), Scope("block")))
    assert done.weight.dtype == torch.bfloat16
    assert torch.equal(w, weights(4, 16).to(torch.bfloat16))  # the input is left alone


def test_bad_calls():
    factor = factorise(moments(4))
    w = weights(2, 4)
    with pytest.raises(UsageError):
        sweep(w, factor)
    with pytest.raises(UsageError):
        sweep(w, factor, Cut((2, 4), 2), torch.zeros(2, 4, dtype=torch.bool))
    w[1, 1] = float("inf")
    with pytest.raises(NumericsError, match="1 of 8 weights of 'fc'"):
        sweep(w, factor, Cut((2, 4), 2), name="fc")


def test_the_sweep_finds_the_best_pair_of_masks_it_can_see():
    """On one row and two columns the adaptive choice is the brute-force best of a greedy pass."""
    h = torch.tensor([[1.0, 0.9], [0.9, 1.0]], dtype=F64)
    w = torch.tensor([[1.0, 0.2]], dtype=F64)
    factor = factorise(h, damping=0.0, dtype=F64)
    done = sweep(w, factor, Cut((1, 2), 1, Scope("block")))
    full = damped(h, factor)
    costs = {}
    for mask in itertools.permutations([True, False]):
        m = torch.tensor([mask])
        costs[mask] = quadratic(w - restricted(w, m, full), full)
    assert tuple(done.mask[0].tolist()) == min(costs, key=costs.__getitem__)
