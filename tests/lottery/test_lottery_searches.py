"""The searches: against brute force, and the two engines against each other."""

import itertools
import math

import numpy as np
import pytest
import torch

from secateur.lottery import exclusive
from secateur.lottery.decomposition import BASES
from secateur.lottery.drawing import draw
from secateur.lottery.laws import Law
from secateur.lottery.philox import ROLE_IN, ROLE_OUT
from secateur.lottery.search import Pools, bitwise, single, subsets
from secateur.lottery.search_torch import best_subset

ENGINES = ["compiled", "torch"]


def pools_of(law, count, size, outputs_first=0):
    ids = np.arange(count)
    first = np.full(count, outputs_first)
    return Pools(9, 1, law, ids, ids % 4, first, np.full(count, size), np.zeros(count, bool))


def brute(target, parts):
    return min(
        abs(target - sum(chosen))
        for n in range(len(parts) + 1)
        for chosen in itertools.combinations(parts, n)
    )


@pytest.mark.parametrize("n", [1, 2, 5, 8, 11])
def test_best_subset_is_the_best(n):
    rng = np.random.default_rng(n)
    parts, targets = rng.uniform(-1, 1, (12, n)), rng.uniform(-1, 1, 12)
    masks, rest = best_subset(torch.tensor(targets), torch.tensor(parts))
    for row, target, mask, left in zip(parts, targets, masks.tolist(), rest.tolist(), strict=True):
        chosen = sum(p for i, p in enumerate(row) if mask >> i & 1)
        assert abs(target - chosen) == pytest.approx(left, abs=1e-12)
        assert left == pytest.approx(brute(target, list(row)), abs=1e-12)


