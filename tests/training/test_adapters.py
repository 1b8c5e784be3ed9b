"""Adapters on real model classes: on, trained, merged and off again, without a trace."""

import copy
import pickle

import pytest
import torch
from torch import nn

from secateur.errors import NumericsError, UsageError
from secateur.models.anatomy import ModelView
from secateur.models.head import is_tied, untie_head
from secateur.models.matrix import Matrix
from secateur.models.tiny import VOCABULARY, tiny_model
from secateur.training.adapters import Adapted, AdapterOptions, Adapters
from secateur.training.low_rank import KINDS, MASKED

IDS = torch.randint(4, VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(3))
FAMILIES = ("llama", "gpt2", "opt", "gpt_neox", "phi3", "mixtral")


def pruned(family="llama", pattern=None, **changes):
    """A tiny model with half of each matrix gone, its view and its masks."""
    model = tiny_model(family, **changes)
    view, masks = ModelView.of(model), {}
    for number, matrix in enumerate(view.matrices()):
        noise = torch.rand(matrix.shape, generator=torch.Generator().manual_seed(number))
        if pattern == "2:4":
            order = noise.view(len(noise), -1, 4).argsort(-1).argsort(-1)
            masks[matrix.name] = (order < 2).view(matrix.shape)
        else:
            masks[matrix.name] = noise < 0.5
        matrix.tensor().masked_fill_(masks[matrix.name], 0)
    return model, view, masks


@torch.no_grad()
def logits(model):
    return model(IDS).logits


@torch.no_grad()
def disturb(adapters, size=0.02):
    """As after some training."""
    g = torch.Generator().manual_seed(9)
    for parameter in adapters.parameters().values():
        parameter.add_(size * torch.randn(parameter.shape, generator=g))


def zeros_hold(view, masks):
    return all((m.tensor()[masks[m.name]] == 0).all() for m in view.matrices())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_on_trained_merged_and_off(family, kind):
    model, view, masks = pruned(family)
    names = list(model.state_dict())
    modules = [(n, type(m)) for n, m in model.named_modules()]
    flags = [p.requires_grad for p in model.parameters()]
    before = logits(model)
    adapters = Adapters.attach(view, {} if kind == "lora" else masks, AdapterOptions(kind, rank=4))
    assert torch.equal(logits(model), before), "at the start the model is what it was"
    disturb(adapters)
    trained = logits(model)
    assert not torch.allclose(trained, before, atol=1e-3)
    adapters.merge()
    if kind in MASKED:
        assert torch.equal(logits(model), trained), "merged is what was trained, to the bit"
    elif kind == "lora":
        torch.testing.assert_close(logits(model), trained, atol=1e-4, rtol=1e-4)
    if kind != "lora":
        assert zeros_hold(view, masks)
    assert list(model.state_dict()) == names
    assert [(n, type(m)) for n, m in model.named_modules()] == modules
    assert [p.requires_grad for p in model.parameters()] == flags
    pickle.dumps(model.state_dict())
    ModelView.of(model)  # which refuses a wrapped model


@pytest.mark.parametrize("kind", MASKED)
def test_two_of_four_stays_two_of_four(kind):
    _model, view, masks = pruned(pattern="2:4")
    adapters = Adapters.attach(view, masks, AdapterOptions(kind, rank=4))
    disturb(adapters, 0.1)
    adapters.merge()
    for matrix in view.matrices():
        assert ((matrix.tensor() != 0).view(-1, 4).sum(-1) <= 2).all()


@pytest.mark.parametrize("kind", MASKED)
def test_in_half_precision_it_is_merged_in_float32_and_rounded_once(kind):
    model, view, masks = pruned()
    model.to(torch.bfloat16)
    before = logits(model)
    adapters = Adapters.attach(view, masks, AdapterOptions(kind, rank=4))
    assert all(p.dtype == torch.float32 for p in adapters.parameters().values())
    assert torch.equal(logits(model), before)
    disturb(adapters)
    trained = logits(model)
    name, module = next(iter(adapters.modules.items()))
    a, b = module.lora_a.detach(), module.lora_b.detach()
    weight, keep = view[name].tensor().float(), ~masks[name]
    by_hand = {
        "mask-lora": weight + module.scale * keep * (b @ a),
        "scale-lora": weight * (b @ a),
        "spp": weight + module.scale * weight * (b @ a),
    }[kind]
    adapters.merge()
    ulp = torch.finfo(torch.bfloat16).eps
    torch.testing.assert_close(view[name].tensor().float(), by_hand, rtol=ulp / 2, atol=1e-6)
    gap = (logits(model) - trained).norm() / trained.norm()
    assert gap < 0.02
    assert zeros_hold(view, masks)


