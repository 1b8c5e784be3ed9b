"""The allocators compared with, each against its formula on small cases."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
import torch

from secateur.allocation import allocators
from secateur.allocation.alpha_pruning import AlphaPruning
from secateur.allocation.base import Allocator, Problem
from secateur.allocation.erdos_renyi import ER, ERK, er_density
from secateur.allocation.global_rank import Global
from secateur.allocation.incremental import Incremental, schedule, steps
from secateur.allocation.lamp import LAMP, lamp_score
from secateur.errors import UsageError
from secateur.evidence.readings import BlockFacts, MatrixFacts
from secateur.evidence.spectrum import Spectra, hill, hill_at_peak, spectrum
from secateur.masks.target import Target
from secateur.testing import check_allocator


def problem(sparsity="0.5", shapes=((8, 16), (32, 16), (16, 32)), blocks=4, seed=0):
    """Blocks of random matrices, their weights there to be read."""
    random = torch.Generator().manual_seed(seed)
    weights = {
        f"layers.{b}.m{i}": torch.randn(shape, generator=random) * (1 + 0.2 * b)
        for b in range(blocks)
        for i, shape in enumerate(shapes)
    }
    names = tuple(tuple(n for n in weights if n.startswith(f"layers.{b}.")) for b in range(blocks))
    facts = [
        BlockFacts(
            b,
            f"layers.{b}",
            [MatrixFacts(n, "", tuple(weights[n].shape), lambda n=n: weights[n]) for n in block],
        )
        for b, block in enumerate(names)
    ]
    return Problem(
        Target.parse(sparsity),
        {n: tuple(w.shape) for n, w in weights.items()},
        names,
        dict.fromkeys(weights, ""),
        {Spectra(): [Spectra().read(f) for f in facts]},
        weights=lambda: iter(weights.items()),
        scores=lambda: ((n, w.abs()) for n, w in weights.items()),
    )


# -- SlimGPT's schedule ----------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 3, 12, 40])
@pytest.mark.parametrize("shape", ["log", "linear"])
@pytest.mark.parametrize("direction", ["increase", "decrease"])
def test_schedules_are_monotone_hit_their_end_and_the_mean(n, shape, direction):
    ratios = schedule(0.3, [7] * n, shape, direction, first=0.1)
    assert sum(ratios) / n == pytest.approx(0.3)
    ends = ratios if direction == "increase" else ratios[::-1]
    assert ends[0] == pytest.approx(0.1)
    assert all(a <= b for a, b in pairwise(ends))
    wide = schedule(0.3, [7] * n, shape, direction, width=0.2)
    assert abs(wide[-1] - wide[0]) == pytest.approx(0.2)
    assert sum(wide) / n == pytest.approx(0.3)


def test_the_schedule_reproduces_the_released_llama_7b_plan():
    """r_0 = 0.0625 and r_31 = 0.25 on 32 blocks: heads removed of 32 per layer, 5.4 B kept."""
    last = 0.0625 + (0.2004 - 0.0625) / (sum(steps(32)) / 32)
    assert last == pytest.approx(0.25, abs=1e-3)
    ratios = [0.0625 + (0.25 - 0.0625) * u for u in steps(32)]
    assert [round(32 * r) for r in ratios[:8]] == [2, 3, 4, 4, 5, 5, 5, 6]
    heads = sum(round(32 * r) for r in ratios)
    channels = sum(round(11008 * r) for r in ratios)
    kept = 6_738_415_616 - heads * 4 * 128 * 4096 - channels * 3 * 4096
    assert kept / 1e9 == pytest.approx(5.439, abs=0.002)


def test_the_mean_of_the_log_schedule():
    for n, mean in ((12, 0.6703), (8, 0.6375), (32, 0.7354), (80, 0.7807)):
        assert sum(steps(n)) / n == pytest.approx(mean, abs=5e-5)


def test_a_single_block_and_ends_that_cannot_be():
    assert steps(1) == [0.0]
    assert schedule(0.4, [10]) == [0.4]
    with pytest.raises(UsageError, match="above the mean"):
        Incremental(first=0.6).plan(problem())
    with pytest.raises(UsageError, match="in \\[0, 1\\]"):
        Incremental(width=2.0)


def test_increasing_takes_more_from_later_blocks():
    given = problem()
    plan = Incremental().plan(given)
    means = [np.mean([plan.ratios[n] for n in block]) for block in given.blocks]
    assert means == sorted(means)
    assert means[0] < means[-1]
    back = Incremental(direction="decrease").plan(given)
    assert back.ratios[given.blocks[0][0]] > back.ratios[given.blocks[-1][0]]


# -- ER, ERK, LAMP, global -------------------------------------------------------------------------


def test_er_and_erk_densities_by_hand():
    assert er_density(10, 40) == pytest.approx(50 / 400)
    assert er_density(64, 32, (3, 3)) == pytest.approx((64 + 32 + 6) / (64 * 32 * 9))


def test_er_keeps_densities_in_proportion_and_small_layers_dense():
    given = problem()
    ratios = ER().plan(given).ratios
    kept = {n: 1 - r for n, r in ratios.items()}
    for a, b in [("layers.0.m0", "layers.0.m1"), ("layers.1.m1", "layers.2.m2")]:
        wanted = er_density(*given.shapes[a]) / er_density(*given.shapes[b])
        assert kept[a] / kept[b] == pytest.approx(wanted, rel=0.02)
    assert ERK().plan(given).counts == ER().plan(given).counts
    dense = ER().plan(problem("0.05"))
    assert max(1 - r for r in dense.ratios.values()) <= 1


def test_lamp_scores_by_brute_force():
    weight = torch.tensor([[3.0, -1.0], [2.0, 1.0]])
    squares = [9.0, 1.0, 4.0, 1.0]
    # 1 and 1 tie: the one that comes first has the other in its rest.
    wanted = [9 / 9, 1 / 15, 4 / 13, 1 / 14]
    assert lamp_score(weight).flatten().tolist() == pytest.approx(wanted)
    assert sum(squares) == 15
    assert float(lamp_score(torch.randn(5, 7)).max()) == 1


def test_lamp_removes_the_lowest_scores_of_all():
    given = problem("0.3")
    plan = LAMP().plan(given)
    scores = torch.cat([lamp_score(w).flatten() for _, w in given.weights()])
    threshold = scores.sort().values[plan.removed]
    for name, weight in given.weights():
        assert plan.counts[name] == int((lamp_score(weight) < threshold).sum())


def test_global_removes_the_smallest_of_all():
    given = problem("0.4")
    plan = Global().plan(given)
    assert plan.removed == Target.parse("0.4").count(plan.elements)
    scores = torch.cat([w.abs().flatten() for _, w in given.weights()])
    threshold = scores.sort().values[plan.removed]
    for name, weight in given.weights():
        assert plan.counts[name] == int((weight.abs() < threshold).sum())


@pytest.mark.parametrize("kind", [ER, ERK, LAMP, Global])
def test_what_was_made_for_vision_warns_on_high_sparsity(kind):
    quiet, warned = problem("0.5"), problem("0.7")
    kind().plan(quiet)
    kind().plan(warned)
    assert quiet.notes == []
    assert "collapse" in warned.notes[0]


# -- AlphaPruning ----------------------------------------------------------------------------------


def test_spectrum_is_the_squared_singular_values():
    for shape in ((6, 9), (9, 6)):
        weight = torch.randn(shape, dtype=torch.float64)
        wanted = torch.linalg.svdvals(weight).square().flip(0)
        torch.testing.assert_close(spectrum(weight), wanted, rtol=1e-9, atol=1e-9)


def test_hill_by_hand():
    values = torch.tensor([1.0, 2.0, 3.0, 5.0, 9.0], dtype=torch.float64)
    tail = [3.0, 5.0, 9.0]  # k = 5 - floor(2.5)
    wanted = 1 + 3 / sum(math.log(v / 3) for v in tail)
    assert hill(values) == pytest.approx(wanted)
    assert hill(torch.ones(4)) == math.inf


def test_hill_finds_the_exponent_of_a_pareto_tail():
    random = torch.Generator().manual_seed(0)
    for alpha in (2.2, 3.5):
        u = torch.rand(20_000, generator=random, dtype=torch.float64)
        values = (u ** (-1 / (alpha - 1))).sort().values
        assert hill(values) == pytest.approx(alpha, rel=0.03)
        assert hill_at_peak(values) == pytest.approx(alpha, rel=0.05)


def test_alpha_scales_to_the_budget_without_emptying_a_block():
    """The release's own figures: 80 % with eps 0.3 asks 1.06 of a block."""
    given = problem("0.8", blocks=6)
    plan = AlphaPruning(eps=0.5).plan(given)
    assert plan.removed == given.target.count(plan.elements)
    assert max(plan.ratios.values()) <= 0.98 + 1 / 256  # to the weight
    assert min(plan.ratios.values()) < 0.75


