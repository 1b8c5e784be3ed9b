"""PERP: what is trained, how many parameters that is, closed forms, and zeros that stay."""

import copy
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from secateur.data.windows import Windows
from secateur.errors import UsageError
from secateur.models.anatomy import ModelView
from secateur.models.tiny import FAMILIES, tiny_config, tiny_model
from secateur.training.distil import distillation_loss, logit_kl
from secateur.training.imp import sparsities
from secateur.training.loop import Batch, Hook, fit, next_token_loss
from secateur.training.masked import check_masks
from secateur.training.perp import parts, perp
from secateur.training.settings import TrainSettings
from secateur.training.subsets import add_biases, available, choose, norm_modules, usual


def windows(count=8, length=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Windows(torch.randint(4, 260, (count, length), generator=generator))


def pruned(family="llama", share=0.5, **changes):
    view = ModelView.of(tiny_model(family, **changes))
    masks = {}
    for matrix in view.matrices():
        weight = matrix.tensor()
        cut = weight.abs().flatten().kthvalue(max(1, int(share * weight.numel()))).values
        masks[matrix.name] = weight.abs() <= cut
        weight.masked_fill_(masks[matrix.name], 0)
    return view, masks


# -- shares of parameters, against the published sizes -------------------------------------------

# OPT: (hidden, layers, ffn) -> per cent of all parameters that are biases (of linears and
# norms), norm parameters, and both together; computed by hand from the architecture.
OPT = {
    "125m": ((768, 12, 3072), 0.0816, 0.0307, 0.0969),
    "2.7b": ((2560, 32, 10240), 0.0341, 0.0126, 0.0404),
    "30b": ((7168, 48, 28672), 0.0127, 0.0046, 0.0150),
}


@pytest.mark.parametrize("size", OPT)
def test_trained_share_of_opt_is_the_published_one(size):
    from transformers import AutoModelForCausalLM

    (hidden, layers, ffn), biases, norms, both = OPT[size]
    config = tiny_config(
        "opt", vocab_size=50272, hidden_size=hidden, word_embed_proj_dim=hidden, ffn_dim=ffn,
        num_hidden_layers=layers, max_position_embeddings=2048,
        num_attention_heads=hidden // 64,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    view = ModelView.of(model)
    for names, percent in ((["biases"], biases), (["norms"], norms), (["biases", "norms"], both)):
        chosen = choose(view, names)
        assert 100 * chosen.trained / chosen.total == pytest.approx(percent, rel=0.01)


@pytest.mark.parametrize("family", FAMILIES)
def test_norms_are_found_in_every_family(family):
    model = tiny_model(family)
    found = norm_modules(model)
    named = {n for n, m in model.named_modules() if "norm" in type(m).__name__.lower()}
    assert named <= set(found)
    assert all(p.dim() == 1 for m in found.values() for p in m.parameters())
    assert usual(model) in {("norms",), ("biases", "norms")}


def test_a_model_without_biases_says_what_it_has():
    view = ModelView.of(tiny_model("llama"))
    with pytest.raises(UsageError, match="no biases") as caught:
        choose(view, ["biases"])
    assert "norms" in caught.value.fix
    assert "--add-biases" in caught.value.fix
    assert "biases" not in available(view.model)


@pytest.mark.parametrize("names", [["bias"], ["norms", "hed"]])
def test_an_unknown_subset_is_refused(names):
    with pytest.raises(UsageError, match="no subset"):
        choose(ModelView.of(tiny_model("llama")), names)


@pytest.mark.parametrize(
    "train", [[], ["mask-lora", "spp"], ["all", "mask-lora"], ["nothing"], ["rescale", "spp"]]
)
def test_trained_sets_that_make_no_sense_are_refused(train):
    with pytest.raises(UsageError) as caught:
        parts(train)
    assert caught.value.field == "train"


def test_added_biases_change_nothing_and_open_with_transformers(tmp_path):
    view, masks = pruned("llama")
    model, ids = view.model, windows(2).ids
    before = model(ids).logits
    names = add_biases(view)
    assert len(names) == len(view.matrices())
    assert torch.equal(model(ids).logits, before)
    record = perp(view, masks, windows(), TrainSettings(steps=3, lr=1e-2), train=["biases"])
    assert record["trained"] == sum(m.shape[0] for m in view.matrices())
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.allclose(again(ids).logits, model(ids).logits, atol=1e-5)
    with pytest.raises(UsageError, match="no place"):
        add_biases(ModelView.of(tiny_model("gpt2")))


# -- training ------------------------------------------------------------------------------------

TRAINED = [
    ["norms"],
    ["head"],
    ["rescale"],
    ["norms", "rescale"],
    ["norms", "mask-lora"],
    ["scale-lora"],
    ["lora-prune"],
    ["all"],
]


@pytest.mark.parametrize("train", TRAINED, ids="+".join)
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_zeros_stay_and_the_loss_falls(family, train):
    view, masks = pruned(family)
    gone = check_masks(view, masks)
    names = [n for n, _ in view.model.named_parameters()]
    settings = TrainSettings(steps=12, lr=5e-3, batch=8, weight_decay=0.1)
    record = perp(view, masks, windows(), settings, train=train, adapter=_small(train))
    assert record["zeros"] == gone == check_masks(view, masks)
    assert record["last_loss"] < record["first_loss"]
    assert 0 < record["share"] <= 1
    if "head" not in train:
        assert [n for n, _ in view.model.named_parameters()] == names
    assert not any(p.requires_grad for p in view.model.parameters())


def _small(train):
    return {"rank": 4} if parts(train)[1] else {}


def test_head_is_untied_and_the_embedding_stays():
    view, masks = pruned("llama", tie_word_embeddings=True)
    model = view.model
    embedding = model.get_input_embeddings().weight.detach().clone()
    perp(view, masks, windows(), TrainSettings(steps=3, lr=1e-2), train=["head"])
    assert torch.equal(model.get_input_embeddings().weight, embedding)
    assert not torch.equal(model.get_output_embeddings().weight, embedding)
    assert model.config.tie_word_embeddings is False


def test_frozen_linears_form_no_weight_gradients():
    """What autograd keeps for a frozen linear's weight gradient is not kept at all."""
    view, masks = pruned("opt")
    seen = []

    class Look(Hook):
        def after_backward(self, at):
            seen.append({n for n, p in at.model.named_parameters() if p.grad is not None})

    perp(
        view, masks, windows(), TrainSettings(steps=1), train=["biases", "norms"], hooks=[Look()]
    )  # fmt: skip
    assert seen[0]
    assert all(dict(view.model.named_parameters())[n].dim() == 1 for n in seen[0])


def test_rescale_merges_to_what_was_trained():
    view, masks = pruned("opt")
    outputs = []

    class Look(Hook):
        def end(self, at):
            outputs.append(at.model(windows(2).ids).logits.detach())

    settings = TrainSettings(steps=5, lr=2e-2)
    perp(view, masks, windows(), settings, train=["rescale"], hooks=[Look()])
    assert torch.allclose(view.model(windows(2).ids).logits, outputs[0], atol=1e-4)
    assert all("rescale" not in n for n, _ in view.model.named_parameters())


def test_after_a_failure_the_model_has_its_own_parts_again():
    for train in (["rescale"], ["mask-lora"]):
        view, masks = pruned("llama")
        names = [n for n, _ in view.model.named_parameters()]
        before = {n: p.clone() for n, p in view.model.named_parameters()}

        def broken(model, batch):
            return next_token_loss(model, batch) * float("nan")

        with pytest.raises(Exception, match="not finite"):
            perp(
                view, masks, windows(), TrainSettings(steps=2), train=train, loss=broken,
                adapter=_small(train),
            )  # fmt: skip
        assert [n for n, _ in view.model.named_parameters()] == names
        assert all(torch.equal(p, before[n]) for n, p in view.model.named_parameters())


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_checkpointing_computes_the_same(family):
    losses = []
    for checkpointing in (False, True):
        view, masks = pruned(family)
        for layer in view.model.modules():
            if isinstance(getattr(layer, "dropout", None), float):
                layer.dropout = 0.5  # of OPT's layers; it must not wake up
        record = perp(
            view, masks, windows(), TrainSettings(steps=4), train=["norms"],
            checkpointing=checkpointing,
        )  # fmt: skip
        losses.append((record["first_loss"], record["last_loss"]))
        layer = view.blocks[0].module
        assert getattr(layer, "dropout", 0.5) == 0.5
        assert not layer.training
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


class Linear(nn.Module):
    """A single linear on given inputs: its bias has a closed form."""

    def __init__(self, weight, bias):
        super().__init__()
        self.layer = nn.Linear(weight.shape[1], weight.shape[0])
        self.layer.weight = nn.Parameter(weight, requires_grad=False)
        self.layer.bias = nn.Parameter(bias)


def test_bias_of_one_linear_reaches_its_closed_form():
    """b* = b + mean(Y - W X): the least-squares shift (spec oracle)."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, 6, generator=generator)
    dense = torch.randn(5, 6, generator=generator)
    weight = dense * (torch.rand(5, 6, generator=generator) < 0.5)
    y = x @ dense.T + 1.0
    model = Linear(weight, torch.zeros(5))

    def squares(model, batch):
        return (model.layer(x) - y).square().mean()

    fit(model, windows(), TrainSettings(steps=400, lr=0.1, schedule="cosine"), loss=squares)
    expected = (y - x @ weight.T).mean(0)
    assert torch.allclose(model.layer.bias, expected, atol=1e-3)


def test_scales_of_the_rows_of_one_linear_reach_their_closed_form():
    """s_j = <y_j - b_j, (W x)_j> / ||(W x)_j||^2, each row by itself (spec oracle)."""
    from types import SimpleNamespace

    from secateur.models.matrix import Matrix
    from secateur.training.subsets import choose

    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, 6, generator=generator)
    weight = torch.randn(5, 6, generator=generator)
    weight *= torch.rand(5, 6, generator=generator) < 0.7
    bias = torch.randn(5, generator=generator)
    y = torch.randn(64, 5, generator=generator) + x @ weight.T * 1.7
    model = Linear(weight.clone(), bias.clone())
    view = SimpleNamespace(model=model, matrices=lambda: [Matrix("layer", model.layer)])
    chosen = choose(view, ["rescale"])
    assert chosen.trained == 5

    def squares(model, batch):
        return (model.layer(x) - y).square().mean()

    fit(model, windows(), TrainSettings(steps=400, lr=0.1, schedule="cosine"), loss=squares)
    chosen.finish()
    plain = x @ weight.T
    best = ((y - bias) * plain).sum(0) / plain.square().sum(0)
    assert torch.allclose(model.layer.weight, weight * best[:, None], atol=1e-3)
    assert torch.equal(model.layer.bias, bias)
    assert ((model.layer.weight == 0) == (weight == 0)).all()


# -- distillation, cycles ------------------------------------------------------------------------


def test_logit_kl_is_zero_for_equals_and_right_by_hand():
    a = torch.tensor([[1.0, 2.0, 0.0]])
    assert logit_kl(a, a, 3.0).item() == pytest.approx(0, abs=1e-6)
    b = torch.tensor([[0.0, 0.0, 0.0]])
    p = torch.softmax(a / 2, -1)
    by_hand = 4 * float((p * (p * 3).log()).sum())
    assert logit_kl(b, a, 2.0).item() == pytest.approx(by_hand, rel=1e-5)


def test_distillation_draws_towards_the_dense_model():
    dense = tiny_model("llama")
    view, masks = pruned("llama")
    batch = Batch(windows(8).ids)
    only = distillation_loss(dense, 1.0, 1.0)
    mixed = distillation_loss(dense, 0.3, 2.0)
    with torch.no_grad():
        start = float(only(view.model, batch))
        kl2 = distillation_loss(dense, 1.0, 2.0)(view.model, batch)
        plain = next_token_loss(view.model, batch)
        assert float(mixed(view.model, batch)) == pytest.approx(float(0.3 * kl2 + 0.7 * plain))
        assert float(only(copy.deepcopy(dense), batch)) == pytest.approx(0, abs=1e-6)
    settings = TrainSettings(steps=20, lr=5e-3, batch=8)
    perp(view, masks, windows(), settings, train=["norms", "mask-lora"], loss=only)
    with torch.no_grad():
        assert float(only(view.model, batch)) < 0.8 * start
    for weight, temperature in ((1.5, 1.0), (0.5, 0.0)):
        with pytest.raises(UsageError):
            distillation_loss(dense, weight, temperature)


@given(
    st.floats(0, 0.99), st.integers(1, 12), st.sampled_from(["geometric", "cubic"])
)  # fmt: skip
def test_cycles_rise_to_the_target(target, cycles, schedule):
    steps = sparsities(target, cycles, schedule)
    assert len(steps) == cycles
    assert steps[-1] == target
    assert all(a <= b + 1e-12 for a, b in itertools.pairwise(steps))
    if schedule == "geometric":  # the same share of what is left, each time
        kept = [1.0, *(1 - s for s in steps)]
        shares = [b / a for a, b in itertools.pairwise(kept)]
        assert max(shares) - min(shares) < 1e-9
        product = 1.0
        for share in shares:
            product *= share
        assert product == pytest.approx(1 - target)