def test_under_autocast_gradients_come_back_in_float32():
    model, view, masks = pruned()
    adapters = Adapters.attach(view, masks, AdapterOptions("mask-lora", rank=4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(IDS, labels=IDS).loss
    loss.backward()
    for parameter in adapters.parameters().values():
        assert parameter.grad.dtype == torch.float32
    assert any(p.grad.abs().max() > 0 for p in adapters.parameters().values())


def test_only_adapters_want_gradients_of_the_matrices():
    model, view, masks = pruned()
    adapters = Adapters.attach(view, masks, AdapterOptions(rank=4))
    model(IDS, labels=IDS).loss.backward()
    assert all(m.stored.grad is None for m in view.matrices())
    grads = [p.grad for p in adapters.parameters().values()]
    assert all(g is not None for g in grads)


def test_training_it_lowers_the_loss_and_loses_no_zero():
    model, view, masks = pruned()
    adapters = Adapters.attach(view, masks, AdapterOptions(rank=4))
    optimizer = torch.optim.AdamW(adapters.parameters().values(), lr=3e-3, weight_decay=0.1)
    losses = []
    for _ in range(15):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    adapters.merge()
    assert zeros_hold(view, masks)
    with torch.no_grad():
        assert float(model(IDS, labels=IDS).loss) < losses[-1] + 0.1


@pytest.mark.parametrize("kind", ["lora", "mask-lora", "scale-lora", "spp"])
def test_dropout_acts_while_learning_only_and_repeats_with_the_seed(kind):
    model, view, masks = pruned()
    if kind == "lora":
        masks = {}
    adapters = Adapters.attach(view, masks, AdapterOptions(kind, rank=4, dropout=0.5))
    disturb(adapters, 0.1)
    quiet = logits(model)
    assert torch.equal(logits(model), quiet)
    torch.manual_seed(1)
    first = model(IDS).logits
    second = model(IDS).logits
    torch.manual_seed(1)
    assert torch.equal(model(IDS).logits, first)
    assert not torch.allclose(first, second)
    assert not torch.allclose(first, quiet)


def test_with_every_the_mask_rests_in_the_steps_between_and_is_merged_all_the_same():
    from secateur.data.windows import Windows
    from secateur.training.perp import perp
    from secateur.training.settings import TrainSettings

    model, view, masks = pruned()
    adapters = Adapters.attach(view, masks, AdapterOptions("mask-lora", rank=4, every=2))
    disturb(adapters, 0.1)
    exact = logits(model)
    torch.testing.assert_close(model(IDS).logits, exact)
    for module in adapters.modules.values():
        module.masked = False
    assert not torch.allclose(model(IDS).logits, exact, atol=1e-2), "the update is dense now"
    assert torch.equal(logits(model), exact), "looking at it is always exact"
    adapters.merge()
    torch.testing.assert_close(logits(model), exact)

    seen = []
    from secateur.training import adapters as module_of

    plain = module_of.masked_linear
    module_of.masked_linear = lambda *a: seen.append(1) or plain(*a)
    try:
        settings = TrainSettings(steps=6, lr=1e-3, batch=2)
        perp(
            view,
            masks,
            Windows(IDS),
            settings,
            train=("mask-lora",),
            adapter={"rank": 2, "every": 3},
        )
    finally:
        module_of.masked_linear = plain
    assert len(seen) == 2 * 14, "steps 0 and 3, each of 14 matrices"
    assert zeros_hold(view, masks)


def test_with_every_the_mask_rests_in_a_sharded_twin_too():
    from types import SimpleNamespace

    _, view, masks = pruned()
    adapters = Adapters.attach(view, masks, AdapterOptions("mask-lora", rank=2, every=2))
    twin = copy.deepcopy(view.model, {id(p): p for p in view.model.parameters()})
    (hook,) = adapters.hooks()
    for step, masked in ((0, True), (1, False), (2, True)):
        hook.before_forward(SimpleNamespace(step=step, model=twin))
        found = {m.masked for m in twin.modules() if isinstance(m, Adapted)}
        assert found == {masked}


def test_gradients_are_the_same_when_activations_are_recomputed():
    model, view, masks = pruned()
    adapters = Adapters.attach(view, masks, AdapterOptions(rank=4, dropout=0.3))
    disturb(adapters)

    def gradients():
        torch.manual_seed(0)
        model.train()
        model(IDS, labels=IDS, use_cache=False).loss.backward()
        out = [p.grad.clone() for p in adapters.parameters().values()]
        model.zero_grad()
        return out

    kept = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for a, b in zip(kept, gradients(), strict=True):
        torch.testing.assert_close(a, b)


def test_targets_by_role_and_by_pattern_and_those_left_out_say_why():
    _model, view, masks = pruned()
    options = AdapterOptions(rank=4, targets=("q", "v", "*.1.mlp.down_proj"))
    adapters = Adapters.attach(view, masks, options)
    assert set(adapters.modules) == {
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.v_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.v_proj",
        "model.layers.1.mlp.down_proj",
    }
    assert adapters.skipped["model.layers.0.mlp.up_proj"] == "not among the targets"
    adapters.detach()


def test_fused_experts_are_left_alone_and_alone_they_are_refused():
    _model, view, masks = pruned("mixtral")
    adapters = Adapters.attach(view, masks, AdapterOptions(rank=4))
    assert all("experts" in name for name in adapters.skipped)
    assert len(adapters.modules) == 8
    adapters.detach()
    with pytest.raises(UsageError, match="fused"):
        Adapters.attach(view, masks, AdapterOptions(rank=4, targets=("gate_up",)))


def test_state_goes_out_and_comes_back():
    model, view, masks = pruned()
    adapters = Adapters.attach(view, masks, AdapterOptions(rank=4))
    disturb(adapters)
    state, trained = adapters.state(), logits(model)
    adapters.detach()
    again = Adapters.attach(view, masks, AdapterOptions(rank=4))
    again.load(state)
    assert torch.equal(logits(model), trained)
    with pytest.raises(UsageError, match="other matrices"):
        again.load({"nothing": torch.zeros(1)})
    again.detach()
    other = Adapters.attach(view, masks, AdapterOptions(rank=2))
    with pytest.raises(UsageError, match="rank"):
        other.load(state)


def test_an_exception_takes_them_off():
    model, view, masks = pruned()
    before = copy.deepcopy(model.state_dict())

    def fails():
        with Adapters.attach(view, masks, AdapterOptions(rank=4)) as adapters:
            disturb(adapters)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fails()
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[n], before[n]) for n in before)


