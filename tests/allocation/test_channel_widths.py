"""Widths of channels reach a budget and no further."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.allocation.channels import Budget, lowest_units, ranked_widths, uniform_widths
from secateur.errors import UsageError
from secateur.models.channel_graph import ChannelGroups, channel_groups
from secateur.models.vision.resnet import ResNet
from secateur.models.vision.vit import ViT


@pytest.fixture(scope="module")
def groups() -> dict[str, ChannelGroups]:
    torch.manual_seed(0)
    return {
        "resnet": channel_groups(ResNet(1, 5, 8, 1), torch.zeros(1, 1, 8, 8)),
        "vit": channel_groups(ViT(1, 5, 8, 4, 16, 2), torch.zeros(1, 1, 8, 8)),
    }


KINDS = ["flops", "parameters", "channels"]


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(["resnet", "vit"]),
    st.sampled_from(KINDS),
    st.floats(0, 0.9),
    st.integers(0, 5),
    st.booleans(),
)
def test_the_budget_is_reached_and_one_unit_more_would_exceed_it(
    groups: dict[str, ChannelGroups], name: str, kind: str, share: float, seed: int, ranked: bool
) -> None:
    found, budget = groups[name], Budget(kind, share)
    cost = budget.cost(found)
    torch.manual_seed(seed)
    scores = {g.key: torch.rand(g.n_units) for g in found.prunable}

    def widths_of() -> dict[str, int]:
        return ranked_widths(found, budget, scores) if ranked else uniform_widths(found, budget)

    if cost(dict.fromkeys(scores, 1)) > (1 - share) * cost({}):
        with pytest.raises(UsageError, match="at most"):
            widths_of()
        return
    widths = widths_of()
    limit = (1 - share) * cost({})
    assert cost(widths) <= limit * (1 + 1e-9)
    assert all(1 <= widths[g.key] <= g.n_units for g in found.prunable)
    wider = [cost(widths | {k: w + 1}) for k, w in widths.items() if w < found[k].n_units]
    assert not wider or max(wider) > limit  # some group could not have kept one more


def test_zero_leaves_everything(groups: dict[str, ChannelGroups]) -> None:
    for kind in KINDS:
        assert uniform_widths(groups["resnet"], Budget(kind, 0.0)) == {
            g.key: g.n_units for g in groups["resnet"].prunable
        }


def test_uniform_is_uniform(groups: dict[str, ChannelGroups]) -> None:
    widths = uniform_widths(groups["resnet"], Budget("channels", 0.5))
    assert all(abs(widths[g.key] - g.n_units / 2) <= 1 for g in groups["resnet"].prunable)


def test_ranked_takes_the_lowest_wherever_they_are(groups: dict[str, ChannelGroups]) -> None:
    found = groups["resnet"]
    scores = {g.key: torch.arange(g.n_units) + 100.0 * n for n, g in enumerate(found.prunable)}
    first = found.prunable[0]
    widths = ranked_widths(found, Budget("channels", (first.n_units - 1) / 112, 1), scores)
    total = sum(g.n_units for g in found.prunable)
    assert sum(widths.values()) <= total - total * (first.n_units - 1) / 112
    assert widths[first.key] == 1


def test_widths_are_multiples_and_not_below_the_least(groups: dict[str, ChannelGroups]) -> None:
    budget = Budget("flops", 0.4, at_least=3, round_to=4)
    widths = uniform_widths(groups["resnet"], budget)
    assert all(w % 4 == 0 for w in widths.values())
    assert min(widths.values()) >= 4
    with pytest.raises(UsageError, match="at most"):
        uniform_widths(groups["resnet"], Budget("flops", 0.95, at_least=8))


def test_ties_go_to_the_first() -> None:
    gone = lowest_units({"a": torch.tensor([1.0, 0.0, 0.0, 0.0])}, {"a": 2})
    assert gone["a"].tolist() == [False, True, True, False]
