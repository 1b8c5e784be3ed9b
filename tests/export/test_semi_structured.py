"""2:4: honest answers everywhere, a measured one where the device has it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from secateur.errors import UsageError
from secateur.export import measure_semi_structured, to_semi_structured
from secateur.export.semi_structured import (
    SemiStructured,
    device_reason,
    is_two_four,
    weight_reason,
)


def two_four(rows: int, columns: int, **kind: object) -> torch.Tensor:
    torch.manual_seed(0)
    weight = torch.randn(rows, columns // 4, 4)
    weight.scatter_(2, weight.abs().argsort(2)[..., :2], 0.0)
    return weight.reshape(rows, columns).to(**kind)  # type: ignore[call-overload, no-any-return]


def test_pattern_is_recognised() -> None:
    assert is_two_four(two_four(32, 64))
    assert is_two_four(torch.zeros(4, 8))
    assert not is_two_four(torch.ones(4, 8))
    assert not is_two_four(torch.zeros(4, 6))


def test_reasons_name_the_cause() -> None:
    assert "compute capability 8.0" in str(device_reason("cpu", torch.bfloat16))
    assert weight_reason(two_four(32, 64)) is None
    assert "33x64" in str(weight_reason(two_four(33, 64)))
    assert "more than two" in str(weight_reason(torch.ones(32, 64)))


def test_on_the_cpu_nothing_changes_and_the_reason_is_given() -> None:
    model = nn.Sequential(nn.Linear(64, 32))
    before = model[0].weight
    result = to_semi_structured(model)
    assert not result.available
    assert model[0].weight is before
    assert result.verdict.startswith("2:4 is not available here: it needs a CUDA device")
    assert not measure_semi_structured(two_four(32, 64)).available
    assert result.record()["verdict"] == result.verdict


def test_no_parameters() -> None:
    with pytest.raises(UsageError, match="no parameters"):
        to_semi_structured(nn.Sequential())


@pytest.mark.parametrize(
    ("dense", "sparse", "words"),
    [((1.0, 0.9, 1.1), (0.5, 0.45, 0.55), "2.00x as fast"),
     ((1.0, 0.9, 1.1), (0.95, 0.9, 1.0), "No measurable gain"),
     ((1.0, 0.9, 1.1), (2.0, 1.9, 2.1), "slower")],
)  # fmt: skip
def test_verdicts(dense: tuple[float, ...], sparse: tuple[float, ...], words: str) -> None:
    keys = ("median", "low", "high")
    result = SemiStructured(
        True,
        dense=dict(zip(keys, dense, strict=True)),
        sparse=dict(zip(keys, sparse, strict=True)),
        ratio=dense[0] / sparse[0],
    )
    assert words in result.verdict


@pytest.mark.cuda
@pytest.mark.skipif(
    device_reason("cuda", torch.float16) is not None,
    reason=f"2:4: {device_reason('cuda', torch.float16)}",
)
def test_on_a_gpu_outputs_agree_and_time_is_taken() -> None:
    weight = two_four(4096, 4096, dtype=torch.float16, device="cuda")
    result = measure_semi_structured(weight, tokens=4096)
    assert result.available
    assert result.difference is not None
    assert result.difference < 2e-3
    assert result.ratio is not None
    assert result.ratio > 0
    model = nn.Sequential(nn.Linear(4096, 4096, bias=False), nn.Linear(4096, 4096)).cuda().half()
    model[0].weight.data.copy_(weight)
    converted = to_semi_structured(model)
    assert converted.converted == ["0"]
    assert "1" in converted.skipped
