"""DSA's operators by hand, its functions on blocks, and the released code's quirks."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.allocation.dsa.expression import Expression
from secateur.allocation.dsa.function import phi
from secateur.allocation.dsa.operators import POST, PRE, REDUCE
from secateur.allocation.dsa.presets import PRESETS
from secateur.allocation.dsa.reference import reference_phi, reference_ratios
from secateur.allocation.mapping import around_mean
from secateur.errors import NumericsError
from secateur.evidence.score_summary import ScoreSummary

E = math.e
X = np.array([0.0, 0.5, 1.0, E])
W = np.array([1.0, 2.0, 1.0, 1.0])

BY_HAND = {
    "NO_OP": [0, 0.5, 1, E],
    "ABS": [0, 0.5, 1, E],
    "LOG": [0, -math.log(2), 0, 1],
    "ABSLOG": [0, -math.log(2), 0, 1],
    "LOGABS": [0, math.log(2), 0, 1],
    "POW": [0, 0.25, 1, E * E],
    "EXP": [1, math.exp(0.5), E, math.exp(E)],
    "MMS": [0, 0.5 / E, 1 / E, 1],
    "SIGMOID": [1 / (1 + math.exp(-x)) for x in X],
    "TANH": [math.tanh(x) for x in X],
}


@pytest.mark.parametrize("name", PRE)
def test_pre_operators_by_hand_and_without_side_effects(name):
    x, w = X.copy(), W.copy()
    got = PRE[name](x, w)
    if name == "NORMALIZE":
        mean = (0 + 2 * 0.5 + 1 + E) / 5
        var = (mean**2 + 2 * (0.5 - mean) ** 2 + (1 - mean) ** 2 + (E - mean) ** 2) / 5
        want = (X - mean) / math.sqrt(var)
    else:
        want = BY_HAND[name]
    assert got == pytest.approx(np.array(want))
    assert np.array_equal(x, X)
    assert np.array_equal(w, W)


def test_logarithms_leave_their_domain_as_zero():
    assert PRE["LOG"](np.array([-2.0, 0.0]), W).tolist() == [0, 0]
    assert PRE["ABSLOG"](np.array([-2.0, 0.0]), W) == pytest.approx([math.log(2), 0])


def test_reducers_by_hand():
    x, w = np.array([1.0, 2.0, 4.0]), np.array([2.0, 1.0, 1.0])  # 1 1 2 4
    want = {
        "MEAN": 2.0,
        "VAR": (1 + 1 + 0 + 4) / 4,
        "STD": math.sqrt(1.5),
        "L1_NORM": 2.0,
        "FROBENIUS_NORM": math.sqrt(22),
        "GRAM": 22.0,
        "GEOMETRIC_MEAN": 8**0.25,
        "ENTROPY": -(2 / 8 * math.log(1 / 8) + 2 / 8 * math.log(2 / 8) + 4 / 8 * math.log(4 / 8)),
        "OUTLIER": 0.0,
    }
    assert {name: REDUCE[name](x, w) for name in REDUCE} == pytest.approx(want)
    assert REDUCE["L1_NORM"](-x, w) == 2.0
    assert REDUCE["GEOMETRIC_MEAN"](np.array([0.0, 1.0]), np.ones(2)) == 0.0
    assert REDUCE["GEOMETRIC_MEAN"](np.full(3, 1e-9), np.array([1e8, 1e8, 1e8])) == pytest.approx(
        1e-9
    )  # where a product underflows


@pytest.mark.parametrize("name", POST)
def test_post_operators_are_pure(name):
    v = np.array([0.2, 0.9])
    POST[name](v)
    assert v.tolist() == [0.2, 0.9]
    plain = {
        "NEG": np.negative, "ASIN": np.arcsin, "ACOS": np.arccos, "ATAN": np.arctan, "SIN": np.sin,
        "COS": np.cos, "TAN": np.tan, "EXP": np.exp, "LOG": np.log, "ABS": np.abs, "TANH": np.tanh,
        "NO_OP": lambda x: x,
        "SIGMOID": lambda x: 1 / (1 + np.exp(-x)),
        "SOFTPLUS": lambda x: np.log1p(np.exp(x)),
        "SOFTMAX": lambda x: np.exp(x) / np.exp(x).sum(),
    }  # fmt: skip
    assert POST[name](v) == pytest.approx(plain[name](v))


def block(*values):
    s = ScoreSummary()
    s.update(torch.tensor(values, dtype=torch.float32))
    return s


def spreading(sigmas, n=4000):
    """Blocks of log-normal scores; the variance of ln S is sigma^2."""
    random = np.random.default_rng(0)
    z = random.normal(size=n)
    return [block(*np.exp(s * (z - z.mean()) / z.std()).tolist()) for s in sigmas]


def test_the_released_function_and_the_value_it_fails_at():
    e = Expression.parse(PRESETS["released"])
    blocks = spreading([0.5, 1.0, 1.2])
    want = [math.asin(math.atan(s**2)) for s in (0.5, 1.0, 1.2)]
    assert phi(e, blocks) == pytest.approx(want, rel=1e-4)
    with pytest.raises(NumericsError, match=r"ASIN of 1\.\d+ is not finite in block 1"):
        phi(e, spreading([0.5, 1.3]))  # 1.69 > tan 1 = 1.557


def test_the_paper_function_is_finite_on_ordinary_scores():
    values = phi(Expression.parse(PRESETS["paper"]), spreading([0.3, 1.0, 3.0]))
    assert np.isfinite(values).all()
    assert (values > 1 / E - 1e-9).all()
    assert (values < E + 1e-9).all()


def test_the_reference_quirks_are_kept_apart():
    e = Expression.parse(PRESETS["released"])
    blocks = spreading([0.5, 1.0, 1.3])
    values = reference_phi(e, blocks)
    assert values[2] == 0.0  # NaN made 0 ...
    ratios = reference_ratios(values.tolist(), 0.7)
    assert ratios[2] == min(ratios)  # ... which is the least sparse, where the function fails
    assert max(ratios) - min(ratios) == pytest.approx(0.16)
    assert sum(ratios) / 3 == pytest.approx(0.7)
    geometric = Expression.parse("W:(NO_OP)-(GEOMETRIC_MEAN)-(NO_OP)")
    assert reference_phi(geometric, [block(*[0.01] * 100)])[0] == 0.0  # the product underflows
    assert phi(geometric, [block(*[0.01] * 100)])[0] == pytest.approx(0.01)
    assert min(reference_ratios([0.0, 1.0], 0.05)) == 0.01


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(-1000, 1000), min_size=2, max_size=12).filter(lambda v: len(set(v)) > 1),
    st.floats(0.01, 100),
    st.floats(-50, 50),
    st.sampled_from([0.3, 0.5, 0.7]),
)
def test_mean_shift(values, scale, offset, sparsity):
    v = [x / 10 for x in values]
    equal = [7] * len(v)
    ratios = around_mean(v, equal, sparsity, 0.08)
    assert sum(ratios) / len(v) == pytest.approx(sparsity, abs=1e-12)
    assert max(ratios) - min(ratios) == pytest.approx(0.16, abs=1e-12)
    moved = around_mean([scale * x + offset for x in v], equal, sparsity, 0.08)
    assert moved == pytest.approx(ratios, abs=1e-6)
    turned = around_mean([-x for x in v], equal, sparsity, 0.08)
    assert sorted(range(len(v)), key=lambda i: (ratios[i], v[i])) == sorted(
        range(len(v)), key=lambda i: (-turned[i], v[i])
    )
    sizes = [1 + i for i in range(len(v))]
    weighted = around_mean(v, sizes, sparsity, 0.08)
    assert np.average(weighted, weights=sizes) == pytest.approx(sparsity, abs=1e-12)


def test_rounding_noise_is_no_difference():
    assert around_mean([0.1 + 0.2, 0.3, 0.3], [1, 1, 1], 0.6, 0.08) == [0.6] * 3
