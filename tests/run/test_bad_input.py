"""Bad input gets a message that names field, value and fix, whatever the door."""

import json

import pytest
import torch
from torch import nn

import secateur
from secateur.cli.common import read_options
from secateur.errors import NumericsError, SecateurError, UsageError
from secateur.evidence.statistics import Evidence, InputMoments
from secateur.masks.selection import select_reference
from secateur.masks.target import Cut, Target
from secateur.methods import methods
from secateur.models.anatomy import ModelView
from secateur.models.tiny import VOCABULARY, tiny_model, tiny_tokenizer
from secateur.recipe import Recipe

IDS = torch.randint(4, VOCABULARY, (4, 32), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    ("values", "field", "words"),
    [
        ({"sparsity": 1.5}, "sparsity", "0, 1"),
        ({"sparsity": -0.1}, "sparsity", "0, 1"),
        ({"sparsity": float("nan")}, "sparsity", "0, 1"),
        ({"sparsity": 50}, "sparsity", "did you mean 0.5"),
        ({"sparsity": "half"}, "sparsity", "not a sparsity"),
        ({"sparsity": "5:4"}, "sparsity", "1 <= N <= M"),
        ({"sparsity": 0.7, "pattern": "2:4"}, "sparsity", "contradicts"),
        ({"sparsity": "2:4", "scope": "layer"}, "scope", "groups of 4"),
        ({"sparsty": 0.5}, "sparsty", "did you mean 'sparsity'"),
        ({"calibration": {"sample": 3}}, "calibration.sample", "did you mean 'samples'"),
        ({"calibration": {"samples": 0}}, "calibration.samples", "greater"),
        ({"scope": "rows"}, "scope", "row, layer"),
        ({"scope": "block:0"}, "scope", "positive"),
        ({"update": "obc"}, "update", "none"),
        ({"quality": "great"}, "quality", "fast"),
        ({"quality": ["best"]}, "quality", "fast"),
        (
            {"propagate": "dense", "granularity": "true_sequential"},
            "granularity",
            "true_sequential",
        ),
        ({"propagate": "dense", "reconstruct": "dense"}, "reconstruct", "pruned"),
    ],
)
def test_recipes(values, field, words):
    with pytest.raises(UsageError) as caught:
        Recipe.build({"model": "tiny", **values})
    assert caught.value.field == field
    assert words in str(caught.value)


def test_a_recipe_that_is_not_text(tmp_path):
    (tmp_path / "recipe.yaml").write_bytes(b"model: \xff\xfe")
    with pytest.raises(UsageError, match="UTF-8"):
        Recipe.load(tmp_path / "recipe.yaml")


def test_an_option_that_is_not_yaml():
    with pytest.raises(UsageError, match="norm"):
        read_options(["norm=[l1"])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"method": "wandaa"}, "did you mean 'wanda'"),
        ({"method": "wanda", "options": {"alfa": 1}}, "no such option"),
        ({"sparsity": "3:7"}, "7 does not divide"),
        ({"include": ["nothing*"]}, "nothing"),
        ({"method": "wanda", "reconstruct": "dense"}, "--update exact"),
        ({"allocation": "uniformly"}, "did you mean 'uniform'"),
        ({"allocation": "absent.json"}, "not a plan"),
        ({"stream": True}, "out"),
    ],
)
def test_settings(settings, words):
    model = tiny_model("llama")
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(UsageError) as caught:
        secateur.prune(model, tiny_tokenizer(), calibration=IDS, **settings)
    assert words in str(caught.value)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("calibration", "words"),
    [
        ("no-such-file.txt", "no-such-file.txt"),
        ([], "nothing in it"),
        (["too short"], "window"),
        (torch.zeros(0, 8, dtype=torch.long), "nothing in it"),
        (torch.full((4, 8), VOCABULARY + 7), "vocabulary"),
    ],
)
def test_calibration_text(calibration, words):
    with pytest.raises(SecateurError) as caught:
        secateur.prune(
            tiny_model("llama"), tiny_tokenizer(), calibration=calibration, samples=4, length=64
        )
    assert words in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_broken_weights_name_the_place(method, value):
    model = tiny_model("llama")
    with torch.no_grad():
        ModelView.of(model).blocks[1].matrices[2].tensor()[3, 1] = value
    with pytest.raises(NumericsError, match=r"layers\.1"):
        secateur.prune(model, method=method, calibration=IDS)


def test_already_sparser_than_asked():
    model = tiny_model("llama")
    secateur.prune(model, method="magnitude", sparsity=0.7)
    with pytest.raises(UsageError, match="already"):
        secateur.prune(model, method="wanda", sparsity=0.5, calibration=IDS)


def test_an_existing_mask_is_extended():
    model = tiny_model("llama")
    first = secateur.prune(model, method="magnitude", scope="row", sparsity=0.3).masks
    second = secateur.prune(model, method="wanda", sparsity=0.6, calibration=IDS).masks
    for name in first:
        assert (second[name] | ~first[name]).all(), name


