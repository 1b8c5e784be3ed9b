"""ALS against brute force: the redundancy metric, the linear programmes, both stages."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.allocation.als import ALS, independence, share_out, suffix_mean
from secateur.allocation.base import Problem
from secateur.errors import UsageError
from secateur.evidence.readings import BlockFacts, MatrixFacts
from secateur.evidence.redundancy import (
    BlockFeatures,
    MatrixRedundancy,
    normalised,
    redundancy,
    redundancy_of_features,
    token_gram,
)
from secateur.masks.target import Target
from secateur.solvers.knapsack import fractional_knapsack, interior, linear_programme


def features(n, tokens=24, width=6, seed=0):
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(tokens, width, generator=random, dtype=torch.float64) for _ in range(n)]


# -- the redundancy metric -------------------------------------------------------------------------


def test_redundancy_is_symmetric_with_a_unit_diagonal_and_within_0_and_1():
    psi = redundancy([token_gram(x.float()) for x in features(5)])
    assert torch.equal(psi, psi.T)
    assert torch.equal(psi.diagonal(), torch.ones(5, dtype=torch.float64))
    assert bool(((psi >= 0) & (psi <= 1)).all())


def test_gram_form_equals_feature_form():
    xs = features(4, tokens=20, width=9)
    grams = [x @ x.T for x in xs]
    torch.testing.assert_close(redundancy(grams), redundancy_of_features(xs), rtol=0, atol=1e-12)


def test_scaling_and_rotating_features_changes_nothing():
    xs = features(3, width=7)
    q, _ = torch.linalg.qr(torch.randn(7, 7, dtype=torch.float64))
    moved = [xs[0], 3.5 * xs[1] @ q, xs[2]]
    torch.testing.assert_close(
        redundancy_of_features(xs), redundancy_of_features(moved), rtol=0, atol=1e-12
    )


def test_disjoint_tokens_are_not_redundant_and_equal_features_wholly():
    x = torch.zeros(8, 3, dtype=torch.float64)
    y = torch.zeros(8, 3, dtype=torch.float64)
    x[:4], y[4:] = 1.0, 2.0
    psi = redundancy_of_features([x, y, 5 * y])
    assert float(psi[0, 1]) == 0
    assert float(psi[1, 2]) == pytest.approx(1)


def test_constant_features_are_redundant_with_nothing():
    x = normalised(torch.ones(8, 3), "centre")
    psi = redundancy([token_gram(x), token_gram(torch.randn(8, 3))])
    assert psi.tolist() == [[1, 0], [0, 1]]


def test_normalising():
    x = 3 + 2 * torch.randn(50, 4)
    assert torch.equal(normalised(x, "none"), x)
    assert float(normalised(x, "centre").mean(0).abs().max()) < 1e-5
    assert normalised(x, "standardise").square().mean(0).tolist() == pytest.approx(
        [1] * 4, abs=1e-4
    )


def test_identity_blocks_are_the_most_redundant_and_give_most():
    """Half of the blocks of a residual stream do nothing: they carry what others carry."""
    random = torch.Generator().manual_seed(1)
    stream = [torch.randn(256, 16, generator=random)]
    for block in range(8):
        new = torch.randn(256, 16, generator=random)
        stream.append(stream[-1] if block >= 4 else stream[-1] * 0.4 + new)
    psi = redundancy([token_gram(normalised(x)) for x in stream[:-1]])
    rho = psi.sum(1) - 1
    assert set(rho.argsort(descending=True)[:4].tolist()) == {4, 5, 6, 7}
    ratios = share_out(independence(psi), [100] * 8, 0.5, [0.4] * 8, [0.6] * 8)
    assert max(ratios[4:]) <= 0.6 + 1e-12
    assert min(ratios[4:]) >= max(ratios[:4]) - 1e-9


# -- values ----------------------------------------------------------------------------------------


def test_independence_and_suffix_mean_by_hand():
    psi = torch.tensor([[1, 0.5], [0.5, 1]], dtype=torch.float64)
    assert independence(psi).tolist() == [1, 1]  # equal, scaled to 1
    psi = torch.tensor([[1, 0.2, 0.6], [0.2, 1, 0.1], [0.6, 0.1, 1]], dtype=torch.float64)
    rho, mean = np.array([0.8, 0.3, 0.7]), np.array([1.8, 1.3, 1.7]) / 3
    for mu, scale in (("row", mean), ("global", 4.8 / 9), (0.5, 0.5)):
        wanted = np.exp(-rho / scale)
        assert independence(psi, mu) == pytest.approx(wanted / wanted.max())
    assert suffix_mean(np.array([1.0, 2.0, 6.0])) == pytest.approx([3.0, 4.0, 6.0])


# -- linear programmes -----------------------------------------------------------------------------

ITEMS = st.integers(1, 6).flatmap(
    lambda n: st.tuples(
        st.lists(st.floats(0.01, 1), min_size=n, max_size=n),
        st.lists(st.integers(1, 50), min_size=n, max_size=n),
        st.floats(0, 1),
    )
)


@given(ITEMS)
@settings(max_examples=60, deadline=None)
def test_the_closed_form_equals_highs(items):
    values, sizes, part = items
    low, high = [0.3] * len(sizes), [0.7] * len(sizes)
    budget = (0.3 + 0.4 * part) * sum(sizes)
    ours = fractional_knapsack(values, sizes, budget, low, high)
    theirs = linear_programme(values, sizes, budget, low, high)
    assert np.dot(values, ours) == pytest.approx(np.dot(values, theirs), rel=1e-6)
    assert np.dot(sizes, ours) == pytest.approx(budget, rel=1e-9)


@given(ITEMS)
@settings(max_examples=30, deadline=None)
def test_the_closed_form_beats_every_point_of_a_grid(items):
    values, sizes, part = items
    budget = (0.3 + 0.4 * part) * sum(sizes)
    n = len(sizes)
    ours = fractional_knapsack(values, sizes, budget, [0.3] * n, [0.7] * n)
    for x in itertools.product((0.3, 0.5, 0.7), repeat=n):
        if np.dot(sizes, x) <= budget:
            assert np.dot(values, x) <= np.dot(values, ours) + 1e-9


def test_values_of_1e_minus_14_still_find_the_right_vertex():
    values = np.exp(-np.linspace(0, 32, 32)) * 1e-14
    sizes = [1000] * 32
    ours = fractional_knapsack(values, sizes, 16_000, [0.4] * 32, [0.6] * 32)
    theirs = linear_programme(values, sizes, 16_000, [0.4] * 32, [0.6] * 32)
    assert ours == pytest.approx([0.6] * 16 + [0.4] * 16)
    assert theirs[:12] == pytest.approx(ours[:12])


def test_scaling_the_values_changes_nothing():
    sizes = [3, 5, 2, 7]
    values = [0.1, 0.9, 0.4, 0.3]
    one = fractional_knapsack(values, sizes, 8, [0.2] * 4, [0.8] * 4)
    other = fractional_knapsack([1e-9 * v for v in values], sizes, 8, [0.2] * 4, [0.8] * 4)
    assert one.tolist() == other.tolist()


def test_equal_items_share_equally():
    x = fractional_knapsack([1, 1, 1, 1], [10] * 4, 22, [0.4] * 4, [0.7] * 4)
    assert x == pytest.approx([0.55] * 4)


def test_all_but_one_lie_on_a_bound():
    random = np.random.default_rng(0)
    x = fractional_knapsack(random.random(20), [100] * 20, 1050, [0.4] * 20, [0.6] * 20)
    assert sum(0.4 + 1e-9 < v < 0.6 - 1e-9 for v in x) <= 1


def test_the_interior_solution_is_optimal_monotone_and_spends_the_budget():
    random = np.random.default_rng(1)
    values, sizes = random.random(8), random.integers(5, 20, 8)
    budget = 0.5 * sizes.sum()
    x = interior(values, sizes, budget, [0.2] * 8, [0.8] * 8, 8.0)
    assert np.dot(sizes, x) == pytest.approx(budget)
    scaled = values / values.max()

    def objective(y):
        return scaled @ y - 4.0 * ((y - 0.5) ** 2).sum()

    for i, j in itertools.permutations(range(8), 2):  # no transfer of budget helps
        moved = x.copy()
        moved[i] += 1e-4 / sizes[i]
        moved[j] -= 1e-4 / sizes[j]
        assert objective(moved) <= objective(x) + 1e-12
    equal = interior(values, [10] * 8, 40, [0.2] * 8, [0.8] * 8, 8.0)
    assert np.argsort(equal).tolist() == np.argsort(values).tolist()


# -- both stages -----------------------------------------------------------------------------------


def problem(blocks=4, sparsity="0.5", seed=0, width=32):
    """A problem read off random activations, as a dense pass would."""
    random = torch.Generator().manual_seed(seed)
    shapes, names, roles, facts = {}, [], {}, []
    for b in range(blocks):
        matrices, found = [], {}
        found["input"] = torch.randn(64, 8, generator=random) + (b < 2)
        found["output"] = torch.randn(64, 8, generator=random)
        for role, rows in (("q", 16), ("up", 48), ("down", 24)):
            name = f"layers.{b}.{role}"
            shapes[name], roles[name] = (rows, width), role
            matrices.append(MatrixFacts(name, role, (rows, width), lambda: torch.zeros(1)))
            found[f"{name}|input"] = torch.randn(64, width, generator=random)
            found[f"{name}|output"] = torch.randn(64, rows, generator=random)
        names.append(tuple(m.name for m in matrices))
        facts.append(BlockFacts(b, f"layers.{b}", matrices, found))
    readings = {
        r: [r.read(f) for f in facts]
        for r in (
            BlockFeatures("input"),
            BlockFeatures("output"),
            MatrixRedundancy("output"),
            MatrixRedundancy("input"),
        )
    }
    return Problem(Target.parse(sparsity), shapes, tuple(names), roles, readings)


@pytest.mark.parametrize("options", [{}, {"feature": "output"}, {"component_feature": "input"}])
@pytest.mark.parametrize("sparsity", ["0.3", "0.5", "0.75"])
def test_both_stages_meet_the_budget_and_the_bounds(options, sparsity):
    given = problem(sparsity=sparsity)
    plan = ALS(**options).plan(given)
    assert plan.removed == given.target.count(plan.elements)
    s = given.sparsity
    assert all(s - 0.16 <= r <= s + 0.16 for r in plan.ratios.values())
    assert len(set(plan.ratios.values())) > 2


def test_the_second_stage_conserves_each_blocks_budget():
    given = problem()
    whole, layers = ALS().wishes(given), ALS(components=False).wishes(given)
    sizes = given.sizes
    for block in given.blocks:
        kept = [sum(w[n] * sizes[n] for n in block) for w in (whole, layers)]
        assert kept[0] == pytest.approx(kept[1], abs=1e-6)


def test_the_lp_by_highs_gives_the_same_plan():
    given = problem()
    assert ALS(components=False).plan(given).ratios == pytest.approx(
        ALS(components=False, solution="highs").plan(given).ratios, abs=1e-6
    )


def test_bounds_that_leave_no_room_give_a_uniform_plan():
    plan = ALS(min_sparsity=0.5, max_sparsity=0.5, components=False).plan(problem())
    assert set(plan.ratios.values()) == {0.5}


def test_the_printed_formula_gives_independent_layers_more():
    """As printed the LP does the opposite of the text; it is there to be compared."""
    given = problem(blocks=6, seed=3)
    dense = ALS(components=False).wishes(given)
    literal = ALS(components=False, variant="sparsity").wishes(given)
    names = [b[0] for b in given.blocks]
    assert [round(dense[n] + literal[n], 6) for n in names] == [1.0] * 6


def test_identical_layers_share_equally():
    same = [torch.eye(16)] * 4
    value = suffix_mean(independence(redundancy(same)))
    assert share_out(value, [10] * 4, 0.5, [0.3] * 4, [0.7] * 4) == pytest.approx([0.5] * 4)


def test_patterns_mix_their_n():
    given = problem(sparsity="4:8")
    plan = ALS(components=False, width=0.125).plan(given)
    assert set(plan.patterns.values()) <= {(3, 8), (4, 8), (5, 8)}
    assert plan.removed == plan.elements // 2
    narrow = problem(sparsity="2:4")
    assert set(ALS(components=False).plan(narrow).patterns.values()) == {(2, 4)}
    assert "no other N:4" in narrow.notes[0]


@pytest.mark.parametrize(
    ("sparsity", "width", "components"),
    [("2:4", 0.15, True), ("2:4", 0.25, False), ("4:8", 0.1, False), ("4:8", 0.1, True)],
)
def test_the_note_on_patterns_is_there_exactly_when_nothing_can_differ(sparsity, width, components):
    given = problem(sparsity=sparsity)
    plan = ALS(components=components, width=width).plan(given)
    own = (given.target.keep, given.target.group)
    differs = set(plan.patterns.values()) != {own}
    assert any("no other N" in note for note in given.notes) != differs


# -- bad input -------------------------------------------------------------------------------------


def test_bounds_that_exclude_the_target():
    with pytest.raises(UsageError, match=r"0\.5 cannot be met"):
        ALS(min_sparsity=0.6, max_sparsity=0.8).plan(problem())


def test_a_single_block_gets_the_target():
    given = problem(blocks=1)
    plan = ALS(components=False).plan(given)
    assert plan.removed == given.target.count(plan.elements)
    assert "single block" in given.notes[0]


def test_blocks_of_unequal_size_meet_the_budget_in_parameters():
    given = problem()
    shapes = dict(given.shapes)
    shapes["layers.3.down"] = (999, 32)
    odd = Problem(given.target, shapes, given.blocks, given.roles, given.readings)
    plan = ALS().plan(odd)
    assert plan.removed == odd.target.count(plan.elements)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"tokens": 1}, "tokens"),
        ({"strength": 0.0}, "strength"),
        ({"mu": -1.0}, "mu"),
        ({"mu": "rows"}, "mu"),
        ({"feature": "inputs"}, "feature"),
        ({"widht": 0.1}, "widht"),
    ],
)
def test_wrong_options(options, field):
    with pytest.raises(UsageError) as caught:
        ALS.with_options(options)
    assert caught.value.field == field


def test_a_block_without_a_gate_says_so():
    facts = BlockFacts(0, "layers.0", [], {"input": torch.zeros(2, 2)})
    with pytest.raises(UsageError, match=r"'layers\.0' shows no such"):
        BlockFeatures("gate").read(facts)
