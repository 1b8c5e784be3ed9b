"""The price path: every breakpoint, nested, and what a budget gets."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from forest_cases import cancer_case, every_pruned_forest, state, tiny_case
from hypothesis import given, settings
from test_forest_solvers import brute_force, closed_sets, closure_problems

from secateur.forests.closure import ClosureProblem
from secateur.forests.path import bracket, full_path, grid_path
from secateur.forests.solvers import solve


@pytest.fixture(scope="module")
def programme():
    return state(*cancer_case())


@given(problem=closure_problems())
@settings(max_examples=60, deadline=None)
def test_path_is_the_lower_envelope_of_all_prunings(problem: ClosureProblem) -> None:
    path = full_path(problem, solver="push_relabel")
    assert path.complete
    lines = [problem.measure(kept) for kept in closed_sets(problem.parent)]
    inside = path.breakpoints
    probes = np.concatenate([inside * 0.999, inside * 1.001, [1e-6, 50.0]])
    for price in probes:
        best = max(gain - price * cost for gain, cost in lines)
        assert problem.profit(path.kept(price), price) == pytest.approx(best, abs=1e-9)
        assert (path.kept(price) == brute_force(problem, price)[1]).all()


def test_points_are_monotone_nested_and_measured(programme) -> None:
    problem = programme.reduced
    path = full_path(problem, solver="push_relabel")
    assert len(path.breakpoints) > 5
    assert (np.diff(path.breakpoints) < 0).all()
    assert (np.diff(path.gain) > 0).all()
    assert (np.diff(path.cost) > 0).all()
    before = None
    for point in range(len(path.gain)):
        kept = path.kept_at_point(point)
        assert problem.is_closed(kept)
        assert problem.measure(kept) == pytest.approx((path.gain[point], path.cost[point]))
        if before is not None:
            assert (before <= kept).all()
        before = kept
    # Between breakpoints, the path agrees with a cut made there.
    for price in np.sqrt(path.breakpoints[1:] * path.breakpoints[:-1]):
        assert (solve(problem, price, "push_relabel").kept == path.kept(price)).all()


def test_a_short_path_holds_only_points_of_the_whole_one(programme) -> None:
    whole = full_path(programme.reduced, solver="push_relabel")
    short = full_path(programme.reduced, points=6, solver="push_relabel")
    assert not short.complete
    assert len(short.cost) == 6
    known = set(np.round(whole.cost, 9))
    assert set(np.round(short.cost, 9)) <= known
    assert short.cuts < whole.cuts


def test_grid_path_equals_separate_cuts(programme) -> None:
    whole = full_path(programme.reduced, solver="push_relabel")
    prices = np.geomspace(whole.breakpoints[-1] * 0.5, whole.breakpoints[0] * 2, 9)
    grid = grid_path(programme.reduced, prices, solver="push_relabel")
    assert grid.cuts <= len(prices)
    for price in prices:
        assert (grid.kept(price) == solve(programme.reduced, price, "push_relabel").kept).all()


def test_budget_gets_the_two_neighbouring_hull_points(programme) -> None:
    whole = full_path(programme.reduced, solver="push_relabel")
    for budget in np.linspace(0, whole.cost[-1] * 1.1, 13):
        path, index = bracket(programme.reduced, budget, solver="push_relabel")
        expected = int(np.flatnonzero(whole.cost <= budget + 1e-12)[-1])
        assert path.cost[index] == pytest.approx(whole.cost[expected])
        kept = path.kept_at_point(index)
        assert (kept == whole.kept_at_point(expected)).all()
        if expected + 1 < len(whole.cost):
            assert path.cost[index + 1] == pytest.approx(whole.cost[expected + 1])
            assert path.breakpoints[index] == pytest.approx(whole.breakpoints[expected])


def test_the_ends_are_no_cost_and_cost_free_pruning() -> None:
    forest, x, y, costs = tiny_case(7)
    programme = state(forest, x, y, costs)
    path = full_path(programme.reduced, solver="push_relabel")
    assert path.cost[0] == 0
    assert not path.kept(1e9).any()
    # Reduced-error pruning: the best error of each tree by itself, whatever features cost.
    best = np.mean(
        [
            min(np.mean(one.predict(x) != y) for _, one in every_pruned_forest(_only(forest, t)))
            for t in range(len(forest.estimators_))
        ]
    )
    assert programme.error(path.gain[-1]) == pytest.approx(best, abs=1e-12)


def _only(forest, t: int):
    single = copy.copy(forest)
    single.estimators_ = [forest.estimators_[t]]
    return single
