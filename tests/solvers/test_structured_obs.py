"""The engine against brute force, closed forms and the textbook loop (float64, small)."""

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.errors import NumericsError, UsageError
from secateur.solvers.groups import (
    HEAD_SCORES,
    centred,
    contiguous_groups,
    group_scores,
)
from secateur.solvers.obs import damp
from secateur.solvers.schedules import batch_sizes
from secateur.solvers.structured_obs import refit, remove_groups
from secateur.solvers.structured_reference import remove_groups_reference
from secateur.solvers.swaps import improve

NONE_DEAD = torch.zeros(1, dtype=torch.bool)


def problem(seed, rows=6, columns=16, tokens=200):
    """W and H of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    scale = torch.rand(columns, generator=generator, dtype=torch.float64) + 0.1
    x = torch.randn(tokens, columns, generator=generator, dtype=torch.float64) @ mix * scale
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return weight, x.T @ x / tokens, x


def damped(moment, damping=0.01):
    dead = moment.diagonal() == 0
    return damp(moment, dead, damping, torch.float64)


def quadratic(delta, moment):
    return float(((delta @ moment) * delta).sum())


def optimum(weight, x, gone, ridge):
    """min ||(W - V) x||^2 / tokens + ridge ||W - V||^2 over V with zero columns, by lstsq."""
    tokens = len(x)
    stacked = torch.cat([x / tokens**0.5, ridge**0.5 * torch.eye(x.shape[1]).double()])
    kept = stacked[:, ~gone]
    solution = torch.linalg.lstsq(kept, stacked @ weight.T).solution.T
    out = torch.zeros_like(weight)
    out[:, ~gone] = solution
    return out


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("score", HEAD_SCORES)
@pytest.mark.parametrize("rule", [1, 3, "1/4"])
def test_same_as_refactorising_every_round(size, score, rule):
    """Selection, weights and error of the slow form at equal group size."""
    weight, moment, _ = problem(size, columns=24)
    groups = contiguous_groups(24, size)
    batches = batch_sizes(len(groups) // 2, rule)
    expected, order, error = remove_groups_reference(weight, moment, groups, batches, score=score)
    for update in ("obs", "exact"):
        found = remove_groups(weight, moment, groups, batches, score=score, update=update)
        assert found.order == order
        assert torch.allclose(found.weight, expected, atol=1e-9)
        assert found.error == pytest.approx(error, rel=1e-9)
        assert torch.equal(found.gone, (expected == 0).all(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_problem_with_panels_and_compaction(dtype):
    """Past the panel's width and several compactions the result is still the slow form's."""
    weight, moment, _ = problem(5, rows=20, columns=400, tokens=1500)
    groups = contiguous_groups(400, 1)
    batches = batch_sizes(280, "150:7")
    expected, order, error = remove_groups_reference(weight, moment, groups, batches)
    found = remove_groups(weight, moment, groups, batches, dtype=dtype, update="obs")
    loose = dtype == torch.float32
    assert set(found.order) == set(order)
    assert loose or found.order == order
    assert torch.allclose(found.weight, expected, atol=1e-3 if loose else 1e-9)
    assert found.error == pytest.approx(error, rel=1e-4 if loose else 1e-9)


@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))
@settings(max_examples=30, deadline=None)
def test_result_is_the_least_squares_optimum(seed, count, size, batch):
    """Oracles 1 and 2: elimination = refit = lstsq, and the error is the quadratic form's."""
    columns = 6 * size
    weight, moment, x = problem(seed, rows=3, columns=columns)
    found = remove_groups(
        weight, moment, contiguous_groups(columns, size), batch_sizes(count, batch), update="obs"
    )
    ridge = 0.01 * float(moment.diagonal().mean())
    best = optimum(weight, x, found.gone, ridge)
    assert torch.allclose(found.weight, best, atol=1e-7)
    assert torch.allclose(refit(weight, damped(moment), found.gone), best, atol=1e-7)
    assert found.error == pytest.approx(quadratic(weight - best, damped(moment)), rel=1e-7)
    assert int(found.gone.sum()) == count * size