def test_compiled_best_subset_is_the_best_up_to_16():
    compiled = pytest.importorskip("secateur.lottery.compiled")
    rng = np.random.default_rng(1)
    for n in (1, 3, 10, 16):
        parts, target = rng.uniform(-1, 1, n), rng.uniform(-1, 1)
        width = 1 << ((n + 1) // 2)
        scratch = np.empty((3, width)), np.empty((3, width), np.uint64)
        mask, rest = compiled.best_subset(target, parts, n, *scratch)
        sums = np.zeros(1)
        for part in parts:
            sums = np.concatenate([sums, sums + part])
        assert abs(rest) == pytest.approx(np.abs(target - sums).min(), abs=1e-12)
        assert sums[int(mask)] == pytest.approx(target - rest, abs=1e-12)


def test_products_of_uniforms_meet_weights_closely():
    """n = 16 products: the 95 % point is about 1e-4 for small weights, 1.4e-4 up to 1/2."""
    rng = np.random.default_rng(2)
    products = torch.from_numpy(rng.uniform(0, 1, (2000, 16)) * rng.uniform(-1, 1, (2000, 16)))
    for half, most in ((0.1, 1e-4), (0.5, 2e-4)):
        _, rest = best_subset(torch.tensor(rng.uniform(-half, half, 2000)), products)
        assert float(rest.median()) < 2e-5
        assert float(rest.quantile(0.95)) < most


@pytest.mark.parametrize("depth", [1, 4])
@pytest.mark.parametrize("sign", [1, -1])
def test_engines_agree_on_bits(depth, sign):
    pytest.importorskip("numba")
    gamma, bits = BASES["golden"], 9
    law = Law("hyperbolic", math.sqrt(2.0), bits * math.log(1 / gamma))
    edges = law.scale**2 * gamma ** np.arange(bits + 1)
    demand = np.random.default_rng(3).uniform(-2, 2, (6, 5))
    demand[2, 3] = 0.0
    pools = pools_of(law, 6, 300)
    one, two = (bitwise(pools, sign, demand, edges, depth, engine) for engine in ENGINES)
    assert np.array_equal(one.neurons, two.neurons)
    assert np.allclose(one.residual, two.residual, atol=1e-14)
    assert np.array_equal(one.empty, two.empty)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("depth", [1, 5])
def test_picked_neurons_add_up(engine, depth):
    if engine == "compiled":
        pytest.importorskip("numba")
    gamma, bits = 2 / 3, 12
    law = Law("hyperbolic", 1.0, bits * math.log(1 / gamma))
    edges = gamma ** np.arange(bits + 1)
    demand = np.random.default_rng(4).uniform(-1, 1, (3, 4))
    pools = pools_of(law, 3, 900, outputs_first=2)
    picks = bitwise(pools, -1, demand, edges, depth, engine)
    for p, o in np.ndindex(demand.shape):
        chosen = picks.neurons[p, o][picks.neurons[p, o] >= 0]
        a = draw(law, 9, 1, ROLE_IN, p, chosen, p % 4).astype(float)
        b = draw(law, 9, 1, ROLE_OUT, p, chosen, 2 + o).astype(float)
        assert (a < 0).all()
        assert len(set(chosen)) == len(chosen)
        left = abs(demand[p, o] - (np.abs(a) * b).sum())
        assert left == pytest.approx(picks.residual[p, o], abs=1e-12)
        assert left <= gamma ** (bits - 1)


def test_engines_agree_on_subsets_and_singles():
    pytest.importorskip("numba")
    law = Law("uniform", 1.2)
    demand = np.random.default_rng(5).uniform(-1, 1, (5, 4))
    pools = pools_of(law, 5, 40)
    for n, start, tolerance in ((13, 13, 0.0), (14, 4, 0.02)):
        one, two = (subsets(pools, 1, demand, n, start, tolerance, e) for e in ENGINES)
        assert np.array_equal(one.neurons, two.neurons)
        assert np.allclose(one.residual, two.residual, atol=1e-12)
        assert np.array_equal(one.masks, two.masks)
    wide = pools_of(law, 5, 5000)
    for both in (False, True):
        one, two = (single(wide, 1, demand, 0.08, both, e) for e in ENGINES)
        assert np.array_equal(one.neurons, two.neurons)
        assert np.allclose(one.residual, two.residual, atol=1e-12)


def test_a_small_pool_is_used_as_far_as_it_goes():
    pytest.importorskip("numba")
    demand = np.array([[0.7, -0.4]])
    for engine in ENGINES:
        found = subsets(pools_of(Law("uniform", 1.0), 1, 5), 1, demand, 12, 4, 0.0, engine)
        assert (found.neurons < 0).any()
        assert (found.residual <= np.abs(demand) + 1e-12).all()


@pytest.mark.parametrize("kind", ["batch", "matching"])
def test_exclusive_pools_use_a_neuron_once(kind):
    gamma, bits = BASES["golden"], 8
    law = Law("hyperbolic", 1.0, bits * math.log(1 / gamma))
    edges = gamma ** np.arange(bits + 1)
    demand = np.random.default_rng(6).uniform(-1, 1, (2, 12))
    picks = exclusive.bitwise(pools_of(law, 2, 1500), 1, demand, edges, kind)
    assert picks.empty.sum() == 0
    assert (picks.residual <= gamma ** (bits - 1)).all()
    for p in range(2):
        used = picks.neurons[p][picks.neurons[p] >= 0]
        assert len(np.unique(used)) == len(used)


@pytest.mark.parametrize("size", [15, 300, 1500])
@pytest.mark.parametrize("sign", [1, -1])
def test_first_come_compiled_is_the_plain_one(size, sign):
    """Also in what short pools leave open, and with neurons in place of outputs without demand."""
    pytest.importorskip("numba")
    gamma, bits = BASES["golden"], 8
    law = Law("hyperbolic", 1.0, bits * math.log(1 / gamma))
    edges = gamma ** np.arange(bits + 1)
    demand = np.random.default_rng(size).uniform(-1, 1, (3, 12))
    demand[1, ::2] = 0
    pools = pools_of(law, 3, size)
    one, two = (exclusive.bitwise(pools, sign, demand, edges, "batch", e) for e in ENGINES)
    assert np.array_equal(one.neurons, two.neurons)
    assert np.allclose(one.residual, two.residual, atol=1e-15)
    assert np.array_equal(one.empty, two.empty)
    if size != 300:
        assert (one.empty.sum() > 0) == (size == 15)


@pytest.mark.parametrize("kind", ["batch", "matching"])
def test_a_pool_without_usable_neurons_is_all_empty_slots(kind):
    edges = 2.0 * BASES["golden"] ** np.arange(6)
    law = Law("hyperbolic", math.sqrt(2.0), 5 * math.log(1 / BASES["golden"]))
    demand = np.array([[1.0, 0.0, -0.5]])
    picks = exclusive.bitwise(pools_of(law, 1, 0), 1, demand, edges, kind)
    assert (picks.neurons == -1).all()
    assert picks.residual.tolist() == [[1.0, 0.0, 0.5]]
    assert picks.empty.tolist() == [10]
