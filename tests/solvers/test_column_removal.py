"""Compensation of columns that go: three ways, one answer, which is the least-squares optimum."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.errors import NumericsError, UsageError
from secateur.solvers.column_removal import cheapest, removal_coefficients
from secateur.solvers.structured_obs import remove_groups

WAYS = ("cholesky", "kernel", "cg")


def inputs(n=60, c=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(c, c, generator=generator).double()
    return torch.randn(n, c, generator=generator).double() @ mixing


@given(seed=st.integers(0, 30), n=st.sampled_from([4, 9, 40]), gone=st.integers(1, 6))
@settings(max_examples=25, deadline=None)
def test_every_way_gives_ridge_regression(seed, n, gone):
    """(G.3) Against the normal equations, written out."""
    x = inputs(n, 9, seed)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(seed))
    out, kept = order[:gone], order[gone:]
    moment = x.T @ x / n
    ridge = 0.01 * moment.diagonal().mean() * torch.eye(9 - gone, dtype=torch.float64)
    wanted = torch.linalg.solve(moment[kept][:, kept] + ridge, moment[kept][:, out]).T
    for way in WAYS:
        found = removal_coefficients(x, kept, out, 0.01, way)
        assert torch.allclose(found, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max())), way


def test_it_is_what_the_down_dated_inverse_leaves():
    """(G.3) One column after the other by rank-one down-dates, or all at once: the same weights."""
    x, weight = inputs(), torch.randn(5, 9).double()
    groups = torch.arange(9)[:, None]
    first = torch.zeros(9, dtype=torch.bool)
    first[[2, 5, 7]] = True
    removal = remove_groups(
        weight, x.T @ x / len(x), groups, [], first=first, update="obs", damping=0.01
    )
    gone, kept = first.nonzero().flatten(), (~first).nonzero().flatten()
    # The elimination damps all of H, columns that go included; their own ridge changes nothing.
    after = weight[:, kept] + weight[:, gone] @ removal_coefficients(x, kept, gone, 0.01)
    assert torch.allclose(after, removal.weight[:, kept], atol=1e-9)


def test_error_is_never_more_than_without_and_none_for_a_copy():
    """(G.3) A column that is a combination of those that stay is made up for exactly."""
    x, weight = inputs(), torch.randn(4, 9).double()
    x[:, 8] = 2 * x[:, 0] - x[:, 3]
    kept, gone = torch.arange(8), torch.tensor([8])
    found = removal_coefficients(x, kept, gone, 1e-10)
    made_up = (weight[:, :8] + weight[:, 8:] @ found) @ x[:, :8].T
    assert torch.allclose(made_up, weight @ x.T, atol=1e-6)
    gone, kept = torch.tensor([1, 4]), torch.tensor([0, 2, 3, 5, 6, 7, 8])
    found = removal_coefficients(x, kept, gone, 0.01)
    with_it = (weight[:, kept] + weight[:, gone] @ found) @ x[:, kept].T - weight @ x.T
    without = weight[:, kept] @ x[:, kept].T - weight @ x.T
    assert with_it.norm() < without.norm()


def test_padding_changes_nothing():
    x = inputs(20)
    padded = torch.cat([x, torch.zeros(7, 9, dtype=torch.float64)])
    kept, gone = torch.arange(1, 9), torch.tensor([0])
    for way in WAYS:
        one = removal_coefficients(x, kept, gone, 0.01, way)
        two = removal_coefficients(padded, kept, gone, 0.01, way)
        assert torch.allclose(one, two, atol=1e-4), way


def test_bad_input_is_named():
    kept, gone = torch.tensor([0]), torch.tensor([1])
    with pytest.raises(UsageError, match="down_proj"):
        removal_coefficients(torch.zeros(0, 2), kept, gone, name="down_proj")
    with pytest.raises(NumericsError, match="down_proj"):
        removal_coefficients(torch.full((3, 2), torch.nan), kept, gone, name="down_proj")
    # Nothing was ever seen there: nothing has to be made up for.
    assert torch.equal(removal_coefficients(torch.zeros(3, 2), kept, gone), torch.zeros(1, 1))


def test_the_choice_of_a_way_follows_the_shapes():
    assert {cheapest(8192, 512, 8), cheapest(256, 4096, 64), cheapest(4096, 8192, 1)} == set(WAYS)
