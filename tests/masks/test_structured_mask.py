"""Structured masks on disk and joined."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.errors import UsageError
from secateur.masks.structured import StructuredMask

masks = st.dictionaries(
    st.sampled_from(["a.attn", "a.mlp", "stem"]),
    st.lists(st.booleans(), min_size=7, max_size=7).map(lambda v: torch.tensor(v)),
    max_size=3,
).map(lambda gone: StructuredMask(gone, set(list(gone)[:1])))


@settings(max_examples=25, deadline=None)
@given(masks)
def test_round_trip(mask: StructuredMask) -> None:
    with TemporaryDirectory() as folder:
        for ending in ("json", "safetensors"):
            path = Path(folder) / f"mask.{ending}"
            if ending == "safetensors" and not mask.gone:
                continue
            mask.save(path)
            assert StructuredMask.load(path) == mask


@settings(max_examples=25, deadline=None)
@given(masks, masks)
def test_union_holds_both(one: StructuredMask, other: StructuredMask) -> None:
    both = one.union(other)
    assert both == one.union(other).union(one)
    for key in {*one.gone, *other.gone}:
        zeros = torch.zeros(7, dtype=torch.bool)
        assert torch.equal(both.gone[key], one.gone.get(key, zeros) | other.gone.get(key, zeros))


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not a structured mask"):
        StructuredMask.parse({"groups": {"a": {"kept": [0]}}})
    with pytest.raises(UsageError, match="no unit 9"):
        StructuredMask.parse({"groups": {"a": {"of": 3, "kept": [9]}}})
    one = StructuredMask({"a": torch.zeros(3, dtype=torch.bool)})
    with pytest.raises(UsageError, match="3 units, the other 4"):
        one.union(StructuredMask({"a": torch.zeros(4, dtype=torch.bool)}))
    (tmp_path / "m.json").write_text("{")
    with pytest.raises(UsageError, match="cannot be read"):
        StructuredMask.load(tmp_path / "m.json")
