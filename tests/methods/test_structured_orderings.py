"""Orderings that hold on a trained model: gradients beat chance and magnitude."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from secateur.data.windows import calibration_windows, evaluation_windows
from secateur.evidence.objectives import language_model
from secateur.masks.structured import StructuredMask
from secateur.methods.heads import prune_heads
from secateur.methods.llm_pruner import LLMPruner
from secateur.methods.structured_base import ScoreJob, lowest
from secateur.models.loading import load
from secateur.models.surgery import apply_mask
from secateur.models.units import units_of

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def trained() -> Any:
    return load("tiny")


@pytest.fixture(scope="module")
def texts(trained: Any) -> tuple[Any, Tensor]:
    calibration = calibration_windows("pydoc", trained.tokenizer, samples=10, length=64)
    held_out = evaluation_windows("pydoc:test", trained.tokenizer, length=64, limit=32).ids
    return calibration, held_out


@torch.no_grad()
def loss(model: Any, ids: Tensor) -> float:
    return float(language_model(model, {"input_ids": ids}).mean())


def after(model: Any, windows: Any, ids: Tensor, share: float, **options: Any) -> float:
    """Held-out loss once ``share`` of every layer's heads and channels is zero."""
    model = copy.deepcopy(model)
    groups = list(units_of(model, ("head", "ffn")))
    scores = LLMPruner(**options).scores(ScoreJob(model, groups, {}, windows))
    mask = StructuredMask()
    for group in groups:
        mask.remove(group, lowest(scores[group.key], int(share * group.n_units)))
    apply_mask(model, mask)
    return loss(model, ids)


def test_taylor_beats_chance_and_magnitude_at_a_quarter(trained: Any, texts: Any) -> None:
    windows, ids = texts
    dense = loss(trained.model, ids)
    found = {
        criterion: after(trained.model, windows, ids, 0.25, criterion=criterion)
        for criterion in ("element1", "element2", "l2")
    }
    chance = [
        after(trained.model, windows, ids, 0.25, criterion="random", seed=seed) for seed in range(3)
    ]
    margin = 0.14  # 15 % of perplexity, in nats
    for criterion in ("element1", "element2"):
        assert dense < found[criterion] < sum(chance) / 3 - margin
        assert found[criterion] < found["l2"] - 0.04


def test_gate_gradients_beat_chance(trained: Any, texts: Any) -> None:
    windows, ids = texts
    batches = [{"input_ids": windows.ids}]

    def pruned(share: float, **settings: Any) -> float:
        model = copy.deepcopy(trained.model)
        prune_heads(model, batches, share=share, gqa="duplicate", **settings)
        return loss(model, ids)

    shares = (0.3, 0.5)
    gradient = sum(pruned(share) for share in shares)
    chance = [sum(pruned(s, ranking="random", seed=n) for s in shares) for n in range(3)]
    assert gradient < sum(chance) / 3 - 0.5  # measured: 7.7 against 10.3 nats
