"""SlimGPT's decision for one group of units, as the run asks for it."""

from dataclasses import replace

import pytest
import torch

from secateur.cli.common import read_options
from secateur.errors import UsageError
from secateur.evidence.statistics import InputMoments
from secateur.methods.slimgpt import SlimGPT
from secateur.methods.structured_base import UnitProblem
from secateur.solvers.groups import contiguous_groups
from secateur.solvers.structured_reference import remove_groups_reference


def problem_of(count, *, columns=24, size=4, gone=(), even=1, tokens=300, kind="head", seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator)
    x = torch.randn(tokens, columns, generator=generator) @ mix
    moments = InputMoments(columns, gram=True)
    moments.update(x)
    weight = torch.randn(8, columns, generator=generator)
    groups = contiguous_groups(columns, size)
    mask = torch.zeros(len(groups), dtype=torch.bool)
    mask[list(gone)] = True
    weight[:, groups[mask].flatten()] = 0
    return UnitProblem("layer.0", kind, weight, groups, moments, count, mask, even)


@pytest.mark.parametrize("head_score", ["slimgpt", "exact", "initial_diag"])
def test_heads_go_one_by_one_like_the_textbook_loop(head_score):
    problem = problem_of(3)
    found = SlimGPT(head_score=head_score).decide(problem)
    expected, order, error = remove_groups_reference(
        problem.weight.double(), problem.moments.second_moment().double(), problem.columns,
        [1, 1, 1], score=head_score,
    )  # fmt: skip
    assert sorted(order) == found.gone.nonzero().flatten().tolist()
    assert torch.allclose(found.weight.double(), expected, atol=1e-4)
    assert found.notes["error"] == pytest.approx(error, rel=1e-4)
    assert found.score.shape == (6,)


@pytest.mark.parametrize("group_size", [1, 5, "6:2", "1/32", "published"])
def test_channels_go_in_rounds(group_size):
    problem = problem_of(11, size=1, kind="ffn")
    found = SlimGPT(group_size=group_size).decide(problem)
    assert int(found.gone.sum()) == 11
    assert bool((found.weight[:, found.gone] == 0).all())
    assert found.weight.dtype == problem.weight.dtype


def test_units_gone_already_count_and_go_first():
    problem = problem_of(3, gone=(1, 4))
    found = SlimGPT().decide(problem)
    assert int(found.gone.sum()) == 3
    assert bool(found.gone[[1, 4]].all())
    unchanged = problem_of(2, gone=(1, 4))
    found = SlimGPT().decide(unchanged)
    assert found.gone.nonzero().flatten().tolist() == [1, 4]
    assert torch.allclose(found.weight, unchanged.weight, atol=1e-5)


def test_equal_shares_of_every_key_value_group():
    found = SlimGPT().decide(problem_of(4, columns=48, size=4, even=4))
    assert found.gone.view(4, 3).sum(1).tolist() == [1, 1, 1, 1]


def test_without_compensation_the_weights_are_left_alone():
    problem = problem_of(2)
    plain, fitted = SlimGPT(compensate=False).decide(problem), SlimGPT().decide(problem)
    assert plain.weight is None
    assert torch.equal(plain.gone, fitted.gone)
    assert plain.notes["error"] > fitted.notes["error"]


def test_a_bias_takes_over_the_mean_of_what_goes():
    """Inputs far from zero: with the bias the outputs stay nearer than without."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(400, 24, generator=generator) @ torch.randn(24, 24, generator=generator)
    x += 4 * torch.randn(24, generator=generator)
    moments = InputMoments(24, gram=True)
    moments.update(x)
    plain = problem_of(3)
    bias = torch.randn(8, generator=generator)
    problem = replace(plain, moments=moments, bias=bias)
    target = x @ problem.weight.T + bias

    def gap(found):
        shift = bias if found.bias is None else found.bias
        return float((x @ found.weight.T + shift - target).square().mean())

    moved, kept = SlimGPT().decide(problem), SlimGPT(bias=False).decide(problem)
    assert moved.weight.shape == problem.weight.shape
    assert kept.bias is None
    assert gap(moved) < 0.9 * gap(kept)

    # An input that never varies is free: the bias carries it.
    x[:, :4] = torch.tensor([5.0, -2.0, 1.0, 3.0])
    moments = InputMoments(24, gram=True)
    moments.update(x)
    constant = replace(problem, moments=moments, count=1)
    found = SlimGPT().decide(constant)
    assert found.gone.nonzero().flatten().tolist() == [0]
    assert torch.allclose(x @ found.weight.T + found.bias, x @ problem.weight.T + bias, atol=0.05)
    assert SlimGPT(compensate=False).decide(problem).bias is None


def test_local_search_does_not_lose():
    problem = problem_of(12, size=1, kind="ffn", seed=3)
    plain = SlimGPT(group_size=12).decide(problem)
    searched = SlimGPT(group_size=12, local_search=20).decide(problem)
    assert int(searched.gone.sum()) == 12
    assert searched.notes["error"] <= plain.notes["error"] * (1 + 1e-9)


def test_too_few_tokens_is_survived_and_recorded():
    found = SlimGPT(damping=0.0).decide(problem_of(2, tokens=3))
    assert found.notes["damping"] > 0
    assert bool(torch.isfinite(found.weight).all())


@pytest.mark.parametrize("size", [4, 24])
def test_a_group_that_would_be_emptied_is_refused(size):
    """All heads; and the only key-value group of multi-query attention."""
    with pytest.raises(UsageError, match=r"layer\.0.*at least one must stay"):
        SlimGPT().decide(problem_of(24 // size, size=size))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("head_score", "best"),
        ("group_size", "8:64"),
        ("group_size", 0),
        ("damping", -0.1),
        ("damping", "much"),
        ("local_search", -1),
        ("heads", 3),
    ],
)
def test_bad_options_name_the_option(option, value):
    with pytest.raises(UsageError, match=option):
        SlimGPT.with_options({option: value})


def test_a_schedule_on_the_command_line_is_read_as_written():
    """YAML 1.1 takes 64:8 for 64 x 60 + 8."""
    options = read_options(["group_size=64:8", "compensate=false"])
    assert SlimGPT.with_options(options) == SlimGPT(group_size="64:8", compensate=False)
