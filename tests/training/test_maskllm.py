"""Learned masks: what starts them, what their gradient is, what they find, and that they resume."""

import itertools
import sys

import pytest
import torch
from maskllm_cases import IDS, TARGET, attached, magnitude_masks, settings
from torch import nn

import secateur
from secateur.data.windows import Windows
from secateur.errors import MissingExtra, SecateurError, UsageError
from secateur.kernels.candidate_mix import CandidateMix, Draw, key_of
from secateur.masks.selection import select
from secateur.masks.target import Cut, Scope
from secateur.models.anatomy import ModelView
from secateur.models.mask_file import MaskFile
from secateur.models.tiny import tiny_model, tiny_tokenizer
from secateur.progress import Progress
from secateur.training.loop import fit
from secateur.training.mask_logits import Learning
from secateur.training.maskllm import Gated, LearnedMasks

# -- on a model --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_a_forward_without_a_draw_is_the_masked_model(family):
    model = tiny_model(family).eval()
    masks = attached(model)
    with torch.no_grad():
        under = model(input_ids=IDS).logits
    learned = masks.detach()
    for matrix in ModelView.of(model).matrices():
        matrix.write(matrix.tensor().masked_fill(learned[matrix.name], 0))
    with torch.no_grad():
        assert torch.allclose(under, model(input_ids=IDS).logits, atol=1e-5)


def test_detaching_leaves_the_model_as_it_was():
    model = tiny_model("llama")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    with attached(model) as masks:
        assert {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad} == {
            "mask_logits"
        }
        fit(model, Windows(IDS), settings(), loss=masks.loss(), hooks=[masks])
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[k], before[k]) for k in before)
    assert [p.requires_grad for p in model.parameters()] == flags


# -- the gradient --------------------------------------------------------------------------------


