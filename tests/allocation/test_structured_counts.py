"""Units per group: exact to the target, whatever it counts, inside every constraint."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.allocation.align import align_by_benefit
from secateur.allocation.structured import structured_counts
from secateur.errors import UsageError
from secateur.models.units import Group


def group(key: str, kind: str, n: int, weights: int, block: int = 0, even: int = 1) -> Group:
    return Group(
        key,
        kind,  # type: ignore[arg-type]
        (),
        torch.arange(n)[:, None],
        n,
        block=block,
        even=even,
        weights=weights,
        parameters=weights + 1,
        heads=int(kind != "ffn"),
        head_dim=8 * int(kind != "ffn"),
    )


def model(layers: int, even: int = 1) -> list[Group]:
    out = []
    for b in range(layers):
        out.append(group(f"{b}.attn", "head", 4, 96, b, even))
        out.append(group(f"{b}.mlp", "ffn", 64, 24, b))
    return out


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 5),
    st.floats(0.01, 0.7),
    st.sampled_from([1, 8]),
    st.booleans(),
    st.sampled_from([1, 2]),
    st.sampled_from(["ratio", "parameters", "flops"]),
)
def test_counts_meet_the_target(
    layers: int, share: float, round_to: int, uniform: bool, even: int, kind: str
) -> None:
    groups = model(layers, even)
    cuts = structured_counts(
        groups,
        share,
        kind=kind,  # type: ignore[arg-type]
        round_to=round_to,
        uniform=uniform,
        context=16,
    )
    whole = sum(c.weights * c.of for c in cuts.values())
    gone = sum(c.weights * c.removed for c in cuts.values())
    for g in groups:
        assert cuts[g.key].removed <= g.n_units - even * (g.kind == "head") - (g.kind == "ffn")
        assert cuts[g.key].removed % (round_to if g.kind == "ffn" else even) == 0
    lot = cuts["0.mlp"].weights * round_to * (layers if uniform else 1)
    assert abs(gone - share * whole) <= lot
    if uniform:
        for kind_ in ("attn", "mlp"):
            assert len({cuts[f"{b}.{kind_}"].removed for b in range(layers)}) == 1


def test_refusals() -> None:
    groups = model(2)
    with pytest.raises(UsageError, match="without emptying"):
        structured_counts(groups, 0.99)
    with pytest.raises(UsageError, match="does not divide"):
        structured_counts(groups, 0.5, round_to=7)
    with pytest.raises(UsageError, match="protected"):
        structured_counts(groups, 0.5, protect=frozenset({0, 1}))
    protected = structured_counts(groups, 0.3, protect=frozenset({0}))
    assert protected["0.mlp"].removed == protected["0.attn"].removed == 0


def staircase(tile: int, slope: list[float]) -> object:
    return lambda layer, width: 1.0 + slope[layer] * -(-width // tile)


def test_alignment_by_hand() -> None:
    """Four layers 40 wide, tile 32: the two with most to gain go down by 8, the two others
    would go up by 24; the split nearest in sum is 3 down, 1 up."""
    seconds = staircase(32, [4.0, 3.0, 2.0, 1.0])
    found = align_by_benefit([40] * 4, [96] * 4, 32, seconds)  # type: ignore[arg-type]
    assert found == [32, 32, 32, 64]
    assert sum(found) == 160


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(33, 127), min_size=1, max_size=8), st.data())
def test_alignment_keeps_the_budget(widths: list[int], data: st.DataObject) -> None:
    slope = data.draw(st.lists(st.floats(0.5, 4.0), min_size=len(widths), max_size=len(widths)))
    seconds = staircase(32, slope)
    found = align_by_benefit(widths, [128] * len(widths), 32, seconds)  # type: ignore[arg-type]
    for before, after in zip(widths, found, strict=True):
        assert after % 32 == 0
        assert abs(after - before) < 32
        assert before % 32 or after == before
    assert abs(sum(found) - sum(widths)) <= 16


def test_what_does_not_pay_stays() -> None:
    flat = align_by_benefit([40, 50], [96, 96], 32, lambda layer, width: 1.0 + 1e-4 * width)
    assert flat == [40, 50]
