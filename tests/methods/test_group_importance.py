"""LLM-Pruner's importances in closed form, by finite differences, and folded for shared keys."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from secateur.errors import NumericsError, UsageError
from secateur.methods.group_importance import (
    REDUCTIONS,
    channel_importance,
    folded,
    reduced,
)

W = torch.tensor([[1.0, -2.0, 3.0], [0.5, 4.0, -1.0]])
G = torch.tensor([[0.1, 0.2, -0.3], [-1.0, 0.5, 2.0]])
F = torch.tensor([[1.0, 0.5, 2.0], [0.1, 3.0, 1.0]])


@pytest.mark.parametrize(
    ("criterion", "score"),
    [
        ("element1", W * G),
        ("element2", W * F * W),
        ("mix", W * G - 0.5 * W * F * W),
        ("l1", W),
        ("l2", W * W),
    ],
)
def test_closed_forms(criterion: str, score: Tensor) -> None:
    rows = channel_importance(W, 0, criterion, G, F)  # type: ignore[arg-type]
    columns = channel_importance(W, 1, criterion, G, F)  # type: ignore[arg-type]
    torch.testing.assert_close(rows, score.abs().sum(1))
    torch.testing.assert_close(columns, score.abs().sum(0))


def test_vector_sums_before_the_size_is_taken() -> None:
    torch.testing.assert_close(channel_importance(W, 0, "vector", G), (W * G).sum(1).abs())
    torch.testing.assert_close(channel_importance(W, 1, "vector", G), (W * G).sum(0).abs())


def test_a_norm_or_bias_has_one_weight_a_channel() -> None:
    for criterion in ("element1", "vector"):
        found = channel_importance(W[0], 0, criterion, G[0])  # type: ignore[arg-type]
        torch.testing.assert_close(found, (W[0] * G[0]).abs())


def test_half_precision_is_scored_in_float32() -> None:
    small = torch.full((4, 4), 1e-4, dtype=torch.float16)
    tiny = torch.full((4, 4), 1e-6)
    assert (channel_importance(small, 0, "element1", tiny) > 0).all()  # 1e-10 is no float16


def test_vector_is_the_derivative_of_scaling_the_channel() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2)).double()
    x = torch.randn(16, 5, dtype=torch.float64)

    def loss() -> Tensor:
        return net(x).square().mean()

    loss().backward()
    down = net[2]
    found = channel_importance(down.weight.detach(), 1, "vector", down.weight.grad)
    for channel in range(7):
        sides = []
        for sign in (1, -1):
            with torch.no_grad():
                before = down.weight[:, channel].clone()
                down.weight[:, channel] *= 1 + sign * 1e-5
                sides.append(float(loss()))
                down.weight[:, channel] = before
        slope = abs(sides[0] - sides[1]) / 2e-5
        assert float(found[channel]) == pytest.approx(slope, rel=1e-4)


def test_a_swiglu_channel_counts_the_same_in_up_and_down() -> None:
    """up enters linearly, so scaling its row or the down column is one and the same."""
    torch.manual_seed(0)
    gate, up, down = (nn.Linear(6, 8, bias=False), nn.Linear(6, 8, bias=False), nn.Linear(8, 6))
    x = torch.randn(20, 6)
    down(nn.functional.silu(gate(x)) * up(x)).pow(3).mean().backward()
    rows = channel_importance(up.weight.detach(), 0, "vector", up.weight.grad)
    columns = channel_importance(down.weight.detach(), 1, "vector", down.weight.grad)
    torch.testing.assert_close(rows, columns, rtol=1e-4, atol=1e-7)


def test_a_key_value_head_answers_for_its_own_query_heads() -> None:
    heads, kv, dim = 8, 2, 3
    scores = torch.rand(heads * dim)
    index = torch.arange(heads * dim).view(kv, -1)
    own = folded(scores, index, dim)
    torch.testing.assert_close(own, scores.double().view(kv, heads // kv, dim).sum(1))
    other = scores.clone().view(kv, -1)
    other[1] *= 100  # query heads of the other group
    assert torch.equal(folded(other.reshape(-1), index, dim)[0], own[0])
    # the authors' fold, heads h, h + n_kv, ...: it does not have that property
    theirs = [s.view(heads // kv, kv, dim).sum(0)[0] for s in (scores, other.reshape(-1))]
    assert not torch.allclose(theirs[0], theirs[1])


def test_reductions() -> None:
    a = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    b = torch.tensor([[10.0, 1.0], [0.5, 2.0]])
    c = torch.tensor([[1.0, 1.0], [2.0, 2.0]])
    expected = {
        "sum": [15 + 1, 5.5 + 8],
        "mean": [16 / 3, 13.5 / 3],
        "max": [10 + 2, 3 + 4],
        "prod": [10 + 2, 3 + 16],
        "first": [3, 7],
        "second": [11, 2.5],
        "last": [2, 4],
    }
    assert set(expected) == set(REDUCTIONS)
    for how, values in expected.items():
        found = reduced([a, b, c], how)  # type: ignore[arg-type]
        torch.testing.assert_close(found, torch.tensor(values, dtype=torch.float64))


def test_products_of_small_figures_do_not_vanish() -> None:
    members = [torch.full((3, 1), 1e-8)] * 7
    assert (reduced(members, "prod") > 0).all()


def test_bad_input_is_named() -> None:
    with pytest.raises(UsageError, match="criterion"):
        channel_importance(W, 0, "element3", G)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="reduction"):
        reduced([W], "median")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="gradient"):
        channel_importance(W, 0, "element1")
    with pytest.raises(NumericsError, match="NaN"):
        reduced([torch.tensor([[float("nan")]])], "sum")