def test_closed_form_of_a_set():
    """Oracle 1: tr(W_S (B_SS)^-1 W_S^T) is the exact score of S as one group."""
    weight, moment, _ = problem(3, columns=8)
    chosen = torch.tensor([1, 4, 6])
    inverse = torch.linalg.inv(moment)
    score = group_scores(
        weight[:, chosen].unsqueeze(1), inverse[chosen][:, chosen].unsqueeze(0), "exact"
    )
    gone = torch.zeros(8, dtype=torch.bool)
    gone[chosen] = True
    assert float(score) == pytest.approx(
        quadratic(weight - refit(weight, moment, gone), moment), rel=1e-9
    )


def test_down_date_is_the_survivors_inverse():
    """Oracle 3: masked inverse on K = (H_KK)^-1 = Schur complement."""
    _, moment, _ = problem(9, columns=10)
    out, kept = torch.tensor([2, 5, 7]), torch.tensor([0, 1, 3, 4, 6, 8, 9])
    inverse = torch.linalg.inv(moment)
    schur = inverse - inverse[:, out] @ torch.linalg.inv(inverse[out][:, out]) @ inverse[out]
    masked = moment.clone()
    masked[out], masked[:, out] = 0, 0
    masked[out, out] = 1
    direct = torch.linalg.inv(moment[kept][:, kept])
    assert torch.allclose(schur[kept][:, kept], direct, rtol=1e-9)
    assert torch.allclose(torch.linalg.inv(masked)[kept][:, kept], direct, rtol=1e-9)


def test_slimgpt_score_is_the_diagonal_as_it_evolves():
    """Oracle 4: block Cholesky = one-by-one OBS down-dates inside the head, W frozen."""
    weight, moment, _ = problem(4, columns=12)
    inverse = torch.linalg.inv(moment)
    blocks = torch.stack([inverse[i : i + 4, i : i + 4] for i in (0, 4, 8)])
    expected = []
    for head in range(3):
        current, total = inverse.clone(), 0.0
        for t in range(4 * head, 4 * head + 4):
            total += float(weight[:, t].square().sum() / current[t, t])
            current = current - torch.outer(current[:, t], current[t]) / current[t, t]
        expected.append(total)
    found = group_scores(weight.view(6, 3, 4), blocks, "slimgpt")
    assert torch.allclose(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-9)


def test_two_column_example_of_the_three_scores():
    """Oracle 5: the exact score can lie on either side of the others."""
    block = torch.tensor([[[1.0, 0.9], [0.9, 1.0]]], dtype=torch.float64)

    def scores(a, b):
        weight = torch.tensor([[[a, b]]], dtype=torch.float64)
        return [float(group_scores(weight, block, rule)) for rule in HEAD_SCORES]

    assert scores(1.0, 1.0)[1:] == pytest.approx([2 / 1.9, 2.0])
    assert scores(1.0, -1.0) == pytest.approx([1 + 1 / 0.19, 20.0, 2.0])


