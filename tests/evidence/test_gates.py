"""Gate gradients and head ablation against finite differences and one-at-a-time evaluation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateur.errors import NumericsError, UsageError
from secateur.evidence.ablation import ablate, repeated_blocks
from secateur.evidence.gates import GateSite, gate_gradients, gate_sites, gated
from secateur.evidence.objectives import (
    classification,
    feature_probe,
    language_model,
    sequence_to_sequence,
)
from secateur.models.tiny import randomise, tiny_model

transformers = pytest.importorskip("transformers")
IDS = torch.randint(4, 200, (3, 9), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1] * 9, [1] * 6 + [0] * 3, [1] * 4 + [0] * 5])


def bert(**changes: Any) -> Any:
    config = transformers.BertConfig(
        hidden_size=48,
        num_attention_heads=4,
        num_hidden_layers=2,
        intermediate_size=64,
        vocab_size=264,
        **changes,
    )
    model = transformers.BertForSequenceClassification(config).eval()
    randomise(model)
    return model


def t5() -> Any:
    config = transformers.T5Config(
        d_model=48,
        d_kv=12,
        num_heads=4,
        num_layers=2,
        d_ff=64,
        vocab_size=264,
        decoder_start_token_id=0,
        feed_forward_proj="gated-gelu",  # no kinks, which finite differences would step over
    )
    model = transformers.T5ForConditionalGeneration(config).eval()
    randomise(model)
    return model


def bart() -> Any:
    config = transformers.BartConfig(
        d_model=48,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=6,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        vocab_size=264,
    )
    model = transformers.BartForConditionalGeneration(config).eval()
    randomise(model)
    return model


LABELS = torch.randint(4, 200, (3, 7), generator=torch.Generator().manual_seed(1))
LABELS[1, 5:] = -100
CASES: dict[str, Any] = {
    "llama": (lambda: tiny_model("llama"), language_model, {}),
    "gpt2": (lambda: tiny_model("gpt2"), language_model, {}),
    "bloom": (lambda: tiny_model("bloom"), language_model, {}),
    "phi3": (lambda: tiny_model("phi3"), language_model, {}),
    "bert": (bert, classification, {"labels": torch.tensor([0, 1, 1])}),
    "t5": (t5, sequence_to_sequence, {"labels": LABELS}),
    "bart": (bart, sequence_to_sequence, {"labels": LABELS}),
}


def case(name: str) -> tuple[Any, Any, dict[str, Tensor]]:
    make, objective, extra = CASES[name]
    return make(), objective, {"input_ids": IDS, "attention_mask": MASK, **extra}


def at(model: Any, objective: Any, batch: Any, sites: Any, gates: dict[str, Tensor]) -> Tensor:
    with torch.no_grad(), gated(sites, gates):
        losses: Tensor = objective(model, batch)
    return losses.double()


def open_by(units: int, unit: int, more: float) -> Tensor:
    gate = torch.ones(units, dtype=torch.float64)
    gate[unit] += more
    return gate


@pytest.mark.parametrize("name", list(CASES))
def test_a_gate_gradient_is_the_derivative_sample_by_sample(name: str) -> None:
    model, objective, batch = case(name)
    sites = gate_sites(model)
    found = gate_gradients(model, sites, [batch], objective)
    model = model.double()
    step = 2e-2  # not finer: transformers computes softmax, norms and loss in float32
    for site in (sites[0], sites[-1]):
        for unit in range(site.units):
            near, far = [
                at(model, objective, batch, sites, {site.name: open_by(site.units, unit, h)})
                - at(model, objective, batch, sites, {site.name: open_by(site.units, unit, -h)})
                for h in (step, 2 * step)
            ]
            slope = ((8 * near - far) / (12 * step)).abs().mean()  # error of order step^4
            assert float(found[site.name][unit]) == pytest.approx(float(slope), rel=2e-2, abs=2e-5)


def test_all_kinds_of_attention_are_told_apart() -> None:
    kinds = [site.kind for site in gate_sites(t5())]
    assert kinds.count("encoder") == kinds.count("decoder") == kinds.count("cross") == 2
    assert {site.kind for site in gate_sites(bert())} == {"self"}
    assert [site.units for site in gate_sites(bart()) if site.kind == "cross"] == [6, 6]


def test_groups_that_share_a_key_add_their_heads_before_the_size_is_taken() -> None:
    model, objective, batch = case("llama")
    groups = gate_sites(model)
    heads = [GateSite(s.name, s.projection, 2 * s.units, s.kind) for s in groups]
    by_group = gate_gradients(model, groups, [batch], objective)
    by_head = gate_gradients(model, heads, [batch], objective)
    signed = 0
    for site in groups:
        pairs = by_head[site.name].view(-1, 2).sum(1)
        assert (by_group[site.name] <= pairs + 1e-9).all()
        signed += int((by_group[site.name] < pairs - 1e-6).sum())
    assert signed  # somewhere members pull in opposite directions, which |.| first would hide


def test_the_split_into_batches_and_the_padding_change_nothing() -> None:
    model, objective, batch = case("bert")
    sites = gate_sites(model)
    together = gate_gradients(model, sites, [batch], objective)
    rows = [{k: v[i : i + 1] for k, v in batch.items()} for i in (2, 0, 1)]
    rows[0] = {k: v[:, :4] if v.dim() == 2 else v for k, v in rows[0].items()}
    apart = gate_gradients(model, sites, rows, objective)
    for site in sites:
        torch.testing.assert_close(together[site.name], apart[site.name], rtol=1e-4, atol=1e-7)


def test_token_mode_is_never_smaller_and_batch_means_never_larger() -> None:
    model, objective, batch = case("gpt2")
    sites = gate_sites(model)
    sample = gate_gradients(model, sites, [batch], objective)
    token = gate_gradients(model, sites, [batch], objective, mode="token")
    for site in sites:
        assert (token[site.name] >= sample[site.name] - 1e-9).all()
    assert any((token[s.name] > sample[s.name] + 1e-6).any() for s in sites)


def test_a_dead_head_scores_exactly_nothing() -> None:
    model, objective, batch = case("llama")
    site = gate_sites(model)[1]
    width = site.projection.weight.shape[1] // site.units
    with torch.no_grad():
        site.projection.weight[:, :width] = 0
    found = gate_gradients(model, [site], [batch], objective)[site.name]
    assert found[0] == 0
    assert (found[1:] > 0).all()


def test_equal_heads_score_equally() -> None:
    model, objective, batch = case("bert")
    site = gate_sites(model)[0]
    own = model.get_submodule(site.name).self
    with torch.no_grad():
        for linear in (own.query, own.key, own.value):
            linear.weight[36:] = linear.weight[:12]
            linear.bias[36:] = linear.bias[:12]
        site.projection.weight[:, 36:] = site.projection.weight[:, :12]
    found = gate_gradients(model, [site], [batch], objective)[site.name]
    assert float(found[0]) == pytest.approx(float(found[3]), rel=1e-5)
    assert float(found[0]) != pytest.approx(float(found[1]), rel=1e-2)


def test_layers_that_share_a_projection_share_its_gates() -> None:
    """ALBERT runs one layer many times: a gate acts on every run, so their derivatives add up."""
    config = transformers.AlbertConfig(
        hidden_size=48, embedding_size=24, num_attention_heads=4, num_hidden_layers=3,
        intermediate_size=64, vocab_size=264,
    )  # fmt: skip
    model: Any = transformers.AlbertForSequenceClassification(config).eval()
    randomise(model)
    name, dense = next((n, m) for n, m in model.named_modules() if n.endswith("attention.dense"))
    site = GateSite(name, dense, 4)
    batch = {"input_ids": IDS, "attention_mask": MASK, "labels": torch.tensor([0, 1, 1])}
    found = gate_gradients(model, [site], [batch], classification)[name]
    for unit in range(4):
        near, far = [
            at(model, classification, batch, [site], {name: open_by(4, unit, h)})
            - at(model, classification, batch, [site], {name: open_by(4, unit, -h)})
            for h in (1e-2, 2e-2)
        ]
        slope = ((8 * near - far) / 0.12).abs().mean()
        assert float(found[unit]) == pytest.approx(float(slope), rel=2e-2, abs=2e-5)


def test_half_precision_is_summed_in_float32() -> None:
    model, objective, batch = case("llama")
    full = gate_gradients(model, gate_sites(model), [batch], objective)
    half_model = model.to(torch.bfloat16)
    half = gate_gradients(half_model, gate_sites(half_model), [batch], objective)
    for name, value in full.items():
        assert half[name].dtype == torch.float64
        torch.testing.assert_close(half[name], value, rtol=0.2, atol=0.02)


def test_permuting_heads_permutes_their_scores() -> None:
    model, objective, batch = case("bert")
    site = gate_sites(model)[0]
    before = gate_gradients(model, [site], [batch], objective)[site.name]
    order = torch.tensor([2, 0, 3, 1])
    rows = torch.arange(48).view(4, 12)[order].reshape(-1)
    attention = model.get_submodule(site.name)
    with torch.no_grad():
        own = attention.self
        for linear in (own.query, own.key, own.value):
            linear.weight.copy_(linear.weight[rows].clone())
            linear.bias.copy_(linear.bias[rows].clone())
        site.projection.weight.copy_(site.projection.weight[:, rows].clone())
    after = gate_gradients(model, [site], [batch], objective)[site.name]
    torch.testing.assert_close(after, before[order], rtol=1e-4, atol=1e-7)


def test_nothing_is_left_behind() -> None:
    model, objective, batch = case("bart")
    before = at(model, objective, batch, [], {})
    sites = gate_sites(model)
    gate_gradients(model, sites, [batch], objective)
    ablate(model, sites[:3], [batch], objective)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert torch.equal(before, at(model, objective, batch, [], {}))
    assert not any("forward" in m.__dict__ or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("name", ["llama", "bert", "t5", "bart"])
@pytest.mark.parametrize("alone", [False, True])
def test_ablation_is_the_evaluation_with_gates_closed(name: str, alone: bool) -> None:
    model, objective, batch = case(name)
    sites = gate_sites(model)
    found = ablate(model, sites, [batch], objective, alone=alone, rows=7)
    assert found.baseline == pytest.approx(float(at(model, objective, batch, [], {}).mean()))
    for site in sites:
        for unit in range(site.units):
            gate = torch.zeros(site.units) if alone else torch.ones(site.units)
            gate[unit] = 1 - gate[unit]
            one = at(model, objective, batch, sites, {site.name: gate}).mean()
            assert float(found.values[site.name][unit]) == pytest.approx(float(one), abs=1e-5)


def test_ablation_runs_no_block_before_the_layer_again() -> None:
    model, objective, batch = case("llama")
    site = gate_sites(model)[1]
    calls = []
    first = next(iter(repeated_blocks(model).values()))
    first.mlp.register_forward_hook(lambda *a: calls.append(1))
    ablate(model, [site], [batch], objective)
    assert len(calls) == 1  # the dense pass; all heads of block 1 reuse its output


def test_first_order_prediction_of_ablation_on_small_contributions() -> None:
    model, objective, batch = case("bert")
    sites = gate_sites(model)
    with torch.no_grad():
        for site in sites:
            site.projection.weight.mul_(1e-2)
    rows = [{k: v[i : i + 1] for k, v in batch.items()} for i in range(3)]
    for row in rows:  # one sample: |expectation| is the expectation of sizes
        predicted = gate_gradients(model, sites, [row], objective)
        true = ablate(model, sites, [row], objective).changes()
        both = torch.stack([torch.cat([v[s.name] for s in sites]) for v in (predicted, true)]).abs()
        assert float(torch.corrcoef(both)[0, 1]) > 0.99


def test_feature_probe_does_not_depend_on_the_batch() -> None:
    model = bert().bert
    sites = gate_sites(model)
    whole = {"input_ids": IDS, "attention_mask": MASK}
    rows = [{k: v[i : i + 1] for k, v in whole.items()} for i in range(3)]
    one = gate_gradients(model, sites, [whole], feature_probe())
    many = gate_gradients(model, sites, rows, feature_probe())
    for site in sites:
        torch.testing.assert_close(one[site.name], many[site.name], rtol=1e-4, atol=1e-6)
        assert (one[site.name] > 0).all()


def test_bad_input_is_named() -> None:
    model, objective, batch = case("llama")
    sites = gate_sites(model)
    with pytest.raises(UsageError, match="no calibration samples"):
        gate_gradients(model, sites, [], objective)
    with pytest.raises(UsageError, match="labels"):
        gate_gradients(model, sites, [batch], classification)
    with pytest.raises(UsageError, match="units"), gated(sites, {sites[0].name: torch.ones(5)}):
        pass
    with pytest.raises(UsageError, match="can be cut"):
        gate_sites(nn.Linear(4, 4))
    stray = GateSite("stray", nn.Linear(4, 4), 2)
    with pytest.raises(UsageError, match="never reached"):
        gate_gradients(model, [*sites, stray], [batch], objective)
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(NumericsError, match="not finite"):
        gate_gradients(model, sites, [batch], objective)