def narrowed():
    """A Llama whose MLPs have been cut to another width in each block."""
    model = tiny_model("llama")
    for index, layer in enumerate(model.model.layers):
        width = 40 + 24 * index
        mlp = layer.mlp
        for name in ("gate_proj", "up_proj"):
            part = nn.Linear(mlp.gate_proj.in_features, width, bias=False)
            part.weight.data = getattr(mlp, name).weight.data[:width].clone()
            setattr(mlp, name, part)
        down = nn.Linear(width, mlp.down_proj.out_features, bias=False)
        down.weight.data = mlp.down_proj.weight.data[:, :width].clone()
        mlp.down_proj = down
    return model


def test_after_structured_cuts_any_shapes_do():
    """Rows of different widths in each block, nothing masked: LoRA as after SlimGPT."""
    model = narrowed()
    view = ModelView.of(model)
    targets = ("q", "k", "v", "o", "gate", "up", "down")
    adapters = Adapters.attach(view, {}, AdapterOptions("lora", 8, 16.0, targets=targets))
    assert len(adapters.modules) == 14
    disturb(adapters)
    trained = logits(model)
    adapters.merge()
    torch.testing.assert_close(logits(model), trained, atol=1e-4, rtol=1e-4)


def test_retraining_after_structured_cuts_leaves_a_plain_better_model():
    """LLM-Pruner's and SlimGPT's retraining: r = 8, alpha = 16 on all seven, merged."""
    from secateur.data.windows import Windows
    from secateur.training.perp import perp
    from secateur.training.settings import TrainSettings

    model = narrowed()
    names = list(model.state_dict())
    # One text over and over: that it is learnt is safe to assert.
    data = Windows(IDS.repeat(4, 1))
    with torch.no_grad():
        before = float(model(IDS, labels=IDS).loss)
    record = perp(
        ModelView.of(model),
        {},
        data,
        TrainSettings(steps=12, lr=3e-3, batch=4),
        train=("lora",),
        adapter={"rank": 8, "alpha": 16.0, "targets": ["q", "k", "v", "o", "gate", "up", "down"]},
    )
    with torch.no_grad():
        after = float(model(IDS, labels=IDS).loss)
    assert after < 0.9 * before
    assert after < record["last_loss"], "what was trained is what is in the weights"
    assert list(model.state_dict()) == names


