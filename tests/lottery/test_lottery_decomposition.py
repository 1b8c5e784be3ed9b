"""The golden-ratio lemma, its counter-examples, and the category probabilities."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from secateur.errors import UsageError
from secateur.lottery.decomposition import (
    BASES,
    bits_needed,
    category_probabilities,
    greedy,
    ratio,
    slot_probability,
)
from secateur.lottery.drawing import draw
from secateur.lottery.laws import Law

GAMMAS = [BASES["golden"], 2 / 3, 0.7]


@given(
    gamma=st.sampled_from(GAMMAS),
    weight=st.floats(0, 1),
    places=st.lists(st.floats(0, 1), min_size=1, max_size=25),
)
@settings(max_examples=300, deadline=None)
def test_greedy_meets_every_weight(gamma, weight, places):
    parts = [gamma ** (i + 1) + t * (gamma**i - gamma ** (i + 1)) for i, t in enumerate(places)]
    _, left = greedy(weight, parts)
    assert -1e-15 <= left <= gamma ** (len(parts) - 1) * (1 + 1e-12)


@pytest.mark.parametrize("gamma", GAMMAS)
def test_adversarial_parts_at_the_ends_of_their_intervals(gamma):
    k, worst = 9, 0.0
    weights = np.linspace(0, 1, 201)
    for ends in itertools.product((0.0, 1.0), repeat=k):
        parts = [gamma ** (i + 1 - e) for i, e in enumerate(ends)]
        worst = max(worst, max(greedy(w, parts)[1] for w in weights))
    assert worst <= gamma ** (k - 1) * (1 + 1e-12)
    assert worst > 0.5 * gamma ** (k - 1)  # the bound is not idle


@pytest.mark.parametrize("gamma", [0.6, 0.5])
def test_faster_bases_fail(gamma):
    """Below 1/phi some parts leave a gap: all at their lower ends cannot reach 1."""
    k = 25
    parts = [gamma ** (i + 1) for i in range(k)]
    lowest_failing = max(greedy(w, parts)[1] for w in np.linspace(0, 1, 1001))
    mixed = [gamma**1] + [gamma**i for i in range(1, k)]
    worst = max(lowest_failing, max(greedy(w, mixed)[1] for w in np.linspace(0, 1, 1001)))
    skip_first = [1.0] + [gamma ** (i + 1) for i in range(1, k)]
    worst = max(worst, greedy(1 - 1e-9, skip_first)[1])
    assert worst > 100 * gamma ** (k - 1)


def test_golden_is_the_fastest_base_for_float64_too():
    gamma = BASES["golden"]
    assert 1 - gamma**2 <= gamma
    assert gamma - 0.6180339887498949 < 1e-15


@pytest.mark.parametrize("k", [1, 2, 5, 16, 30, 60])
def test_category_probabilities(k):
    p = category_probabilities(k)
    assert p.sum() == pytest.approx(0.75)
    assert k * p.min() >= 0.5 - 1e-12
    assert k * p.max() <= 1 + 1e-12
    assert slot_probability(k) >= 1 / (8 * k) - 1e-15


def test_categories_are_hit_as_often_as_computed():
    k, draws = 16, 40_000
    gamma = BASES["golden"]
    law = Law("hyperbolic", 1.0, k * math.log(1 / gamma))
    a, b = (draw(law, 5, 0, role, 0, np.arange(draws), 0).astype(float) for role in (0, 1))
    category = np.floor(-np.log(np.abs(a * b)) / math.log(1 / gamma)).astype(int)
    seen = np.bincount(category[(category >= 0) & (category < k)], minlength=k)
    p = category_probabilities(k)
    expected = np.append(p, 1 - p.sum()) * draws
    assert stats.chisquare(np.append(seen, draws - seen.sum()), expected).pvalue > 1e-3


@given(w_max=st.floats(1e-3, 1e3), eps=st.floats(1e-6, 10), gamma=st.sampled_from(GAMMAS))
@settings(max_examples=100, deadline=None)
def test_bits_suffice_and_are_not_wasteful(w_max, eps, gamma):
    k = bits_needed(w_max, eps, gamma)
    assert w_max * gamma ** (k - 1) <= eps * (1 + 1e-12) or k == 1
    assert k == 1 or w_max * gamma ** (k - 3) > eps * (1 - 1e-9)


@pytest.mark.parametrize("base", ["binary", 2, 1, 0, -3, 1.7])
def test_bad_bases(base):
    with pytest.raises(UsageError, match="base"):
        ratio(base)
