"""LLM-Pruner on models: both gradient routes, identities of transformers, and what goes first."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from secateur.data.windows import Windows
from secateur.errors import UsageError
from secateur.evidence.objectives import language_model, sequence_to_sequence
from secateur.masks.structured import StructuredMask
from secateur.methods.heads import Heads
from secateur.methods.llm_pruner import LLMPruner, importances
from secateur.methods.structured_base import ScoreJob
from secateur.methods.unit_baselines import UnitMagnitude
from secateur.models.surgery import apply_mask, shrink
from secateur.models.tiny import tiny_model
from secateur.models.units import Group, parameters_of, units_of

pytest.importorskip("transformers")
IDS = torch.randint(4, 200, (5, 12), generator=torch.Generator().manual_seed(3))


def job(model: Any, kinds: tuple[str, ...] = ("head", "ffn"), gqa: str = "groups") -> ScoreJob:
    groups = list(units_of(model, kinds, gqa))  # type: ignore[arg-type]
    gone = {g.key: torch.zeros(g.n_units, dtype=torch.bool) for g in groups}
    return ScoreJob(model, groups, gone, Windows(IDS, None, {}))


def gradients(model: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Mean gradient and mean squared gradient by parameter name, the plain way."""
    parameters = parameters_of(model)
    mean = {n: torch.zeros_like(p) for n, p in parameters.items()}
    square = {n: torch.zeros_like(p) for n, p in parameters.items()}
    for row in IDS.split(1):
        model.zero_grad()
        language_model(model, {"input_ids": row}).sum().backward()
        for name, p in parameters.items():
            assert p.grad is not None
            mean[name] += p.grad / len(IDS)
            square[name] += p.grad.square() / len(IDS)
    model.zero_grad()
    return mean, square


def by_hand(model: Any, group: Group, criterion: str) -> list[float]:
    """Sum over a unit's slices, weight by weight."""
    mean, square = gradients(model)
    out = []
    for unit in range(group.n_units):
        total = 0.0
        for part in group.slices:
            p = parameters_of(model)[part.parameter].detach()
            g, f = mean[part.parameter], square[part.parameter]
            for position in part.index[unit].tolist():
                w, d, s = (t.select(part.dim, position) for t in (p, g, f))
                score = {
                    "element1": w * d,
                    "element2": w * s * w,
                    "mix": w * d - 0.5 * w * s * w,
                    "vector": (w * d).sum(),
                }[criterion]
                total += float(score.abs().sum())
        out.append(total)
    return out


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "bloom"])
@pytest.mark.parametrize("criterion", ["element1", "element2", "mix", "vector"])
def test_scores_are_the_sum_over_the_units_own_weights(family: str, criterion: str) -> None:
    model = tiny_model(family)
    found = LLMPruner(criterion=criterion).scores(work := job(model))  # type: ignore[arg-type]
    for group in (work.groups[0], work.groups[-1]):
        expected = torch.tensor(by_hand(model, group, criterion), dtype=torch.float64)
        torch.testing.assert_close(found[group.key], expected, rtol=1e-3, atol=1e-9)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("reduction", ["mean", "max", "prod", "first", "second", "last"])
def test_both_routes_agree_under_every_reduction(reduction: str) -> None:
    model = tiny_model("qwen2")  # query, key and value have biases
    method = LLMPruner(reduction=reduction)  # type: ignore[arg-type]
    work = job(model)
    blocks = method._by_block(work, work.groups)
    whole = importances(model, work.groups, [{"input_ids": IDS}], language_model, method=method)
    for key, value in blocks.items():
        torch.testing.assert_close(value, whole[key], rtol=1e-3, atol=1e-12)


def test_the_route_that_holds_less_is_taken() -> None:
    model = tiny_model("llama")
    work = job(model)
    few, many = (Windows(IDS[:1].repeat(n, 1), None, {}) for n in (1, 400))
    for method in (LLMPruner(), LLMPruner(criterion="mix")):
        work.windows = few
        assert method.by_block_is_smaller(work, work.groups)
        work.windows = many
        assert not method.by_block_is_smaller(work, work.groups)


