"""Speed: figures that are consistent, a verdict that claims no more than the spread allows."""

import time

import pytest
import torch
from torch import nn

from secateur.evaluation.speed import compare_speed, verdict
from secateur.models.tiny import tiny_model


class Slow(nn.Module):
    """A model that takes a known time for each call, and keeps no cache."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, input_ids: torch.Tensor, use_cache: bool = True) -> "Slow":
        time.sleep(self.seconds)
        return self


def test_twice_the_time_is_half_the_speed() -> None:
    slow, fast = Slow(0.02), Slow(0.01)
    figures = compare_speed(slow, fast, torch.zeros(1, 8).long(), seconds=0.3, target=0.5)
    assert figures["prefill"]["ratio"]["median"] == pytest.approx(2, rel=0.15)
    assert figures["prefill"]["dense"]["median"] == pytest.approx(8 / 0.02, rel=0.15)
    assert figures["decode"] is None
    assert "faster" in figures["verdict"]
    assert "no speed-up" not in figures["verdict"]


def test_a_model_beside_itself_reads_and_writes() -> None:
    model = tiny_model("llama").train()
    figures = compare_speed(model, model, torch.randint(0, 264, (1, 16)), seconds=0.2)
    assert model.training
    assert figures["turns"] >= 3
    for part in ("prefill", "decode"):
        for who in ("dense", "pruned", "ratio"):
            spread = figures[part][who]
            assert 0 < spread["low"] <= spread["median"] <= spread["high"]
    assert figures["machine"]["threads"] == torch.get_num_threads()


def test_the_time_is_kept() -> None:
    start = time.perf_counter()
    compare_speed(Slow(0.005), Slow(0.005), torch.zeros(1, 4).long(), seconds=0.2)
    assert 0.2 <= time.perf_counter() - start < 1


def _part(low: float, median: float, high: float) -> dict:
    return {"ratio": {"low": low, "median": median, "high": high}}


@pytest.mark.parametrize(
    ("ratio", "words"),
    [
        ((0.9, 1.2, 1.4), "as fast as dense"),
        ((1.0, 1.02, 1.04), "as fast as dense"),
        ((1.1, 1.2, 1.4), "faster"),
        ((0.7, 0.8, 0.9), "slower"),
    ],
)
def test_only_what_the_spread_allows_is_claimed(ratio: tuple, words: str) -> None:
    sentence = verdict(_part(*ratio), None, 0.5)
    assert words in sentence
    assert ("Unstructured 50% gives no speed-up" in sentence) == (words != "faster")


def test_patterns_get_their_own_advice() -> None:
    assert "compute capability" in verdict(_part(0.9, 1, 1.1), _part(0.9, 1, 1.1), "2:4")
    assert "speed-up" not in verdict(_part(0.9, 1, 1.1), None, None)