def test_lora_is_refused_with_a_fix():
    class Wrapped(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base_layer = base
            self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, 2, bias=False)})
            self.lora_B = nn.ModuleDict({"default": nn.Linear(2, base.out_features, bias=False)})

        def merge(self):
            """As PEFT's layers have it."""

        def forward(self, x):
            return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))

    model = tiny_model("llama")
    attention = model.model.layers[0].self_attn
    attention.q_proj = Wrapped(attention.q_proj)
    with pytest.raises(UsageError, match="merge"):
        secateur.prune(model, calibration=IDS)


def test_an_idle_expert_is_reported_not_zeroed():
    model = tiny_model("mixtral", num_local_experts=16)
    ids = IDS[:1, :3]  # six routed tokens for sixteen experts: most see none
    result = secateur.prune(model, method="sparsegpt", sparsity=0.5, calibration=ids)
    idle = [
        m for m in result.report["modules"] if any("no calibration token" in n for n in m["notes"])
    ]
    assert idle
    for module in idle:
        assert module["delivered_count"] == module["asked_count"]
        assert not result.masks[module["name"]].all()


def test_state_is_given_back_after_an_error():
    model = tiny_model("llama").train()
    model.model.embed_tokens.weight.requires_grad_(False)
    flags = [(p.requires_grad, m.training) for m in model.modules() for p in m.parameters()]
    with torch.no_grad():
        ModelView.of(model).blocks[1].matrices[0].tensor()[0, 0] = float("nan")
    with pytest.raises(NumericsError):
        secateur.prune(model, method="gblm", calibration=IDS)
    assert flags == [(p.requires_grad, m.training) for m in model.modules() for p in m.parameters()]
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert model.config.use_cache


def test_sparsity_zero_leaves_the_model_bit_identical():
    for method in ("magnitude", "wanda", "sparsegpt"):
        model = tiny_model("llama")
        before = [p.clone() for p in model.parameters()]
        secateur.prune(model, method=method, sparsity=0.0, calibration=IDS)
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_padding_from_the_caller():
    rows = [
        {"input_ids": row.tolist(), "attention_mask": [1] * (32 - 2 * i) + [0] * (2 * i)}
        for i, row in enumerate(IDS)
    ]
    result = secateur.prune(tiny_model("llama"), method="wanda", calibration=rows)
    tokens = {m["tokens"] for m in result.report["modules"]}
    assert tokens == {32 + 30 + 28 + 26}


def test_a_plan_can_be_edited_and_reused(tmp_path):
    model = tiny_model("llama")
    result = secateur.prune(model, method="magnitude", sparsity=0.5)
    path = tmp_path / "plan.json"
    modules = {
        m["name"]: {"shape": m["shape"], "removed": m["asked_count"]}
        for m in result.report["modules"]
    }
    first, second = list(modules)[:2]
    modules[first]["removed"] -= 10
    path.write_text(json.dumps({"target": "0.5", "modules": modules}))
    again = secateur.prune(
        tiny_model("llama"), method="magnitude", sparsity=0.5, allocation=str(path)
    )
    assert int(again.masks[first].sum()) == int(result.masks[first].sum()) - 10
    assert int(again.masks[second].sum()) == int(result.masks[second].sum())
    modules[first]["removed"] = 10**9
    path.write_text(json.dumps({"target": "0.5", "modules": modules}))
    with pytest.raises(UsageError, match="cannot be removed"):
        secateur.prune(tiny_model("llama"), method="magnitude", allocation=str(path))


def test_the_originals_counts_are_possible_on_request():
    """``compat="reference"`` repeats the published scripts, off-by-one included."""
    model = tiny_model("llama")
    result = secateur.prune(
        model, method="magnitude", sparsity=0.5, options={"compat": "reference"}
    )
    over = [m["delivered_count"] - m["asked_count"] for m in result.report["modules"]]
    assert all(extra >= 1 for extra in over)


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_the_originals_masks_through_a_whole_run(method):
    """Bit for bit at the sparsity that was typed, which no matrix' whole count stands for."""
    model = tiny_model("llama")
    kind = methods[method](compat="reference")
    weights, moments, hooks = {}, {}, []
    for matrix in ModelView.of(model).matrices():
        weights[matrix.name] = matrix.tensor().clone()
        sums = moments[matrix.name] = InputMoments(matrix.shape[1])
        hooks.append(
            model.get_submodule(matrix.name).register_forward_hook(
                lambda _, inputs, output, sums=sums: sums.update(inputs[0])
            )
        )
    with torch.no_grad():
        model(IDS)
    for hook in hooks:
        hook.remove()
    result = secateur.prune(
        model,
        method=method,
        sparsity=0.7,
        calibration=IDS,
        options={"compat": "reference"},
        propagate="dense",
    )
    assert set(result.masks) == set(weights)
    for name, weight in weights.items():
        score = kind.score(weight, Evidence(name, moments[name], None, len(IDS)))
        plain = Cut.of(tuple(weight.shape), Target.parse(0.7), kind.scope)
        assert torch.equal(result.masks[name], select_reference(score, plain)), name
        if method == "wanda":
            assert (result.masks[name].sum(1) == int(weight.shape[1] * 0.7)).all()


def test_more_tokens_than_positions():
    model = tiny_model("gpt2")  # learned positions: beyond them there is nothing
    with pytest.raises(UsageError, match=r"positions"):
        secateur.prune(model, tiny_tokenizer(), calibration=["rose " * 3000], length=5000)