@pytest.mark.parametrize("smaller", [True, False])
def test_scores_take_the_route_they_are_told_is_smaller(
    smaller: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[str] = []

    def noted(name: str) -> Any:
        route = getattr(LLMPruner, name)

        def run(self: LLMPruner, job: ScoreJob, groups: Any) -> Any:
            taken.append(name)
            return route(self, job, groups)

        return run

    for name in ("_by_block", "_whole"):
        monkeypatch.setattr(LLMPruner, name, noted(name))
    monkeypatch.setattr(LLMPruner, "by_block_is_smaller", lambda *_: smaller)
    LLMPruner().scores(job(tiny_model("llama")))
    assert taken == ["_by_block" if smaller else "_whole"]


def test_whole_groups_of_a_gqa_layer_do_not_see_their_neighbours() -> None:
    """Scaling q and o of group 1 so that its function stays must leave group 0's score."""
    model = tiny_model("llama")
    work = job(model, ("head",))
    group = work.groups[0]
    before = LLMPruner(criterion="vector").scores(work)[group.key]
    values = parameters_of(model)[group.key + ".v_proj.weight"]
    out = parameters_of(model)[group.key + ".o_proj.weight"]
    dim = values.shape[0] // 2
    with torch.no_grad():
        values[dim:] *= 2
        out[:, out.shape[1] // 2 :] /= 2
    after = LLMPruner(criterion="vector").scores(work)[group.key]
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-8)
    fresh = tiny_model("llama")
    dead = job(fresh, ("head",))
    with torch.no_grad():
        parameters_of(fresh)[group.key + ".o_proj.weight"][:, out.shape[1] // 2 :] = 0
    scores = LLMPruner().scores(dead)[group.key]
    assert scores[1] < 1e-9 < scores[0]  # nothing of group 1's is mixed into group 0


def test_every_kind_is_ranked() -> None:
    model = tiny_model("llama")
    kinds = ("head", "ffn", "stem", "layer")
    for method in (LLMPruner(), LLMPruner(criterion="l2"), LLMPruner(criterion="random")):
        found = method.scores(work := job(model, kinds))
        assert {g.kind for g in work.groups} == {"kv_group", "ffn", "stem", "layer"}
        for group in work.groups:
            assert found[group.key].shape == (group.n_units,)
            assert torch.isfinite(found[group.key].float()).all()
    kept = LLMPruner(layers="first").scores(work)["model.layers"]
    assert kept.argmin() == len(kept) - 1


def test_a_tied_embedding_counts_once_in_the_residual_width() -> None:
    tied = tiny_model("llama", tie_word_embeddings=True)
    work = job(tied, ("stem",))
    found = LLMPruner(criterion="l1").scores(work)["stem"]
    expected = torch.zeros(48, dtype=torch.float64)
    seen = set()
    for part in work.groups[0].slices:
        p = parameters_of(tied)[part.parameter].detach().double()
        if (id(parameters_of(tied)[part.parameter]), part.dim) not in seen:
            seen.add((id(parameters_of(tied)[part.parameter]), part.dim))
            expected += p.abs() if p.dim() == 1 else p.abs().sum(1 - part.dim)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    plain = UnitMagnitude(norm="l1").scores(work)["stem"]
    torch.testing.assert_close(plain.double(), expected, rtol=1e-4, atol=1e-4)


def test_a_dead_channel_is_the_least_important_and_costs_nothing() -> None:
    model = tiny_model("llama")
    work = job(model, ("ffn",))
    group = work.groups[1]
    with torch.no_grad():
        for part in group.slices:
            parameters_of(model)[part.parameter].select(part.dim, 17).zero_()
    scores = LLMPruner().scores(work)[group.key]
    assert int(scores.argmin()) == 17
    before = model(IDS).logits
    gone = torch.zeros(group.n_units, dtype=torch.bool)
    gone[17] = True
    mask = StructuredMask()
    mask.remove(group, gone)
    shrink(model, mask)
    torch.testing.assert_close(model(IDS).logits, before, rtol=1e-4, atol=1e-5)


def test_later_rounds_score_the_masked_model() -> None:
    model = tiny_model("llama")
    work = job(model, ("ffn",))
    group = work.groups[0]
    gone = torch.arange(group.n_units) % 3 == 0
    mask = StructuredMask()
    mask.remove(group, gone)
    apply_mask(model, mask)
    scores = LLMPruner(steps=2).scores(work)[group.key]
    assert (scores[gone] == 0).all()
    assert (scores[~gone] > 0).all()


def test_encoder_decoders_are_scored_under_their_own_objective() -> None:
    import transformers

    from secateur.models.tiny import randomise

    config = transformers.T5Config(
        d_model=48, d_kv=12, num_heads=4, num_layers=2, d_ff=64, vocab_size=264,
        decoder_start_token_id=0,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    model: Any = transformers.T5ForConditionalGeneration(config).eval()
    randomise(model)
    groups = list(units_of(model, ("head", "ffn")))
    batch = {"input_ids": IDS, "labels": IDS[:, :6]}
    found = importances(model, groups, [batch], sequence_to_sequence)
    assert set(found) == {g.key for g in groups}
    assert all((v > 0).all() for v in found.values())
    with pytest.raises(UsageError, match="no block"):
        LLMPruner().scores(ScoreJob(tiny_model("llama"), groups, {}, Windows(IDS, None, {})))


def test_bad_options_are_named() -> None:
    for options, word in (
        ({"criterion": "element3"}, "criterion"),
        ({"reduction": "median"}, "reduction"),
        ({"steps": 0}, "steps"),
        ({"colour": "red"}, "colour"),
    ):
        with pytest.raises(UsageError, match=word):
            LLMPruner.with_options(options)
    with pytest.raises(UsageError, match="ranking"):
        Heads.with_options({"ranking": "best"})
