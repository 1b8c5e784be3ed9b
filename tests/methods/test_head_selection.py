"""Which heads go: exact counts, nesting, the rules, and the greedy order against brute force."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from secateur.errors import NumericsError, UsageError
from secateur.evidence.gates import GateSite
from secateur.methods.head_selection import (
    HeadRules,
    heads_asked,
    normalised,
    removal_order,
    select_heads,
)
from secateur.methods.heads import HeadCut, head_schedule, of_kind

layers = st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=9), min_size=1, max_size=5).map(
    lambda rows: [torch.tensor(row, dtype=torch.float64) for row in rows]
)
rules = st.builds(
    HeadRules, at_least=st.integers(0, 3), multiple_of=st.integers(1, 3), uniform=st.just(False)
)


@settings(max_examples=150, deadline=None)
@given(scores=layers, rules=rules)
def test_every_prefix_of_the_order_keeps_the_rules(scores: list[Tensor], rules: HeadRules) -> None:
    kept = [len(s) for s in scores]
    gone: set[tuple[int, int]] = set()
    for bundle in removal_order(scores, rules):
        assert len({layer for layer, _ in bundle}) == 1
        layer = bundle[0][0]
        assert not gone & set(bundle)
        gone |= set(bundle)
        kept[layer] -= len(bundle)
        assert kept[layer] % rules.multiple_of == 0
        assert kept[layer] >= min(rules.at_least, len(scores[layer]))
        removed = [float(scores[layer][h]) for at, h in gone if at == layer]
        left = [float(v) for h, v in enumerate(scores[layer]) if (layer, h) not in gone]
        assert not left or max(removed) <= min(left)


@settings(max_examples=100, deadline=None)
@given(scores=layers, data=st.data())
def test_free_choice_is_the_cheapest_of_all_choices(
    scores: list[Tensor], data: st.DataObject
) -> None:
    flat = torch.cat(scores)
    count = data.draw(st.integers(0, min(len(flat), 6)))
    gone = select_heads(scores, count, HeadRules(at_least=0))
    mask = torch.cat(gone)
    assert int(mask.sum()) == count
    if len(flat) <= 12:
        best = min(
            sum(float(flat[i]) for i in chosen)
            for chosen in itertools.combinations(range(len(flat)), count)
        )
        assert float(flat[mask].sum()) == pytest.approx(best)


@settings(max_examples=100, deadline=None)
@given(scores=layers, rules=rules, data=st.data())
def test_cuts_nest(scores: list[Tensor], rules: HeadRules, data: st.DataObject) -> None:
    possible = sum(map(len, removal_order(scores, rules)))
    small = data.draw(st.integers(0, possible))
    large = data.draw(st.integers(small, possible))
    inner, outer = (select_heads(scores, count, rules) for count in (small, large))
    for a, b in zip(inner, outer, strict=True):
        assert not (a & ~b).any()


def test_uniform_takes_the_same_number_everywhere() -> None:
    scores = [torch.tensor([3.0, 1.0, 2.0, 9.0]), torch.tensor([0.1, 0.2, 0.3, 0.0])]
    gone = select_heads(scores, 4, HeadRules(uniform=True))
    assert [g.tolist() for g in gone] == [
        [False, True, True, False],
        [True, False, False, True],
    ]
    # five cannot be shared by two layers: four go
    assert sum(int(g.sum()) for g in select_heads(scores, 5, HeadRules(uniform=True))) == 4


def test_ties_go_to_the_first_layer_and_head() -> None:
    gone = select_heads([torch.ones(3), torch.ones(3)], 3, HeadRules(at_least=1))
    assert [g.tolist() for g in gone] == [[True, True, False], [True, False, False]]


def test_normalised_rows_have_unit_length_and_zeros_stay() -> None:
    rows = normalised([torch.tensor([3.0, 4.0]), torch.zeros(3)])
    assert float(rows[0].norm()) == pytest.approx(1)
    assert rows[1].tolist() == [0, 0, 0]


def test_a_scale_of_a_layer_changes_nothing_once_normalised() -> None:
    scores = [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 1.0, 5.0])]
    scaled = [scores[0] * 1000, scores[1]]
    assert removal_order(normalised(scores), HeadRules()) == removal_order(
        normalised(scaled), HeadRules()
    )


def test_asked_counts() -> None:
    assert [heads_asked(72, n / 10) for n in range(10)] == [0, 7, 14, 22, 29, 36, 43, 50, 58, 65]
    assert heads_asked(96, 0.5) == 48


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: HeadRules(at_least=-1), "at_least"),
        (lambda: HeadRules(multiple_of=0), "multiple_of"),
        (lambda: heads_asked(10, 1.0), "sparsity"),
        (lambda: select_heads([torch.ones(2)] * 2, 3, HeadRules()), "let no more than 2"),
        (lambda: removal_order([torch.ones(2), torch.ones(3)], HeadRules(uniform=True)), "uniform"),
        (lambda: of_kind([], ["cross"]), "kinds"),
    ],
)
def test_bad_input_is_named(call: object, word: str) -> None:
    with pytest.raises(UsageError, match=word):
        call()  # type: ignore[operator]


def test_nan_stops() -> None:
    with pytest.raises(NumericsError, match="layer 1"):
        removal_order([torch.ones(2), torch.tensor([1.0, float("nan")])], HeadRules())


def sites(*units: int) -> list[GateSite]:
    return [GateSite(f"layer{i}", torch.nn.Identity(), n) for i, n in enumerate(units)]


def test_a_schedule_scores_once_or_at_each_step_and_nests() -> None:
    seen: list[Any] = []

    def scorer(gates: Any) -> list[Tensor]:
        seen.append(gates)
        turn = len(seen)
        return [torch.rand(6, generator=torch.Generator().manual_seed(turn + i)) for i in range(2)]

    cuts = list(head_schedule(sites(6, 6), scorer, (0.2, 0.4, 0.6)))
    assert len(seen) == 1
    assert [c.removed for c in cuts] == [2, 5, 7]
    cuts = list(head_schedule(sites(6, 6), scorer, (0.2, 0.4, 0.6), rescore=True))
    assert len(seen) == 4
    closed = seen[2]
    assert closed is not None
    assert all(torch.equal(closed[name], gate) for name, gate in cuts[0].gates().items())
    for small, large in itertools.pairwise(cuts):
        for name, gone in small.gone.items():
            assert not (gone & ~large.gone[name]).any()


def test_a_schedule_must_grow() -> None:
    scorer = lambda gates: [torch.rand(4)]  # noqa: E731
    with pytest.raises(UsageError, match="must grow"):
        list(head_schedule(sites(4), scorer, (0.5, 0.25)))


def test_a_cut_counts() -> None:
    cut = HeadCut(0.5, {"a": torch.tensor([True, False]), "b": torch.tensor([False, True])})
    assert (cut.removed, cut.total) == (2, 4)
    assert cut.gates()["a"].tolist() == [0, 1]