def test_heavier_tails_stay_denser():
    given = problem()
    record = [{"m": torch.linspace(1, 2, 50)}, {"m": torch.logspace(0, 3, 50)}]
    blocks = tuple(given.blocks[:2])
    shapes = {n: given.shapes[n] for b in blocks for n in b}
    two = Problem(given.target, shapes, blocks, readings={Spectra(): record})
    for fit in ("peak", "hill"):
        ratios = AlphaPruning(fit=fit).plan(two).ratios
        assert ratios[blocks[0][0]] > ratios[blocks[1][0]]


def test_alpha_without_differences_is_uniform():
    given = problem()
    same = [{"m": torch.linspace(1, 2, 50)}] * 4
    even = Problem(given.target, given.shapes, given.blocks, readings={Spectra(): same})
    assert set(AlphaPruning().wishes(even).values()) == {0.5}
    assert "uniform" in even.notes[0]


# -- what holds for every allocator that needs no trials -------------------------------------------

FREE = ["uniform", "er", "erk", "lamp", "global", "alphapruning", "incremental"]


@pytest.mark.parametrize("name", FREE)
@pytest.mark.parametrize("sparsity", ["0", "0.123", "0.5", "0.9", "2:4", "5:8"])
def test_every_plan_is_exact_whatever_the_sizes(name, sparsity):
    shapes = ((8, 16), (24, 16), (40, 8))
    given = problem(sparsity, shapes)
    plan = allocators[name].with_options({}).plan(given)
    wanted = given.target.count(plan.elements)
    slack = 0 if not given.target.is_pattern else min(r * c // 8 for r, c in shapes)
    assert abs(plan.removed - wanted) <= slack
    assert all(0 <= plan.counts[n] <= r * c for n, (r, c) in plan.shapes.items())


@pytest.mark.parametrize("name", FREE)
def test_a_pattern_that_does_not_divide(name):
    with pytest.raises(UsageError, match="does not divide"):
        allocators[name].with_options({}).plan(problem("2:4", ((8, 10),)))


@pytest.mark.parametrize("name", allocators.names())
def test_every_allocator_keeps_the_contract(name):
    check_allocator(allocators[name].with_options({}))


def test_the_contract_is_not_kept_by_everybody():
    @dataclass(frozen=True)
    class Random(Allocator):
        name, summary = "random", "another plan each time"

        def wishes(self, problem):
            return {n: float(torch.rand(1)) for n in problem.shapes}

    @dataclass(frozen=True)
    class Reader(Allocator):
        name, summary = "reader", "reads what it did not ask for"

        def wishes(self, problem):
            problem.read(Spectra())
            return dict.fromkeys(problem.shapes, 0.5)

    with pytest.raises(AssertionError, match="not deterministic"):
        check_allocator(Random())
    with pytest.raises(ValueError, match="was not gathered"):
        check_allocator(Reader())