@given(st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_slimgpt_score_is_at_least_the_initial_diagonals(seed):
    weight, moment, _ = problem(seed, columns=12)
    inverse = torch.linalg.inv(moment)
    blocks = torch.stack([inverse[i : i + 3, i : i + 3] for i in (0, 3, 6, 9)])
    by_head = weight.view(6, 4, 3)
    slim, initial = (group_scores(by_head, blocks, r) for r in ("slimgpt", "initial_diag"))
    assert bool((slim >= initial * (1 - 1e-12)).all())


def test_uncorrelated_inputs_need_no_compensation():
    """Oracle 5: H diagonal -> survivors unchanged, score = magnitude^2 H_tt, all scores agree."""
    weight, _, _ = problem(1, columns=8)
    moment = torch.diag(torch.linspace(0.5, 3.0, 8, dtype=torch.float64))
    groups = contiguous_groups(8, 2)
    runs = [remove_groups(weight, moment, groups, [1, 1], score=rule) for rule in HEAD_SCORES]
    for run in runs:
        assert run.order == runs[0].order
        assert torch.equal(run.weight[:, ~run.gone], weight[:, ~run.gone])
        expected = (weight.square() @ damped(moment)).view(6, 4, 2).sum((0, 2))
        assert torch.allclose(run.scores, expected)


def test_permuting_columns_permutes_the_mask_only():
    """Oracle 7."""
    weight, moment, _ = problem(8, columns=16)
    shuffle = torch.randperm(4, generator=torch.Generator().manual_seed(1))
    columns = (shuffle[:, None] * 4 + torch.arange(4)).flatten()
    groups = contiguous_groups(16, 4)
    plain = remove_groups(weight, moment, groups, [1, 1])
    moved = remove_groups(weight[:, columns], moment[columns][:, columns], groups, [1, 1])
    assert [int(shuffle[g]) for g in moved.order] == plain.order
    assert torch.allclose(moved.weight, plain.weight[:, columns], atol=1e-9)


@pytest.mark.parametrize("factor", [1e-6, 1e5])
def test_scale_of_the_inputs_changes_nothing(factor):
    """Oracle 7."""
    weight, moment, _ = problem(2)
    groups = contiguous_groups(16, 1)
    one, other = (remove_groups(weight, h, groups, [2, 2]) for h in (moment, moment * factor))
    assert one.order == other.order
    assert torch.allclose(one.weight, other.weight, atol=1e-9)


def test_groups_in_any_order_with_columns_that_must_stay():
    """Groups need not be contiguous, nor cover everything."""
    weight, moment, x = problem(11, columns=9)
    groups = torch.tensor([[7, 2], [0, 5], [8, 3]])
    found = remove_groups(weight, moment, groups, [1, 1], update="obs")
    assert not bool(found.gone[[1, 4, 6]].any())
    best = optimum(weight, x, found.gone, 0.01 * float(moment.diagonal().mean()))
    assert torch.allclose(found.weight, best, atol=1e-7)


def test_duplicate_channels_merge():
    """Oracle 9: of two identical channels one goes free and its weights join the other's."""
    weight, _, x = problem(6, columns=8)
    x[:, 5] = x[:, 2]
    moment = x.T @ x / len(x)
    found = remove_groups(weight, moment, contiguous_groups(8, 1), [1], damping=1e-10)
    assert found.order[0] in (2, 5)
    assert found.error < 1e-6 * quadratic(weight, moment)
    stays = 7 - found.order[0]
    assert torch.allclose(found.weight[:, stays], weight[:, 2] + weight[:, 5], atol=1e-4)


def test_dead_channels_go_first_and_cost_nothing():
    """Oracle 10; a dead channel that stays keeps its weights."""
    weight, _, x = problem(7, columns=8)
    x[:, [3, 6]] = 0
    moment = x.T @ x / len(x)
    one = remove_groups(weight, moment, contiguous_groups(8, 1), [1])
    assert one.order == [3]
    assert one.error == 0
    assert torch.equal(one.weight[:, 6], weight[:, 6])
    two = remove_groups(weight, moment, contiguous_groups(8, 1), [1, 1])
    assert two.order == [3, 6]
    live = [0, 1, 2, 4, 5, 7]
    assert torch.allclose(two.weight[:, live], weight[:, live], atol=1e-12)


def test_nothing_to_remove_returns_the_weights_bit_for_bit():
    weight, moment, _ = problem(0)
    found = remove_groups(weight, moment, contiguous_groups(16, 4), [])
    assert torch.equal(found.weight, weight)
    assert not bool(found.gone.any())
    assert found.error == 0


def test_without_compensation_survivors_stay_and_the_error_is_larger():
    weight, moment, _ = problem(12)
    groups = contiguous_groups(16, 1)
    plain = remove_groups(weight, moment, groups, [4, 4], update="none")
    fitted = remove_groups(weight, moment, groups, [4, 4])
    assert plain.order == fitted.order
    assert torch.equal(plain.weight[:, ~plain.gone], weight[:, ~plain.gone])
    assert plain.error == pytest.approx(quadratic(weight - plain.weight, damped(moment)), rel=1e-9)
    assert plain.error > fitted.error


def brute_force(weight, moment, groups, count):
    best = float("inf")
    for chosen in combinations(range(len(groups)), count):
        gone = torch.zeros(weight.shape[1], dtype=torch.bool)
        gone[groups[list(chosen)].flatten()] = True
        best = min(best, quadratic(weight - refit(weight, moment, gone), moment))
    return best


def test_selection_quality_against_all_subsets():
    """8 heads of 8, 3 removed: nearly always the best subset, and never better than it."""
    groups = contiguous_groups(64, 8)
    ratios = {rule: [] for rule in (*HEAD_SCORES, "magnitude")}
    for seed in range(8):
        weight, moment, _ = problem(seed, rows=16, columns=64)
        hessian = damped(moment)
        best = brute_force(weight, hessian, groups, 3)
        for rule in HEAD_SCORES:
            run = remove_groups(weight, moment, groups, [1, 1, 1], score=rule)
            ratios[rule].append(run.error / best)
        lightest = weight.view(16, 8, 8).square().sum((0, 2)).argsort()[:3]
        gone = torch.zeros(64, dtype=torch.bool)
        gone[groups[lightest].flatten()] = True
        ratios["magnitude"].append(quadratic(weight - refit(weight, hessian, gone), hessian) / best)
    mean = {rule: sum(values) / len(values) for rule, values in ratios.items()}
    assert all(value > 1 - 1e-9 for values in ratios.values() for value in values)
    assert mean["exact"] < 1.01
    assert mean["slimgpt"] < 1.03
    assert mean["magnitude"] > max(mean[rule] for rule in HEAD_SCORES)


def test_smaller_rounds_choose_better():
    """All at once loses to one by one; a shrinking schedule comes close to the latter."""
    totals = dict.fromkeys((128, 8, "64:1", 1), 0.0)
    for seed in range(3):
        weight, moment, _ = problem(seed, rows=32, columns=256, tokens=800)
        for rule in totals:
            run = remove_groups(
                weight, moment, contiguous_groups(256, 1), batch_sizes(128, rule), update="obs"
            )
            totals[rule] += run.error
    assert totals[1] < totals[128]
    assert totals["64:1"] < totals[128]
    assert totals[8] < 1.02 * totals[1]
    assert totals["64:1"] < 1.02 * totals[1]


@given(st.integers(0, 10_000), st.integers(1, 5))
@settings(max_examples=20, deadline=None)
def test_local_search_never_loses_and_keeps_the_count(seed, count):
    weight, moment, _ = problem(seed, rows=4, columns=12)
    groups = contiguous_groups(12, 2)
    generator = torch.Generator().manual_seed(seed)
    gone = torch.zeros(12, dtype=torch.bool)
    gone[groups[torch.randperm(6, generator=generator)[:count]].flatten()] = True
    start = quadratic(weight - refit(weight, damped(moment), gone), damped(moment))
    after, error, _ = improve(weight, damped(moment), groups, gone)
    assert int(after.sum()) == 2 * count
    assert error <= start * (1 + 1e-9)
    assert error >= brute_force(weight, damped(moment), groups, count) * (1 - 1e-9)
    fitted = refit(weight, damped(moment), after)
    assert error == pytest.approx(quadratic(weight - fitted, damped(moment)), rel=1e-7)


def test_local_search_repairs_a_bad_start():
    """From the *dearest* groups it gets most of the way to the best subset."""
    weight, moment, _ = problem(21, rows=8, columns=16)
    groups = contiguous_groups(16, 2)
    hessian = damped(moment)
    inverse = torch.linalg.inv(hessian)
    blocks = torch.stack([inverse[g][:, g] for g in groups])
    dearest = group_scores(weight.view(8, 8, 2), blocks, "exact").argsort()[-3:]
    gone = torch.zeros(16, dtype=torch.bool)
    gone[groups[dearest].flatten()] = True
    start = quadratic(weight - refit(weight, hessian, gone), hessian)
    best = brute_force(weight, hessian, groups, 3)
    _, error, done = improve(weight, hessian, groups, gone)
    assert done >= 1
    assert error < 0.7 * start
    assert error < 1.25 * best


def test_removal_with_swaps_is_consistent():
    weight, moment, _ = problem(14, rows=8, columns=64)
    groups = contiguous_groups(64, 1)
    plain = remove_groups(weight, moment, groups, [32])
    swapped = remove_groups(weight, moment, groups, [32], swaps=20)
    assert swapped.error < plain.error
    assert swapped.notes["swaps"] >= 1
    assert sorted(swapped.order) == swapped.gone.nonzero().flatten().tolist()
    assert swapped.error == pytest.approx(
        quadratic(weight - swapped.weight, damped(moment)), rel=1e-7
    )


def test_groups_gone_already_go_first_whatever_else_is_free():
    """A unit cut earlier must not be spared for a dead one that happens to come before it."""
    weight, _, x = problem(16, columns=12)
    x[:, [0, 1, 8, 9]] = 0
    moment = x.T @ x / len(x)
    groups = contiguous_groups(12, 2)
    first = torch.tensor([False] * 4 + [True, False])
    assert remove_groups(weight, moment, groups, [], first=first).order == [4]
    assert remove_groups(weight, moment, groups, [1], first=first).order == [4, 0]


def test_local_search_never_brings_a_gone_group_back():
    weight, moment, _ = problem(18, rows=8, columns=32)
    first = torch.zeros(32, dtype=torch.bool)
    first[torch.randperm(32, generator=torch.Generator().manual_seed(0))[:10]] = True
    weight[:, first] = 0
    found = remove_groups(
        weight, moment, contiguous_groups(32, 1), [10], first=first, swaps=20, score="exact"
    )
    assert bool(found.gone[first].all())
    assert int(found.gone.sum()) == 20


def test_the_bias_takes_over_the_mean_of_what_goes():
    """Equal to least squares with a constant input; better than leaving the bias alone."""
    weight, _, x = problem(19, columns=12)
    x = x + 3 * torch.randn(12, generator=torch.Generator().manual_seed(1)).double()
    bias = torch.randn(6, generator=torch.Generator().manual_seed(2)).double()
    moment, groups = x.T @ x / len(x), contiguous_groups(12, 2)
    mean = x.mean(0)
    found = remove_groups(weight, centred(moment, mean), groups, [1, 1], damping=1e-9)
    moved = bias + (weight - found.weight) @ mean
    target = x @ weight.T + bias
    inputs = torch.cat([x[:, ~found.gone], torch.ones(len(x), 1).double()], 1)
    best = inputs @ torch.linalg.lstsq(inputs, target).solution
    assert torch.allclose(x @ found.weight.T + moved, best, atol=1e-5)
    plain = refit(weight, moment, found.gone)
    assert (best - target).square().sum() < 0.9 * (x @ plain.T + bias - target).square().sum()


@pytest.mark.parametrize("batches", [[1] * 6, [4, 2], [6]])
def test_even_removal_takes_the_same_number_from_every_run(batches):
    weight, moment, x = problem(17, columns=24)
    groups = contiguous_groups(24, 2)
    found = remove_groups(weight, moment, groups, batches, even=3, update="obs")
    assert [sum(g // 4 == run for g in found.order) for run in range(3)] == [2, 2, 2]
    best = optimum(weight, x, found.gone, 0.01 * float(moment.diagonal().mean()))
    assert torch.allclose(found.weight, best, atol=1e-7)
    with pytest.raises(UsageError, match="evenly"):
        remove_groups(weight, moment, groups, [1], even=3)


# -- degenerate and bad input ----------------------------------------------------------------


def test_fewer_tokens_than_columns_raises_the_damping_and_says_so():
    weight, _, _ = problem(0, columns=24)
    x = torch.randn(5, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = remove_groups(weight, x.T @ x / 5, contiguous_groups(24, 1), [6, 6], damping=0.0)
    assert found.notes["damping"] > 0
    assert bool(torch.isfinite(found.weight).all())
    assert int(found.gone.sum()) == 12


def test_drifted_inverse_is_refreshed():
    """Nearly singular H in float32 still ends at the optimum of its columns."""
    weight, moment, _ = problem(15, rows=8, columns=96, tokens=40)
    found = remove_groups(
        weight, moment, contiguous_groups(96, 1), batch_sizes(60, 4), damping=1e-7,
        dtype=torch.float32,
    )  # fmt: skip
    best = refit(weight, damped(moment, found.notes["damping"]), found.gone)
    excess = quadratic(weight - found.weight.double(), damped(moment, found.notes["damping"]))
    floor = quadratic(weight - best, damped(moment, found.notes["damping"]))
    assert excess <= 1.05 * floor + 1e-3 * quadratic(weight, moment)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_infinite_evidence_or_weights_are_named(bad):
    weight, moment, _ = problem(0)
    groups = contiguous_groups(16, 1)
    broken = moment.clone()
    broken[0, 0] = bad
    with pytest.raises(NumericsError, match=r"layer\.7"):
        remove_groups(weight, broken, groups, [1], name="layer.7")
    weight[0, 0] = bad
    with pytest.raises(NumericsError, match=r"layer\.7"):
        remove_groups(weight, moment, groups, [1], name="layer.7")


def test_all_dead_is_named():
    weight, moment, _ = problem(0)
    with pytest.raises(NumericsError, match=r"layer\.7"):
        remove_groups(weight, 0 * moment, contiguous_groups(16, 1), [1], name="layer.7")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_computed_wide_and_cast_back(dtype):
    weight, moment, _ = problem(0)
    found = remove_groups(weight.to(dtype), moment.float(), contiguous_groups(16, 1), [4])
    wide = remove_groups(weight.to(dtype).double(), moment.float(), contiguous_groups(16, 1), [4])
    assert found.weight.dtype == dtype
    assert found.order == wide.order
    assert torch.equal(found.weight, wide.weight.to(dtype))


def test_what_does_not_fit_is_refused():
    weight, moment, _ = problem(0)
    with pytest.raises(UsageError, match="at least one must stay"):
        remove_groups(weight, moment, contiguous_groups(16, 4), [4])
    with pytest.raises(UsageError, match="at least one must stay"):
        remove_groups(weight, moment, contiguous_groups(16, 16), [1])
    with pytest.raises(UsageError, match="no whole number of groups"):
        contiguous_groups(16, 3)
    with pytest.raises(UsageError, match="moments are square"):
        remove_groups(weight, moment[:8, :8], contiguous_groups(16, 4), [1])
    with pytest.raises(UsageError, match="one group at most"):
        remove_groups(weight, moment, torch.tensor([[0, 1], [1, 2]]), [1])
    with pytest.raises(UsageError, match="no such column"):
        remove_groups(weight, moment, torch.tensor([[0, 1], [2, 16]]), [1])
    with pytest.raises(UsageError, match="head_score"):
        remove_groups(weight, moment, contiguous_groups(16, 4), [1], score="best")


# -- schedules -------------------------------------------------------------------------------


@given(st.integers(0, 5000), st.sampled_from(["published", "1/32", "1/1", 1, 7, "64:8", "100:1"]))
def test_schedules_add_up_and_shrink(count, rule):
    sizes = batch_sizes(count, rule)
    assert sum(sizes) == count
    assert all(size >= 1 for size in sizes)
    assert sizes == sorted(sizes, reverse=True)


def test_published_schedule():
    """The figures of the release for LLaMA-7B; small targets go all at once."""
    assert batch_sizes(5504, "published") == [1024, 992, 240, *[64] * 50, 48]
    assert batch_sizes(2752, "published")[:3] == [1024, 304, 64]
    assert batch_sizes(64, "published") == [64]


@pytest.mark.parametrize("rule", ["", "0", "8:64", "1/0", "fast", "-3", "1.5"])
def test_unreadable_schedule_is_refused(rule):
    with pytest.raises(UsageError, match="group_size"):
        batch_sizes(10, rule)
