"""Targets, scopes and cuts: parsing, exact arithmetic, refusals."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateur.errors import UsageError
from secateur.masks.target import Cut, Scope, Target, spread


@pytest.mark.parametrize(
    ("text", "sparsity"), [(0.5, 0.5), ("0.5", 0.5), ("50%", 0.5), (0, 0.0), ("12.5%", 0.125)]
)
def test_sparsities(text, sparsity):
    target = Target.parse(text)
    assert target.sparsity == sparsity
    assert not target.is_pattern


@pytest.mark.parametrize(("text", "sparsity"), [("2:4", 0.5), ("1:4", 0.75), ("4:8", 0.5)])
def test_patterns_keep_n_of_m(text, sparsity):
    target = Target.parse(text)
    assert target.is_pattern
    assert target.sparsity == sparsity
    assert str(target) == text


@pytest.mark.parametrize(
    "value", [1.0, -0.1, 1.5, 50, "nan", "inf", "half", "", None, "0:4", "5:4", "2:4:8"]
)
def test_refusals_name_the_field(value):
    with pytest.raises(UsageError, match="sparsity"):
        Target.parse(value)


def test_a_percentage_without_its_sign_is_guessed():
    with pytest.raises(UsageError, match=r"did you mean 0\.7"):
        Target.parse(70)


def test_contradiction_is_refused_and_confirmation_is_not():
    with pytest.raises(UsageError, match="contradicts"):
        Target.parse(0.7, pattern="2:4")
    assert Target.parse(0.5, pattern="2:4").keep == 2
    assert Target.parse(None, pattern="2:4").keep == 2
    with pytest.raises(UsageError, match="N:M"):
        Target.parse(0.5, pattern="0.5")


def test_count_uses_the_decimal_that_was_typed():
    assert Target.parse(0.1).count(10) == 1
    assert Target.parse(0.7).count(10) == 7  # 0.7 in binary is a little less than 0.7
    assert Target.parse(0.5).count(3) == 2  # halves up
    assert Target.parse(0.3).fraction == Fraction(3, 10)


@pytest.mark.parametrize("text", ["row", "layer", "block", "block:64", "global"])
def test_scopes_round_trip(text):
    scope = Scope.parse(text)
    assert Scope.parse(str(scope)) == scope


@pytest.mark.parametrize("text", ["column", "row:4", "block:0", "block:x", ""])
def test_unknown_scopes(text):
    with pytest.raises(UsageError, match="scope"):
        Scope.parse(text)


def test_cut_of_a_pattern_must_divide():
    assert Cut.of((3, 8), Target.parse("1:4"), Scope("row")).count == 18
    with pytest.raises(UsageError, match=r"'fc' has 10 inputs"):
        Cut.of((3, 10), Target.parse("2:4"), Scope("row"), "fc")


@given(st.lists(st.integers(0, 50), min_size=1, max_size=20), st.floats(0, 1))
def test_spread_is_exact_and_even(sizes, share):
    total = sum(sizes)
    count = round(share * total)
    shares = spread(count, sizes)
    assert sum(shares) == count
    for given_out, size in zip(shares, sizes, strict=True):
        assert 0 <= given_out <= size
        assert abs(given_out - (count * size / total if total else 0)) < 1