@pytest.mark.parametrize("transposed", [False, True])
def test_the_layers_gradients_are_autograds(transposed):
    torch.manual_seed(2)
    layer = nn.Linear(8, 6)
    if transposed:
        layer.weight = nn.Parameter(layer.weight.detach().T.contiguous())
    mix = CandidateMix(2, 4)
    gated = Gated(layer, mix, torch.randn(12, 6) * 0.01, transposed)
    gated.requires_grad_(True)
    gated.draw = Draw(key_of(3), 100.0, 2.0)
    x = torch.randn(5, 3, 8, requires_grad=True)
    target = torch.randn(5, 3, 6)
    loss = (gated(x) * target).sum() - 0.1 * gated.square
    got = torch.autograd.grad(loss, [x, gated.mask_logits])

    from secateur.kernels.candidate_mix import probabilities

    logits = gated.mask_logits.detach().clone().requires_grad_()
    mixed = (probabilities(logits, gated.draw) @ mix.patterns.float()).view(6, 8)
    weight = gated.dense() * mixed
    again = (torch.nn.functional.linear(x, weight, layer.bias) * target).sum()
    wanted = torch.autograd.grad(again - 0.1 * weight.square().sum(), [x, logits])
    for ours, theirs in zip(got, wanted, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


# -- what it finds -------------------------------------------------------------------------------


def test_a_small_problem_is_solved_to_the_optimum():
    # One linear layer, four groups: all 6^4 masks can be tried.
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(1, 16, generator=generator)
    mixing = torch.randn(16, 16, generator=generator)  # correlated inputs: magnitude is misled
    x = torch.randn(256, 16, generator=generator) @ mixing
    wanted = x @ weight.T

    def error(mask):
        return float((x @ weight.masked_fill(mask, 0).T - wanted).square().mean())

    patterns = ~CandidateMix(2, 4).patterns
    every = [
        torch.cat([patterns[i] for i in choice])[None]
        for choice in itertools.product(range(6), repeat=4)
    ]
    best = min(error(mask) for mask in every)
    magnitude = select(weight.abs(), Cut.of((1, 16), TARGET, Scope("row")))
    layer = nn.Linear(16, 1, bias=False)
    layer.weight = nn.Parameter(weight)
    gated = Gated(layer, CandidateMix(2, 4), torch.randn(4, 6, generator=generator) * 0.01, False)
    layer.requires_grad_(False)
    optimizer = torch.optim.Adam([gated.mask_logits], lr=5e-3)
    options, steps = Learning(), 400
    for step in range(steps):
        gated.draw = options.draw(step / steps, key_of(0, step))
        loss = (gated(x) - wanted).square().mean() / wanted.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert error(gated.mask()) <= 1.01 * best
    assert error(gated.mask()) < error(magnitude)


def test_rewarding_large_weights_alone_finds_magnitude():
    torch.manual_seed(0)
    layer = nn.Linear(64, 32, bias=False).requires_grad_(False)
    gated = Gated(layer, CandidateMix(2, 4), torch.randn(512, 6) * 0.01, False)
    optimizer = torch.optim.Adam([gated.mask_logits], lr=2e-3)
    for step in range(300):
        gated.draw = Learning().draw(0.0, key_of(1, step))
        gated(torch.zeros(1, 64))
        optimizer.zero_grad()
        (-gated.square).backward()
        optimizer.step()
    wanted = select(layer.weight.abs(), Cut.of((32, 64), TARGET, Scope("row")))
    differs = (gated.mask() != wanted).view(-1, 4).any(-1)
    ordered = layer.weight.abs().view(-1, 4).sort(-1).values
    gap = 1 - ordered[:, 1] / ordered[:, 2]  # how clearly the second largest beats the third
    assert float(differs.float().mean()) < 0.2
    assert float(differs[gap > 0.3].float().mean()) < 0.02  # the others are near-ties


@pytest.mark.parametrize(("pattern", "options"), [((4, 8), Learning()), ((8, 16), Learning())])
def test_wider_groups_keep_n_of_m(pattern, options):
    model = tiny_model("llama")
    masks = attached(model, options, pattern=pattern)
    fit(model, Windows(IDS), settings(steps=2), loss=masks.loss(), hooks=[masks])
    for mask in masks.detach().values():
        kept = (~mask).view(mask.shape[0], -1, pattern[1]).sum(-1)
        assert bool((kept == pattern[0]).all())


# -- training ------------------------------------------------------------------------------------


@pytest.mark.parametrize("candidates", [None, 3])
@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_an_interrupted_learning_goes_on_as_if_it_had_not_been(tmp_path, optimizer, candidates):
    if optimizer == "adamw8bit":
        pytest.importorskip("bitsandbytes")

    def learn(folder, steps_now=None):
        model = tiny_model("llama")
        prior = magnitude_masks(ModelView.of(model)) if candidates else None
        masks = attached(model, Learning(candidates=candidates), prior)
        if steps_now is not None:
            step = type(masks).after_step

            def stop(at):
                step(masks, at)
                if at.step == steps_now:
                    raise KeyboardInterrupt

            masks.after_step = stop
        fitted = fit(
            model, Windows(IDS), settings(checkpoint_every=1, optimizer=optimizer),
            loss=masks.loss(), hooks=[masks], folder=folder,
        )  # fmt: skip
        return fitted.losses, masks.moved, masks.detach()

    whole = learn(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        learn(tmp_path / "cut", steps_now=3)
    again = learn(tmp_path / "cut")
    assert again[0] == whole[0]
    assert again[1] == whole[1]
    assert all(torch.equal(again[2][name], mask) for name, mask in whole[2].items())


def test_moments_in_8_bits_need_their_package_and_say_so_first(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(MissingExtra, match=r"secateur\[bnb\]"):
        secateur.prune(
            "tiny", out=tmp_path / "run", **RUN, options={**OPTIONS, "optimizer": "adamw8bit"}
        )
    assert not (tmp_path / "run" / "learning.json").exists()


def test_what_does_not_fit_is_told_before_any_work(tmp_path):
    stages = []

    class Heard(Progress):
        def stage(self, label, total=None, unit=""):
            stages.append(label)
            return super().stage(label, total, unit)

    (tmp_path / "other").mkdir()
    (tmp_path / "b.mask").write_bytes(b"hello")
    for prior, error in (("other", "holds no masks"), ("b.mask", "damaged")):
        how = {**OPTIONS, "prior": str(tmp_path / prior)}
        with pytest.raises(SecateurError, match=error):
            secateur.prune("tiny", **RUN, options=how, progress=Heard())
    for change, error in (({"candidates": 7}, "6 patterns"), ({"logits": "patterns"}, "12870")):
        how = {**RUN, "sparsity": "2:4" if "candidates" in change else "8:16"}
        with pytest.raises(UsageError, match=error):
            secateur.prune("tiny", **how, options=OPTIONS | change, progress=Heard())
    assert not any("evaluating" in label for label in stages)


def test_recomputing_activations_gives_the_same_gradients():
    def gradients(recompute):
        model = tiny_model("llama").train()
        masks = attached(model)
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        for number, module in enumerate(masks.modules.values()):
            module.draw = Learning().draw(0.1, key_of(number))
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        return [m.mask_logits.grad for m in masks.modules.values()]

    for once, twice in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(once, twice)


def test_the_teacher_is_the_dense_model_and_leaves_the_logits_trainable():
    model = tiny_model("llama").eval()
    with torch.no_grad():
        dense = model(input_ids=IDS).logits
    masks = attached(model)
    teacher = masks.teacher().eval().requires_grad_(False)
    with torch.no_grad():
        assert torch.equal(teacher(input_ids=IDS).logits, dense)
        assert not torch.equal(model(input_ids=IDS).logits, dense)
    assert all(m.mask_logits.requires_grad for m in masks.modules.values())


@pytest.mark.parametrize("candidates", [None, 4])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_learning_in_half_precision_is_about_the_same(family, candidates):
    def losses(precision):
        model = tiny_model(family)
        prior = magnitude_masks(ModelView.of(model)) if candidates else None
        masks = attached(model, Learning(candidates=candidates), prior)
        how = settings(precision=precision, steps=3, micro_batch=2)
        return fit(model, Windows(IDS), how, loss=masks.loss(), hooks=[masks]).losses

    assert losses("bf16") == pytest.approx(losses("no"), rel=0.02)


# -- in a run ------------------------------------------------------------------------------------

RUN = {
    "method": "maskllm",
    "sparsity": "2:4",
    "samples": 4,
    "length": 24,
    "evaluation": {"windows": 2, "length": 32, "speed": False},
}
OPTIONS = {"prior": "wanda", "steps": 4, "batch": 2, "validate_every": 2}


def test_a_run_learns_saves_and_reports(tmp_path):
    result = secateur.prune("tiny", options=OPTIONS | {"distil": 0.5}, out=tmp_path / "run", **RUN)
    learning = result.report["learning"]
    assert learning["prior"]["quality"]["pruned"]["perplexity"] > 0
    assert len(learning["validations"]) == 3
    file = MaskFile(tmp_path / "run" / "learned.mask")
    assert set(file.patterns.values()) == {TARGET}
    assert all(torch.equal(file[name], result.masks[name]) for name in result.masks)
    page = (tmp_path / "run" / "report.html").read_text()
    assert "The learned mask" in page
    # The mask file, put on the dense model, is the run's model.
    from secateur.models.loading import load

    dense = load("tiny", dtype="float32").model
    kind = next(result.model.parameters()).dtype
    masked = secateur.apply_mask(dense.to(kind), tmp_path / "run" / "learned.mask")
    with torch.no_grad():
        assert torch.allclose(
            masked(input_ids=IDS).logits, result.model(input_ids=IDS).logits, atol=1e-5
        )
    again = secateur.prune("tiny", options=OPTIONS | {"distil": 0.5}, out=tmp_path / "run", **RUN)
    assert again.report["quality"] == result.report["quality"]


def test_blocks_are_learned_in_turns(tmp_path, monkeypatch):
    seen = []
    attach = LearnedMasks.attach.__func__

    def noted(cls, *how):
        masks = attach(cls, *how)
        seen.append((set(masks.modules), {n: m.gone.clone() for n, m in masks.held.items()}))
        return masks

    monkeypatch.setattr(LearnedMasks, "attach", classmethod(noted))
    options = OPTIONS | {"steps": 5, "turns": 2, "lr": 2e-2}
    result = secateur.prune("tiny", options=options, out=tmp_path / "run", **RUN)
    (first, _), (second, held) = seen
    assert first | second == set(result.masks)
    assert not first & second
    # What the first turn learned is what the second one is learned under.
    assert all(torch.equal(held[name], result.masks[name]) for name in first)
    learning = result.report["learning"]
    assert learning["steps"] == 5
    assert [step for step, _ in learning["validations"]] == [0, 2, 2, 4, 5]
    assert learning["moved"][-1][0] == 5
    assert 0 < learning["changed"] < 1
    again = secateur.prune(
        "tiny", options=options, out=tmp_path / "again", **{**RUN, "evaluation": None}
    )
    assert all(torch.equal(again.masks[n], mask) for n, mask in result.masks.items())


def test_a_choice_of_candidates_is_learned_in_turns_and_goes_on(tmp_path, monkeypatch):
    options = OPTIONS | {"prior": "magnitude", "steps": 6, "turns": 2, "lr": 5e-2, "candidates": 3}
    prior = secateur.prune("tiny", **{**RUN, "method": "magnitude"}).masks
    first = secateur.prune("tiny", options=options, out=tmp_path / "run", **RUN)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("secateur.run.learned.save_mask", killed)  # just after the last step
        with pytest.raises(KeyboardInterrupt):
            secateur.prune("tiny", options=options, out=tmp_path / "cut", **RUN)
    again = secateur.prune("tiny", options=options, out=tmp_path / "cut", **RUN)
    assert all(torch.equal(again.masks[n], mask) for n, mask in first.masks.items())
    learning = first.report["learning"]
    assert again.report["learning"]["losses"] == learning["losses"]
    assert learning["changed"] > 0
    assert learning["bytes_per_weight"] == 0.75 * (20 + 1) / 2 + 1
    for name, mask in first.masks.items():
        kept, wanted = ~mask.view(-1, 4), ~prior[name].view(-1, 4)
        assert bool((kept.sum(-1) == 2).all())
        assert bool((kept & wanted).any(-1).all())  # of the six never the prior's opposite


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_a_held_mask_is_the_masked_model_and_passes_gradients(family):
    torch.manual_seed(1)
    model = tiny_model(family).eval()
    view = ModelView.of(model)
    prior = magnitude_masks(view)
    last = view.blocks[-1].matrices[-1].name
    patterns = {m.name: (2, 4) for m in view.matrices()}
    embedded = model.get_input_embeddings()(IDS[:2]).detach().requires_grad_()
    masks = LearnedMasks.attach(view, patterns, Learning(alpha=9.0), prior, [last])
    assert list(masks.modules) == [last]
    under = model(inputs_embeds=embedded).logits
    (got,) = torch.autograd.grad(under.square().sum(), embedded)
    learned = masks.detach() | {n: m for n, m in prior.items() if n != last}
    for matrix in view.matrices():
        matrix.write(matrix.tensor().masked_fill(learned[matrix.name], 0))
    plain = model(inputs_embeds=embedded).logits
    (wanted,) = torch.autograd.grad(plain.square().sum(), embedded)
    assert torch.allclose(under, plain, atol=1e-5)
    assert torch.allclose(got, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


def test_what_fails_to_attach_leaves_the_model_alone():
    model = tiny_model("llama")
    before = dict(model.named_modules())
    with pytest.raises(UsageError, match="does not divide"):
        attached(model, pattern=(2, 7))
    assert dict(model.named_modules()) == before
    assert all(p.requires_grad for p in model.parameters())


def test_a_run_from_another_mask_and_from_none(tmp_path):
    first = secateur.prune("tiny", **{**RUN, "method": "magnitude"}, out=tmp_path / "first")
    second = secateur.prune(
        "tiny", options=OPTIONS | {"prior": str(tmp_path / "first"), "alpha": 9.0, "steps": 1},
        **RUN,
    )  # fmt: skip
    same = [torch.equal(second.masks[n], first.masks[n]) for n in first.masks]
    assert all(same)  # alpha 9 and one step: nothing can have moved
    free = secateur.prune("tiny", options=OPTIONS | {"prior": "none", "steps": 1}, **RUN)
    assert free.report["learning"]["prior"]["quality"] is None


def test_fused_experts_are_masked_though_not_learned():
    model = tiny_model("mixtral")
    result = secateur.prune(
        model, tiny_tokenizer(), options=OPTIONS, calibration=IDS,
        **{**RUN, "evaluation": None},
    )  # fmt: skip
    assert all((m.view(m.shape[0], -1, 4).sum(-1) == 2).all() for m in result.masks.values())


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"sparsity": 0.5}, "sparsity"),
        ({"update": "exact"}, "update"),
        ({"options": {"prior": "nothing"}}, "prior"),
        ({"options": {"prior": "slimgpt"}}, "prior"),
        ({"options": {"tau": (0.0, 1.0)}}, "tau"),
        ({"options": {"init_std": 0.0}}, "init_std"),
        ({"options": {"distil": 2.0}}, "distil"),
        ({"options": {"steps": 0}}, "steps"),
        ({"options": {"turns": 9}}, "turns"),
        ({"options": {"turns": 2, "prior": "none"}}, "turns"),
        ({"options": {"logits": "patterns"}, "sparsity": "8:16"}, "logits"),
        ({"options": {"candidates": 1}}, "candidates"),
        ({"options": {"candidates": 7}}, "candidates"),
        ({"options": {"candidates": 8}, "sparsity": "8:16"}, "candidates"),
        ({"options": {"candidates": 4, "prior": "none"}}, "candidates"),
        ({"options": {"candidates": 4, "logits": "weights"}}, "candidates"),
        ({"sparsity": "5:9"}, "sparsity"),
    ],
)
def test_bad_input_is_told(change, field, tmp_path):
    values = RUN | {"options": OPTIONS} | change
    values["options"] = OPTIONS | values["options"]
    with pytest.raises(UsageError) as caught:
        secateur.prune("tiny", out=tmp_path / "run", **values)
    assert caught.value.field == field
    assert not (tmp_path / "run" / "model.safetensors.index.json").exists()
