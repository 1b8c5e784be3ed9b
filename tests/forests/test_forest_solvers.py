"""Exactness: brute force = linear programme = minimum cut; bounds that hold at every round."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest
from forest_cases import (
    cancer_case,
    closed_sets,
    every_pruned_forest,
    independent_objective,
    state,
    tiny_case,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.errors import MissingExtra, NumericsError, SecateurError
from secateur.forests import ForestInputError
from secateur.forests.closure import ClosureProblem
from secateur.forests.reduction import (
    fold_private_keys,
    in_whole_units,
    merge_keys,
    reduce_problem,
    settle_at_price,
)
from secateur.forests.solvers import push_relabel, resolve_solver, solve
from secateur.forests.solvers.interface import PrimalDualOptions
from secateur.forests.solvers.maxflow import integer_network
from secateur.forests.solvers.primal_dual import solve_primal_dual, tree_chunks

EXACT = [
    "push_relabel",
    "lp",
    pytest.param(
        "ortools", marks=pytest.mark.skipif(not find_spec("ortools"), reason="needs ortools")
    ),
]
LAMBDAS = (0.0, 0.003, 0.01, 0.03, 0.1, 1.0)


@st.composite
def closure_problems(draw: st.DrawFn) -> ClosureProblem:
    """Random forests of up to 7 nodes over up to 5 shared keys, gains of either sign."""
    n = draw(st.integers(1, 7))
    trees = np.sort(draw(st.lists(st.integers(0, 2), min_size=n, max_size=n)))
    parent = np.full(n, -1, dtype=np.int32)
    for h in range(1, n):
        before = [u for u in range(h) if trees[u] == trees[h]]
        if before:
            parent[h] = draw(st.sampled_from(before))
    n_keys = draw(st.integers(1, 5))
    lists = [sorted(draw(st.sets(st.integers(0, n_keys - 1), max_size=3))) for _ in range(n)]
    whole = st.integers(-4, 6)
    return ClosureProblem(
        parent=parent,
        tree=trees.astype(np.int32),
        gain=np.array(draw(st.lists(whole, min_size=n, max_size=n)), dtype=float),
        toll=np.array(draw(st.lists(st.integers(0, 2), min_size=n, max_size=n)), dtype=float),
        ptr=np.concatenate([[0], np.cumsum([len(keys) for keys in lists])]).astype(np.int64),
        key=np.array([k for keys in lists for k in keys], dtype=np.int32),
        charge=np.array(
            draw(st.lists(st.integers(1, 5), min_size=n_keys, max_size=n_keys)), dtype=float
        ),
    )


def brute_force(problem: ClosureProblem, price: float) -> tuple[float, np.ndarray]:
    """The best profit and the smallest closed set that has it."""
    sets = list(closed_sets(problem.parent))
    profits = np.array([problem.profit(kept, price) for kept in sets])
    optima = [
        kept for kept, profit in zip(sets, profits, strict=True) if profit > profits.max() - 1e-9
    ]
    return float(profits.max()), np.logical_and.reduce(optima)


@pytest.mark.parametrize("seed", range(4))
def test_all_solvers_agree_with_enumeration_of_rebuilt_forests(seed: int) -> None:
    forest, x, y, costs = tiny_case(seed)
    programme = state(forest, x, y, costs)
    prunings = list(every_pruned_forest(forest))
    for lam in LAMBDAS:
        truth = min(independent_objective(pruned, x, y, costs, lam) for _, pruned in prunings)
        for solver in ("push_relabel", "lp"):
            cut = solve(programme.reduced, programme.price(lam), solver)
            error, cost = programme.measure(programme.lift(cut.kept))
            assert error + lam * cost == pytest.approx(truth, abs=1e-12)
            bound = programme.base_error - programme.unit * cut.bound
            assert bound <= truth + 1e-12


@pytest.mark.parametrize("solver", EXACT)
@given(problem=closure_problems(), price=st.sampled_from([0.0, 0.25, 0.5, 1.0, 1.7]))
@settings(max_examples=40, deadline=None)
def test_exact_solvers_find_the_smallest_optimum(
    solver: str, problem: ClosureProblem, price: float
) -> None:
    best, smallest = brute_force(problem, price)
    cut = solve(problem, price, solver)
    assert problem.is_closed(cut.kept)
    assert cut.profit == pytest.approx(best, abs=1e-9)
    assert cut.bound == pytest.approx(best, abs=1e-6)
    if solver != "lp":  # a vertex of the programme need not be the smallest optimum
        assert (cut.kept == smallest).all()


@given(problem=closure_problems(), price=st.sampled_from([0.3, 1.0, 2.0]))
@settings(max_examples=40, deadline=None)
def test_reductions_keep_the_optimum(problem: ClosureProblem, price: float) -> None:
    best, smallest = brute_force(problem, price)
    smaller, nodes = reduce_problem(problem)
    reduced_best, reduced_smallest = brute_force(smaller, price)
    assert reduced_best == pytest.approx(best, abs=1e-9)
    assert set(nodes[reduced_smallest]) == set(np.flatnonzero(smallest))
    upper, lower = settle_at_price(problem, price)
    assert (lower <= smallest).all()
    assert (smallest <= upper).all()
    folded = merge_keys(fold_private_keys(problem))
    for kept in closed_sets(problem.parent):
        assert folded.profit(kept, price) == pytest.approx(problem.profit(kept, price))


@pytest.mark.parametrize("steps", ["averaged", "published"])
@given(problem=closure_problems(), price=st.sampled_from([0.3, 1.0, 2.0]))
@settings(max_examples=40, deadline=None)
def test_primal_dual_bounds_enclose_the_optimum_at_every_round(
    steps: str, problem: ClosureProblem, price: float
) -> None:
    best, _ = brute_force(problem, price)
    cut = solve_primal_dual(problem, price, PrimalDualOptions(max_iter=60, steps=steps))
    assert cut.history is not None
    assert problem.is_closed(cut.kept)
    profit, bound = cut.history.T
    assert (profit <= best + 1e-9).all()
    assert (bound >= best - 1e-9).all()
    assert (np.diff(profit) >= 0).all()
    assert (np.diff(bound) <= 0).all()
    assert cut.profit == pytest.approx(problem.profit(cut.kept, price))


def test_primal_dual_closes_the_gap_on_a_real_forest() -> None:
    forest, x, y, costs = tiny_case(1, trees=10, depth=4)
    programme = state(forest, x, y, costs)
    for lam in (0.003, 0.01, 0.03):
        price = programme.price(lam)
        exact = solve(programme.reduced, price, "push_relabel")
        near, published = (
            solve(programme.reduced, price, "primal_dual", PrimalDualOptions(400, steps=steps))
            for steps in ("averaged", "published")
        )
        for cut in (near, published):
            assert cut.profit <= exact.profit + 1e-9 <= cut.bound + 2e-9
        objective = programme.base_error - programme.unit * exact.profit
        assert near.gap * programme.unit < 1e-3 * objective
        assert published.gap * programme.unit < 2e-3


def test_threads_do_not_change_the_primal_dual(monkeypatch: pytest.MonkeyPatch) -> None:
    forest, x, y, costs = tiny_case(2, trees=7, depth=4)
    programme = state(forest, x, y, costs)
    price = programme.price(0.01)
    one = solve_primal_dual(programme.reduced, price)
    monkeypatch.setattr("secateur.forests.solvers.primal_dual.PARALLEL_FROM", 0)
    assert len(tree_chunks(programme.reduced, 3)) == 4
    three = solve_primal_dual(programme.reduced, price, PrimalDualOptions(n_jobs=3))
    assert (one.kept == three.kept).all()
    assert three.bound == pytest.approx(one.bound, rel=1e-6)


@pytest.mark.parametrize("search_after", [0, 6])
@given(problem=closure_problems(), price=st.sampled_from([0.37, 1.1]))
@settings(max_examples=40, deadline=None)
def test_push_relabel_sends_a_real_flow(
    search_after: int, problem: ClosureProblem, price: float
) -> None:
    """Not only the value: conservation at every vertex, nothing above a capacity."""
    problem, _ = in_whole_units(problem, price)
    network = integer_network(problem)
    node, starts, users = push_relabel._transposed(problem.ptr, problem.key, problem.n_keys)
    child, sibling = push_relabel._children(problem.parent)
    graph = (problem.parent, child, sibling, problem.ptr, problem.key, node, starts, users)
    drain, toll, unsent = network.drain.copy(), network.toll.copy(), network.supply.copy()
    excess = np.concatenate([network.supply, np.zeros(problem.n_keys, dtype=np.int64)])
    along, up = np.zeros(len(problem.key), np.int64), np.zeros(problem.n_nodes, np.int64)
    push_relabel._preflow(*graph, drain, toll, excess, along, up, search_after)
    push_relabel._hand_back(*graph, unsent, excess, along, up)
    for amount, limit in ((drain, network.drain), (toll, network.toll), (unsent, network.supply)):
        assert ((amount >= 0) & (amount <= limit)).all()
    assert (along >= 0).all()
    assert (up >= 0).all()
    enters = network.supply - unsent
    inner = problem.parent >= 0
    np.add.at(enters, problem.parent[inner], up[inner])
    assert not up[~inner].any()
    leaves = up + (network.drain - drain)
    np.add.at(leaves, node, along)
    assert (enters == leaves).all()
    to_keys = np.bincount(problem.key, weights=along, minlength=problem.n_keys)
    assert (to_keys == network.toll - toll).all()


def test_problems_beyond_32_bits_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    programme = state(*cancer_case())
    monkeypatch.setattr(push_relabel, "MOST", 5)
    with pytest.raises(SecateurError, match="can number"):
        solve(programme.reduced, programme.price(0.003), "push_relabel")


@pytest.mark.skipif(not find_spec("ortools"), reason="needs ortools")
def test_both_backends_agree_on_a_real_forest() -> None:
    programme = state(*cancer_case())
    for lam in (0.0031, 0.01, 0.02):
        ours, theirs = (
            solve(programme.reduced, programme.price(lam), s) for s in ("push_relabel", "ortools")
        )
        assert (ours.kept == theirs.kept).all()
        assert ours.bound == theirs.bound


def test_scaling_cuts_huge_charges_off_instead_of_overflowing() -> None:
    problem = ClosureProblem(
        parent=np.array([-1], dtype=np.int32),
        tree=np.zeros(1, dtype=np.int32),
        gain=np.array([1.0]),
        toll=np.zeros(1),
        ptr=np.array([0, 1]),
        key=np.zeros(1, dtype=np.int32),
        charge=np.array([1e300]),
    )
    for price in (1.0, 1e20):
        whole, unit = in_whole_units(problem, price)
        assert 0 < integer_network(whole).toll[0] < 2**60
        assert unit == 2.0**-46
        assert not solve(problem, price, "push_relabel").kept.any()
    assert solve(problem, 1e-301, "push_relabel").kept.all()
    with pytest.raises(NumericsError, match="finite"):
        in_whole_units(problem, np.inf)
    with pytest.raises(NumericsError, match="finite"):
        in_whole_units(replace(problem, gain=np.array([-np.inf])), 1.0)


@pytest.mark.parametrize("solver", EXACT[::2])
@given(
    problem=closure_problems(),
    scale=st.sampled_from([1.0, 1 / 3, 0.1, 1e-7 / 3]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=40, deadline=None)
def test_optima_at_any_prices_are_nested_ties_included(
    solver: str, problem: ClosureProblem, scale: float, seed: int
) -> None:
    """Gains that are sums of charges, in units float64 cannot hold: all breakpoints are ties."""
    rng = np.random.default_rng(seed)
    own = np.zeros(problem.n_nodes)
    np.add.at(own, np.repeat(np.arange(problem.n_nodes), np.diff(problem.ptr)),
              problem.charge[problem.key])  # fmt: skip
    gain = scale * rng.integers(1, 4, problem.n_nodes) * (own + problem.toll)
    tied = replace(problem, gain=gain, charge=scale * problem.charge, toll=scale * problem.toll)
    ties = np.concatenate([np.arange(1, 7) / d for d in (1, 2, 3)])
    prices = np.unique(np.concatenate([ties, np.nextafter(ties, 0), np.nextafter(ties, 9)]))
    before = np.ones(problem.n_nodes, dtype=bool)
    for price in prices:
        kept = solve(tied, price, solver).kept
        assert (kept <= before).all()
        before = kept


def test_unknown_and_missing_solvers_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ForestInputError, match="solver='simplex'"):
        resolve_solver("simplex")
    monkeypatch.setattr("secateur.forests.solvers.interface.find_spec", lambda name: None)
    assert resolve_solver("auto") == resolve_solver("maxflow") == "push_relabel"
    with pytest.raises(MissingExtra, match="ortools"):
        resolve_solver("ortools")
