"""DEPrune's choices of taps: exact counts, balance, nesting, alignment; and what they mean."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from secateur.errors import NumericsError, UsageError
from secateur.masks import depthwise as dw
from secateur.methods import deprune_reference as reference


def weight(channels, kernel, seed=0, sigma=0.0):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.exp(sigma * torch.randn(channels, 1, 1, 1, generator=generator))
    return torch.randn(channels, 1, kernel, kernel, generator=generator) * scale


def mass(w, mask):
    return float(w[~mask].abs().double().sum())


# -- the reference form -------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [32, 40, 7])
@pytest.mark.parametrize("kernel", [3, 5, 7])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("padding", [0, 2])
def test_refactored_is_the_convolution(channels, kernel, stride, padding):
    conv = nn.Conv2d(channels, channels, kernel, stride, padding, groups=channels).eval()
    x = torch.randn(2, channels, 11, 9)
    with torch.no_grad():
        assert torch.allclose(reference.refactored(conv, x), conv(x), atol=1e-4)
        mask = torch.rand(conv.weight.shape) < 0.6
        compact = reference.refactored(conv, x, mask)
        conv.weight[mask] = 0
        assert torch.allclose(compact, conv(x), atol=1e-4)


def test_a_tap_is_a_column():
    w = weight(40, 3)
    full = reference.diagonals(w)
    for channel, tap in ((0, 4), (31, 8), (32, 0), (39, 7)):
        less = w.clone()
        less[channel].view(-1)[tap] = 0
        for g, (before, after) in enumerate(zip(full, reference.diagonals(less), strict=True)):
            gone = (before != after).any(0).nonzero().view(-1).tolist()
            assert gone == ([channel % 32 * 9 + tap] if g == channel // 32 else [])
            assert not after[:, gone].any()


# -- exact counts -------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(
    st.integers(1, 100), st.sampled_from([1, 3, 5]), st.floats(0, 0.99), st.integers(0, 9),
    st.booleans(),
)  # fmt: skip
def test_counts_balance_and_nesting(channels, kernel, ratio, seed, tied):
    w = weight(channels, kernel, seed, 0.6)
    if tied:
        w = (w * 2).round()
    taps = kernel * kernel
    kept = dw.columns(taps, ratio)
    bwt = dw.balanced(w, kept)
    widths = dw.kept_columns(bwt)
    rest = channels % 32
    assert widths[: channels // 32] == [kept] * (channels // 32)
    if rest:
        assert widths[-1] == round(kept * rest / 32) <= kept
    count = int(bwt.sum())
    dcp = dw.dcp(w, count)
    assert int(dcp.sum()) == count
    if 0 < count < w.numel():
        assert float(w[dcp].abs().max()) <= float(w[~dcp].abs().min())
    four = dw.fours(w, kept)
    assert dw.kept_columns(four) == widths
    for part in four.flatten(1).split(32):
        groups = [int(g.sum()) for g in part.reshape(-1).split(4) if len(g) == 4]
        assert not groups or max(groups) - min(groups) <= 1
    # each is a choice the one before could have made
    assert mass(w, dcp) >= mass(w, bwt) - 1e-9 >= mass(w, four) - 2e-9
    assert dw.imbalance(dcp) >= 0
    if not rest:
        assert dw.imbalance(bwt) == pytest.approx(0, abs=1e-6)
    # fewer columns are fewer of the same
    assert bool((bwt <= dw.balanced(w, kept // 2)).all())


def test_half_in_fours_is_two_of_four():
    w = weight(64, 4, 3)
    four = dw.fours(w, dw.columns(16, 0.5)).view(-1, 4)
    assert bool((four.sum(1) == 2).all())
    assert float(w.view(-1, 4)[four].abs().sum()) == pytest.approx(
        float(w.view(-1, 4).abs().sort(1).values[:, :2].sum())
    )


@pytest.mark.parametrize("ratio", [0.5, 0.75])
def test_channels_keep_least(ratio):
    # without channel scales; with them a whole channel may hold more than a range may keep
    w = weight(96, 3, 5)
    gone = dw.channels(w, round(ratio * 96))
    assert int(gone.sum()) == round(ratio * 96) * 9
    assert set(gone.flatten(1).sum(1).tolist()) == {0, 9}
    assert mass(w, gone) < mass(w, dw.fours(w, dw.columns(9, ratio)))
    scaled = weight(96, 3, 5, 1.0)
    gone = dw.channels(scaled, round(ratio * 96))
    assert mass(scaled, gone) <= mass(scaled, dw.dcp(scaled, int(gone.sum())))


def test_imbalance_of_free_choice_is_what_was_simulated():
    # MobileNetV2's depth-wise widths at 60 %: 3.8 points on average without channel scales
    widths = [32, 96, 144, 144, 192, 192, 192, 384, 384, 384, 384, 576, 576, 576, 960, 960, 960]
    mean = {}
    for sigma in (0.0, 0.6):
        seen = [dw.imbalance(dw.dcp(weight(m, 3, i, sigma), round(0.6 * m * 9)))
                for i, m in enumerate(widths)]  # fmt: skip
        mean[sigma] = sum(seen) / len(seen)
    assert 0.02 < mean[0.0] < 0.06 < mean[0.6] < 0.12


def test_shares_over_layers():
    weights = {"a": weight(32, 3, 0), "b": 10 * weight(64, 5, 1), "c": 0.01 * weight(48, 3, 2)}
    total = sum(w.numel() for w in weights.values())
    uniform = dw.layer_counts(weights, 0.6, "uniform")
    assert uniform == {n: round(0.6 * w.numel()) for n, w in weights.items()}
    scaled = dw.layer_counts(weights, 0.6, "global")
    assert sum(scaled.values()) == round(0.6 * total)
    assert scaled == dw.layer_counts({n: 3 * w for n, w in weights.items()}, 0.6, "global")
    raw = dw.layer_counts(weights, 0.6, "raw")
    assert raw["c"] == weights["c"].numel() - 1  # one is left: nothing would pass otherwise


# -- alignment ----------------------------------------------------------------------------------


def test_recalibration_by_hand():
    # beyond a multiple: 16, 19, 8, 0; gains per unit 2/16, 1.9/19, 4/8
    times = {
        (0, 144): 10.0,
        (0, 128): 8.0,
        (1, 115): 9.0,
        (1, 96): 7.1,
        (2, 232): 20.0,
        (2, 224): 16.0,
    }
    seen = dw.recalibrate([144, 115, 232, 320], [288, 288, 800, 800], lambda i, n: times[i, n])
    assert seen == [128, 128, 224, 320]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([9, 25, 49]), st.floats(0, 0.99)), min_size=1, max_size=20)
)
def test_recalibration_aligns_everything_and_moves_little(layers):
    limits = [32 * taps for taps, _ in layers]
    kept = [max(1, dw.columns(taps, ratio)) for taps, ratio in layers]
    gain = {i: (i * 37 % 11) + 1 for i in range(len(layers))}

    def seconds(layer, width):
        return 100.0 + gain[layer] * width

    seen = dw.recalibrate(kept, limits, seconds)
    assert all(n % 32 == 0 and n > 0 for n in seen)
    assert all(abs(a - b) <= 31 for a, b in zip(seen, kept, strict=True))
    assert all(a == b for a, b in zip(seen, kept, strict=True) if b % 32 == 0)
    free = [i for i, n in enumerate(kept) if n % 32 and n > 32]
    down = [i for i in free if seen[i] < kept[i]]
    up = [i for i in free if seen[i] > kept[i]]
    assert len(down) == (len(free) + 1) // 2
    assert not down or not up or min(gain[i] for i in down) >= max(gain[i] for i in up)


def test_the_staircase():
    seconds = dw.staircase(1.0, 0.5)
    assert [seconds(0, n) for n in (1, 32, 33, 64)] == [1.5, 1.5, 2.0, 2.0]


# -- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [1.0, -0.1, 1.5, float("nan")])
def test_shares_out_of_range(ratio):
    with pytest.raises(UsageError, match=r"\[0, 1\)"):
        dw.columns(9, ratio)
    with pytest.raises(UsageError, match=r"\[0, 1\)"):
        dw.layer_counts({"a": weight(4, 3)}, ratio, "uniform")


def test_nothing_to_remove():
    w = weight(40, 3)
    kept = dw.columns(9, 0.0)
    for mask in (dw.balanced(w, kept), dw.fours(w, kept), dw.dcp(w, 0), dw.channels(w, 0)):
        assert not mask.any()


def test_nan_and_impossible_widths():
    w = weight(40, 3)
    w[3, 0, 1, 1] = float("nan")
    for choose in (dw.dcp, dw.balanced, dw.fours, dw.channels):
        with pytest.raises(NumericsError, match="'layer'"):
            choose(w, 10, "layer")
    with pytest.raises(UsageError, match="288 columns"):
        dw.balanced(weight(40, 3), 289)
