"""The streaming summary against everything it replaces, computed on the scores themselves."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.allocation.dsa.expression import Expression
from secateur.allocation.dsa.function import reduce_summary
from secateur.allocation.dsa.operators import PRE, REDUCE
from secateur.errors import NumericsError
from secateur.evidence.score_summary import ScoreSummary, summarise


def scores(seed=0, n=50_000, zeros=0.0):
    """Like Wanda's: |Gaussian| times log-normal feature norms."""
    random = np.random.default_rng(seed)
    x = np.abs(random.normal(size=n)) * np.exp(random.normal(size=n)) * 0.02
    x[: int(n * zeros)] = 0.0
    return torch.tensor(x, dtype=torch.float32)


def summary_of(*parts):
    out = ScoreSummary()
    for part in parts:
        out.update(part)
    return out


@pytest.mark.parametrize("zeros", [0.0, 0.02])
@pytest.mark.parametrize("reduce", [r for r in REDUCE if r != "OUTLIER"])
@pytest.mark.parametrize(
    "pre", [(), *[(p,) for p in PRE if p != "NO_OP"], ("MMS", "LOG"), ("ABSLOG", "POW")]
)
def test_operators_and_reducers_agree_with_exact(pre, reduce, zeros):
    x = scores(zeros=zeros)
    got = reduce_summary(Expression(pre, reduce, ("NO_OP",)), summary_of(x))
    exact, ones = x.double().numpy(), np.ones(len(x))
    for name in pre:
        exact = PRE[name](exact, ones)
    want = REDUCE[reduce](exact, ones)
    # A mean that cancels to nearly nothing (of z-scores) is judged on the size of what is averaged.
    scale = max(abs(want), 1e-3 * float(np.abs(exact).max()))
    assert got == pytest.approx(want, abs=1e-3 * scale)


def test_moments_are_exact():
    x = scores(3, zeros=0.1)
    s, d = summary_of(x), x.double()
    assert s.count == len(x)
    assert s.zeros == int((x == 0).sum())
    assert s.total == pytest.approx(float(d.sum()), rel=1e-12)
    assert s.squares == pytest.approx(float(d.square().sum()), rel=1e-12)
    logs = d[d > 0].log()
    assert s.logs == pytest.approx(float(logs.sum()), rel=1e-6)
    assert s.log_squares == pytest.approx(float(logs.square().sum()), rel=1e-6)
    assert (s.low, s.high) == (float(x[x > 0].min()), float(x.max()))
    assert int(s.bins.sum()) + s.zeros == len(x)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(0, 2.0**100, width=32, allow_subnormal=False), min_size=1, max_size=60),
    st.data(),
)
def test_any_split_merges_to_the_same(values, data):
    x = torch.tensor(values, dtype=torch.float32)
    cut = data.draw(st.integers(0, len(values)))
    whole, left, right = summary_of(x), summary_of(x[:cut]), summary_of(x[cut:])
    right.merge(left)
    assert torch.equal(whole.bins, right.bins)
    assert (whole.count, whole.zeros, whole.low, whole.high) == (
        right.count,
        right.zeros,
        right.low,
        right.high,
    )
    assert whole.total == pytest.approx(right.total)
    assert whole.logs == pytest.approx(right.logs, abs=1e-9)
    assert int(whole.bins.min()) >= 0


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(0, 2.0**20, width=32, allow_subnormal=False), min_size=1, max_size=40),
    st.sampled_from([1.0, 1.5, 2.0, 3.0, 5.0]),
)
def test_counted_outliers_are_exact_even_at_the_threshold(values, multiple):
    x = torch.tensor(values, dtype=torch.float32)
    s = summarise(lambda: iter([("w", x)]), [multiple])
    mean = sum(float(v) for v in x.double()) / len(values)
    want = sum(float(v) > multiple * mean for v in x.double())
    near = sum(abs(float(v) - multiple * mean) <= 1e-12 * multiple * mean for v in x.double())
    assert abs(s.outlier_ratio(multiple) * len(values) - want) <= near + 1e-9


def test_outliers_from_the_histogram_are_close():
    x = scores(5)
    exact = summarise(lambda: iter([("w", x)]), [5.0]).outlier_ratio(5.0)
    assert exact == int((x.double() > 5 * x.double().mean()).sum()) / len(x)
    assert summary_of(x).outlier_ratio(5.0) == pytest.approx(exact, rel=1e-3 * 5)
    assert summary_of(x).outlier_ratio(5.0) == pytest.approx(exact, abs=1e-3)


def test_new_scores_forget_the_outliers_of_another_mean():
    x = scores(1, 1000)
    s = summarise(lambda: iter([("w", x)]), [3.0])
    s.update(100 * x)
    both = torch.cat([x, 100 * x])
    assert s.outlier_ratio(3.0) == pytest.approx(
        float((both > 3 * both.mean()).double().mean()), abs=2e-3
    )


def test_the_second_pass_must_see_the_same_scores():
    s = summary_of(torch.ones(4))
    with pytest.raises(ValueError, match="second pass"):
        s.count_outliers([torch.ones(3)], [2.0])


def test_constants_stay_themselves_and_the_input_is_untouched():
    x = torch.full((7, 3), 0.3)
    before = x.clone()
    s = summary_of(x)
    assert torch.equal(x, before)
    assert s.constant
    centres, weights = s.points()
    assert centres.tolist() == [float(x[0, 0])]
    assert weights.tolist() == [21.0]
    assert summary_of(torch.zeros(5)).constant
    assert summary_of(torch.zeros(5)).points()[0].tolist() == [0.0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_scores_without_a_histogram_are_refused_by_name(bad):
    with pytest.raises(NumericsError, match=r"model\.layers\.3"):
        ScoreSummary().update(torch.tensor([1.0, bad]), "model.layers.3")


def test_state_round_trip():
    s = summarise(lambda: iter([("w", scores(2, 999, 0.01))]), [2.0, 5.0])
    back = ScoreSummary.from_state(s.state())
    assert vars(back).keys() == vars(s).keys()
    assert torch.equal(back.bins, s.bins)
    for name in ("count", "zeros", "total", "squares", "logs", "log_squares", "low", "high"):
        assert getattr(back, name) == getattr(s, name)
    assert back.outlier_ratio(5.0) == s.outlier_ratio(5.0)


def test_median_is_within_a_bin():
    x = scores(9)
    assert summary_of(x).median() == pytest.approx(float(x.median()), rel=0.01)
