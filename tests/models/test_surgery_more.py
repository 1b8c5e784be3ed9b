"""Cutting again, with gradients and optimizer state, with cache and generation."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from structured_cases import inputs_of, model_of, outputs, random_mask

from secateur.errors import SecateurError, UsageError
from secateur.masks.structured import StructuredMask, structure_of
from secateur.models.surgery import apply_mask, shrink
from secateur.models.units import units_of

GENERATE = [
    ("llama", ("head", "ffn", "layer"), "groups"),
    ("llama", ("head",), "duplicate"),
    ("qwen3", ("head", "stem"), "even"),
    ("gemma3", ("head", "ffn", "stem"), "groups"),
    ("gpt2", ("head", "ffn", "stem", "layer"), "groups"),
    ("opt", ("head", "ffn"), "groups"),
    ("bloom", ("head", "ffn"), "groups"),
    ("falcon_gqa", ("head", "ffn"), "groups"),
    ("phi3", ("head", "ffn"), "even"),
    ("gpt_neox", ("head", "ffn"), "groups"),
    ("bert_decoder", ("head", "ffn"), "groups"),
    ("t5", ("head", "ffn"), "groups"),
    ("bart", ("head", "ffn"), "groups"),
]


def generated(model: Any, **options: Any) -> torch.Tensor:
    inputs = inputs_of(model)
    inputs.pop("decoder_input_ids", None)
    return model.generate(
        **inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0, **options
    )


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize(("family", "kinds", "gqa"), GENERATE)
def test_generation_with_cache(family: str, kinds: Any, gqa: str, attn: str) -> None:
    if attn == "sdpa" and family == "bloom":
        pytest.skip("this family has no sdpa attention in transformers")
    model = model_of(family, attn)
    mask = random_mask(model, kinds, gqa)
    masked = deepcopy(model)
    apply_mask(masked, mask)
    shrink(model, mask)
    expected = generated(masked)
    assert torch.equal(generated(model), expected)
    assert torch.equal(generated(model, use_cache=False), expected)
    assert torch.equal(generated(deepcopy(model)), expected)  # hooks and sizes travel


def test_static_cache_of_a_t5_with_uneven_heads() -> None:
    model = model_of("t5")
    mask = random_mask(model, ("head",))
    masked = deepcopy(model)
    apply_mask(masked, mask)
    shrink(model, mask)
    found = generated(model, cache_implementation="static", disable_compile=True)
    assert torch.equal(found, generated(masked))


def test_alibi_of_falcon() -> None:
    for attn in ("eager", "sdpa"):
        model = model_of("falcon", attn, alibi=True, multi_query=False)
        mask = random_mask(model, ("head",))
        masked = deepcopy(model)
        apply_mask(masked, mask)
        shrink(model, mask)
        inputs = inputs_of(model)
        torch.testing.assert_close(
            outputs(model, **inputs), outputs(masked, **inputs), rtol=2e-4, atol=2e-5
        )


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "bart", "bloom"])
def test_cutting_twice_is_cutting_once(family: str) -> None:
    kinds: tuple[str, ...] = ("head", "ffn", "stem") if family in ("llama", "gpt2") else ("head",)
    kinds = (*kinds, "layer") if family in ("llama", "gpt2") else kinds
    attn = "eager" if family == "bloom" else "sdpa"
    once, twice = model_of(family, attn), model_of(family, attn)
    first, second = random_mask(once, kinds, seed=1), random_mask(once, kinds, seed=2)
    both = first.union(second)
    for gone in both.gone.values():  # two random halves may empty a group
        if gone.all():
            gone[0] = False
    second = StructuredMask(both.gone)
    first = StructuredMask({k: v & both.gone[k] for k, v in first.gone.items()})
    if family == "llama":
        for m in (first, second, both):
            m.duplicated |= {k for k in m.gone if "attn" in k}
    shrink(once, both)
    shrink(twice, first)
    shrink(twice, second)
    assert structure_of(once) == structure_of(twice)
    inputs = inputs_of(once)
    torch.testing.assert_close(
        outputs(twice, **inputs), outputs(once, **inputs), rtol=1e-3, atol=1e-4
    )


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_any_mask(data: st.DataObject) -> None:
    """Whatever units go, in any layers, cutting them out is zeroing them."""
    model = model_of("qwen2")
    mask = StructuredMask()
    for group in units_of(model, ("head", "ffn", "stem"), "duplicate"):
        n = group.n_units
        size = data.draw(st.integers(0, n - 1))
        chosen = data.draw(st.permutations(range(n)))[:size]
        gone = torch.zeros(n, dtype=torch.bool)
        gone[torch.tensor(chosen, dtype=torch.long)] = True
        mask.remove(group, gone)
        if group.kind == "head":
            mask.duplicated.add(group.key)
    masked = deepcopy(model)
    apply_mask(masked, mask)
    shrink(model, mask)
    inputs = inputs_of(model)
    torch.testing.assert_close(
        outputs(model, **inputs), outputs(masked, **inputs), rtol=1e-3, atol=1e-4
    )


def test_nothing_gone_changes_nothing() -> None:
    model = model_of("llama")
    before = {n: p.clone() for n, p in model.named_parameters()}
    shrink(
        model,
        StructuredMask(
            {
                g.key: torch.zeros(g.total, dtype=torch.bool)
                for g in units_of(model, ("ffn", "stem"))
            }
        ),
    )
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_ties_stay_the_same_object() -> None:
    model = model_of("llama", tie_word_embeddings=True)
    embedding = model.get_input_embeddings().weight
    shrink(model, random_mask(model, ("stem", "ffn")))
    assert model.lm_head.weight is embedding
    assert embedding.shape[1] == model.get_input_embeddings().embedding_dim == 24
    assert model.lm_head.in_features == 24


@pytest.mark.parametrize("kind", ["adam", "sgd", "adafactor"])
def test_training_goes_on_after_a_cut(kind: str) -> None:
    """Masked training (gradients and state zeroed) and compact training take the same steps."""
    compact, masked = model_of("llama").double(), model_of("llama").double()
    make: Any = {
        "adam": lambda p: torch.optim.Adam(p, lr=1e-3),
        "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
        "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-3),
    }[kind]
    optimizers = {id(m): make(m.parameters()) for m in (compact, masked)}
    mask = random_mask(compact, ("head", "ffn"))
    ids = torch.randint(4, 200, (2, 16), generator=torch.Generator().manual_seed(0))

    def step(model: Any, dead: dict[str, torch.Tensor] | None = None) -> float:
        optimizer = optimizers[id(model)]
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        for name, alive in (dead or {}).items():
            parameter = dict(model.named_parameters())[name]
            parameter.grad *= alive
            for value in optimizer.state[parameter].values():
                if value.shape == parameter.shape:
                    value *= alive
        optimizer.step()
        for name, alive in (dead or {}).items():
            dict(model.named_parameters())[name].data *= alive
        return float(loss)

    for model in (compact, masked):
        step(model)
    names = {id(p): n for n, p in compact.named_parameters()}
    before = {n: p.shape for n, p in compact.named_parameters()}
    average = {n: p.detach().clone() for n, p in compact.named_parameters()}
    compact(input_ids=ids, labels=ids).loss.backward()
    shrink(compact, mask, optimizers=[optimizers[id(compact)]], also=[average])
    assert {n for n, p in compact.named_parameters() if p.shape != before[n]}
    for parameter in compact.parameters():
        assert parameter.grad is not None
        assert parameter.grad.shape == parameter.shape
        assert average[names[id(parameter)]].equal(parameter.detach())
        for value in optimizers[id(compact)].state[parameter].values():
            if kind != "adafactor" and isinstance(value, torch.Tensor) and value.numel() > 1:
                assert value.shape == parameter.shape
    if kind == "adafactor":  # its factored moments average over what is gone, too
        step(compact)
        return
    apply_mask(masked, mask)
    fresh = model_of("llama").double()
    with torch.no_grad():
        for p in fresh.parameters():
            p.fill_(1.0)
    apply_mask(fresh, mask)
    alive = {n: p.detach() for n, p in fresh.named_parameters()}
    for _ in range(3):
        assert step(compact) == pytest.approx(step(masked, alive), rel=1e-5)


def test_optimizer_state_of_unknown_shape_is_refused() -> None:
    model = model_of("gpt2")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for parameter in model.parameters():
        optimizer.state[parameter]["odd"] = torch.zeros(3, 5)
    with pytest.raises(SecateurError, match="how to cut it is not known"):
        shrink(model, random_mask(model, ("ffn",)), optimizers=[optimizer])


def test_bad_masks_are_refused() -> None:
    model = model_of("llama")
    key = "model.layers.0.self_attn"
    with pytest.raises(UsageError, match="no group of that name"):
        shrink(model, StructuredMask({"model.layers.9.mlp": torch.zeros(96, dtype=torch.bool)}))
    with pytest.raises(UsageError, match="counts 5 units"):
        shrink(model, StructuredMask({key: torch.zeros(5, dtype=torch.bool)}))
    with pytest.raises(UsageError, match="all 4 units"):
        shrink(model, StructuredMask({key: torch.ones(4, dtype=torch.bool)}))
    uneven = StructuredMask({key: torch.tensor([True, False, False, False])})
    with pytest.raises(UsageError, match="gqa: duplicate"):
        shrink(model, uneven)
    falcon = model_of("falcon")
    with pytest.raises(UsageError, match="share one key-value head"):
        units_of(falcon, ("head",), "groups")
    with pytest.raises(UsageError, match="normalises before"):
        units_of(model_of("bert"), ("layer",))
    with pytest.raises(UsageError, match="experts"):
        units_of(model_of("mixtral"), ("stem",))
    with pytest.raises(UsageError, match="no such kind"):
        units_of(model, ("heads",))
