"""Heads removed for real from decoders, encoders and encoder-decoders."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from secateur.data.windows import Windows
from secateur.errors import UsageError
from secateur.evidence.gates import gate_sites, gated
from secateur.evidence.objectives import (
    classification,
    language_model,
    objective_for,
    sequence_to_sequence,
)
from secateur.methods.head_selection import HeadRules
from secateur.methods.heads import Heads, head_scores, prune_heads
from secateur.methods.structured_base import ScoreJob
from secateur.models.surgery import shrink
from secateur.models.tiny import randomise, tiny_model
from secateur.models.units import units_of

transformers = pytest.importorskip("transformers")
IDS = torch.randint(4, 200, (4, 10), generator=torch.Generator().manual_seed(5))
MASK = torch.tensor([[1] * 10, [1] * 10, [1] * 7 + [0] * 3, [1] * 5 + [0] * 5])
TEXT = {"input_ids": IDS, "attention_mask": MASK}


def bert() -> Any:
    config = transformers.BertConfig(
        hidden_size=48, num_attention_heads=4, num_hidden_layers=3, intermediate_size=64,
        vocab_size=264, num_labels=3,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config).eval()
    randomise(model)
    return model


def t5() -> Any:
    config = transformers.T5Config(
        d_model=48, d_kv=12, num_heads=4, num_layers=2, d_ff=64, vocab_size=264,
        decoder_start_token_id=0,
    )  # fmt: skip
    model = transformers.T5ForConditionalGeneration(config).eval()
    randomise(model)
    return model


CASES: dict[str, Any] = {
    "gpt2": (lambda: tiny_model("gpt2"), TEXT, language_model),
    "llama": (lambda: tiny_model("llama", num_hidden_layers=4), TEXT, language_model),
    "bert": (bert, {**TEXT, "labels": torch.tensor([0, 1, 2, 1])}, classification),
    "t5": (t5, {**TEXT, "labels": IDS[:, :6]}, sequence_to_sequence),
}


def losses(model: Any, batch: Any, objective: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = objective(model, batch)
    return found


@pytest.mark.parametrize("name", list(CASES))
def test_closed_gates_and_removed_heads_are_the_same_model(name: str) -> None:
    make, batch, objective = CASES[name]
    model = make()
    assert objective_for(model, batch) is objective
    dense = copy.deepcopy(model)
    sites = gate_sites(dense)
    before = sum(p.numel() for p in model.parameters())
    result = prune_heads(model, [batch], share=0.5)
    with gated(sites, result.cuts[-1].gates()):
        masked = losses(dense, batch, objective)
    torch.testing.assert_close(losses(model, batch, objective), masked, rtol=1e-4, atol=1e-5)
    assert sum(p.numel() for p in model.parameters()) < before
    assert result.cuts[-1].removed == result.cuts[-1].total // 2
    assert all(int((~gone).sum()) > 0 for gone in result.cuts[-1].gone.values())


def test_by_type_touches_only_that_attention() -> None:
    model = t5()
    result = prune_heads(model, [CASES["t5"][1]], share=0.5, kinds=["cross"])
    assert result.cuts[-1].total == 8
    assert set(result.mask.gone) == {s.name for s in gate_sites(t5()) if s.kind == "cross"}
    with pytest.raises(UsageError, match="no such attention"):
        prune_heads(t5(), [CASES["t5"][1]], share=0.5, kinds=["self"])


@pytest.mark.parametrize("ranking", ["gradient", "ablation", "random"])
def test_every_ranking_is_deterministic(ranking: str) -> None:
    make, batch, _ = CASES["bert"]
    one, two = (
        prune_heads(make(), [batch], share=0.4, ranking=ranking, rescore=ranking != "random")  # type: ignore[arg-type]
        for _ in range(2)
    )
    assert one.mask == two.mask
    for small, large in zip(one.cuts, one.cuts[1:], strict=False):
        assert all(not (g & ~large.gone[n]).any() for n, g in small.gone.items())


def test_ablation_picks_the_very_best_single_head() -> None:
    make, batch, objective = CASES["bert"]
    result = prune_heads(make(), [batch], share=1 / 12, ranking="ablation")
    best = min(
        float(losses(cut_one(make(), key, head), batch, objective).mean())
        for key in result.cuts[-1].gone
        for head in range(4)
    )
    model = make()
    shrink(model, result.mask)
    assert float(losses(model, batch, objective).mean()) == pytest.approx(best, abs=1e-5)


def cut_one(model: Any, key: str, head: int) -> Any:
    from secateur.masks.structured import StructuredMask

    group = units_of(model, ("head",))[key]
    gone = torch.zeros(group.n_units, dtype=torch.bool)
    gone[head] = True
    mask = StructuredMask()
    mask.remove(group, gone)
    shrink(model, mask)
    return model


def test_pruning_again_speaks_of_the_original_heads() -> None:
    make, batch, objective = CASES["bert"]
    model = make()
    prune_heads(model, [batch], share=0.25)
    result = prune_heads(model, [batch], share=0.25)
    again = make()
    shrink(again, result.mask)
    torch.testing.assert_close(
        losses(again, batch, objective), losses(model, batch, objective), rtol=1e-4, atol=1e-5
    )
    assert sum(int(g.sum()) for g in result.mask.gone.values()) == 3 + 2


def test_rules_reach_the_model() -> None:
    make, batch, _ = CASES["bert"]
    result = prune_heads(make(), [batch], share=0.5, rules=HeadRules(uniform=True))
    assert [int(g.sum()) for g in result.cuts[-1].gone.values()] == [2, 2, 2]
    result = prune_heads(make(), [batch], share=0.5, rules=HeadRules(multiple_of=2))
    assert all(int(g.sum()) % 2 == 0 for g in result.cuts[-1].gone.values())


def test_a_multi_query_model_loses_query_heads() -> None:
    model = tiny_model("falcon")
    result = prune_heads(model, [{"input_ids": IDS}], share=0.25)
    assert result.cuts[-1].removed == 2
    assert torch.isfinite(model(IDS).logits).all()


def test_the_method_and_the_door_score_alike() -> None:
    model = tiny_model("llama")
    groups = list(units_of(model, ("head",)))
    found = Heads().scores(ScoreJob(model, groups, {}, Windows(IDS, None, {})))
    scores = head_scores(model, gate_sites(model), [{"input_ids": IDS}], language_model)
    for value, expected in zip(found.values(), scores, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"share": 1.0}, "sparsity"),
        ({"share": 0.95}, "let no more than"),
        ({"share": 0.5, "step": 0}, "step"),
        ({"share": 0.5, "ranking": "best"}, "ranking"),
        ({"share": 0.5, "kinds": ["cross"]}, "kinds"),
    ],
)
def test_bad_input_leaves_the_model_alone(settings: dict[str, Any], word: str) -> None:
    make, batch, objective = CASES["bert"]
    model = make()
    before = losses(model, batch, objective)
    with pytest.raises(UsageError, match=word):
        prune_heads(model, [batch], **settings)
    assert torch.equal(before, losses(model, batch, objective))