def test_a_tied_head_is_refused_until_it_is_untied():
    model, view, masks = pruned(tie_word_embeddings=True)
    assert is_tied(model)
    before = logits(model)
    with pytest.raises(UsageError, match="untie"):
        Adapters.attach(view, masks, AdapterOptions(rank=4, head=True))
    assert torch.equal(logits(model), before)
    ModelView.of(model)  # nothing half-put
    assert untie_head(model)
    assert not untie_head(model)
    assert model.config.tie_word_embeddings is False
    embedding = model.get_input_embeddings().weight.clone()
    adapters = Adapters.attach(view, masks, AdapterOptions(rank=4, head=True))
    assert adapters.modules["lm_head"].kind == "lora"
    disturb(adapters)
    trained = logits(model)
    adapters.merge()
    torch.testing.assert_close(logits(model), trained, atol=1e-4, rtol=1e-4)
    assert torch.equal(model.get_input_embeddings().weight, embedding)


def test_an_untied_model_is_saved_and_loaded_with_both_weights(tmp_path):
    from transformers import AutoModelForCausalLM

    model, _view, _masks = pruned(tie_word_embeddings=True)
    untie_head(model)
    with torch.no_grad():
        model.lm_head.weight.add_(1.0)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(again), logits(model))


def test_a_single_matrix_outside_the_blocks():
    model, *_ = pruned(tie_word_embeddings=False)
    head = Matrix("lm_head", model.lm_head)
    adapters = Adapters.attach_to(model, [head], {}, AdapterOptions("lora", rank=4))
    disturb(adapters)
    trained = logits(model)
    adapters.merge()
    torch.testing.assert_close(logits(model), trained, atol=1e-4, rtol=1e-4)


def test_lora_is_not_merged_into_zeros():
    _model, view, masks = pruned()
    adapters = Adapters.attach(view, masks, AdapterOptions("lora", rank=4))
    disturb(adapters)
    with pytest.raises(UsageError, match="fill the zeros"):
        adapters.merge()
    adapters.detach()
    assert zeros_hold(view, masks)


def test_nan_is_not_merged():
    model, view, masks = pruned()
    before = copy.deepcopy(model.state_dict())
    adapters = Adapters.attach(view, masks, AdapterOptions(rank=4))
    last = list(adapters.modules.values())[-1]
    with torch.no_grad():
        last.lora_b.fill_(float("nan"))
    with pytest.raises(NumericsError, match="down_proj"):
        adapters.merge()
    adapters.detach()
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"kind": "dora"}, "kind"),
        ({"rank": 0}, "rank"),
        ({"alpha": 0.0}, "alpha"),
        ({"alpha": float("nan")}, "alpha"),
        ({"dropout": 1.0}, "dropout"),
        ({"init": "paper"}, "init"),
        ({"every": 0}, "every"),
        ({"every": 2, "kind": "scale-lora"}, "every"),
    ],
)
def test_bad_options_name_the_field(options, field):
    with pytest.raises(UsageError) as error:
        AdapterOptions(**options)
    assert error.value.field == field
    assert error.value.fix


def test_masks_that_do_not_fit_are_refused_before_anything_is_put_on():
    model, view, masks = pruned()
    name = view.matrices()[0].name
    for bad in (
        {"model.layers.9.mlp": masks[name]},
        {name: masks[name][:-1]},
        {name: ~masks[name]},
    ):
        with pytest.raises(UsageError):
            Adapters.attach(view, bad, AdapterOptions())
    with pytest.raises(UsageError, match="matches no matrix"):
        Adapters.attach(view, masks, AdapterOptions(targets=("w1",)))
    ModelView.of(model)
