"""A ranking gives the masks ``select`` would, whatever the scope, the count and the ties."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.errors import NumericsError, UsageError
from secateur.masks.ranking import Ranking
from secateur.masks.selection import select
from secateur.masks.target import Cut, Scope


@settings(max_examples=120, deadline=None)
@given(
    st.integers(1, 7),
    st.integers(1, 11),
    st.sampled_from(["row", "layer", "block:4", "block:3"]),
    st.integers(0, 5),
    st.data(),
)
def test_same_mask_as_select_for_every_count(rows, columns, scope, levels, data):
    seed = data.draw(st.integers(0, 10**6))
    score = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed))
    if levels:
        score = (score * levels).round()  # many ties
    scope = Scope.parse(scope)
    ranking = Ranking.of(score, scope)
    for count in range(rows * columns + 1):
        cut = Cut((rows, columns), count, scope)
        assert torch.equal(ranking.mask(cut), select(score, cut))


@pytest.mark.parametrize(("keep", "group"), [(2, 4), (1, 4), (4, 4), (5, 8), (3, 16)])
def test_same_mask_as_select_for_patterns(keep, group):
    score = (torch.rand(6, 48, generator=torch.Generator().manual_seed(1)) * 5).round()
    ranking = Ranking.of(score, Scope("row"), group)
    cut = Cut((6, 48), 6 * 48 // group * (group - keep), Scope("row"), keep, group)
    assert torch.equal(ranking.mask(cut), select(score, cut))


@pytest.mark.parametrize(
    ("columns", "dtype"), [(100, torch.int8), (300, torch.int16), (40000, torch.int32)]
)
def test_places_take_as_few_bytes_as_they_can(columns, dtype):
    score = torch.rand(2, columns)
    ranking = Ranking.of(score, Scope("row"))
    assert ranking.places.dtype == dtype
    cut = Cut((2, columns), columns, Scope("row"))
    assert torch.equal(ranking.mask(cut), select(score, cut))
    everything = Cut((2, columns), 2 * columns, Scope("row"))
    assert bool(ranking.mask(everything).all())


def test_bad_scores_are_refused():
    with pytest.raises(NumericsError, match="'w'"):
        Ranking.of(torch.tensor([[1.0, float("nan")]]), Scope("row"), name="w")
    with pytest.raises(UsageError, match="does not divide"):
        Ranking.of(torch.ones(1, 6), Scope("row"), 4)
