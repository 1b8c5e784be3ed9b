"""One matrix over everything: every method prunes every family exactly, in its own default way."""

import pytest
import torch

import secateur
from secateur.methods import Method, methods
from secateur.models.anatomy import ModelView
from secateur.models.tiny import FAMILIES, VOCABULARY, tiny_model
from secateur.testing import check_method

WEIGHT_METHODS = [name for name in methods.names() if issubclass(methods[name], Method)]
IDS = torch.randint(4, VOCABULARY, (4, 24), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("target", [0.5, "2:4"])
@pytest.mark.parametrize("method", WEIGHT_METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_method_on_every_family(family, method, target):
    model = tiny_model(family)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    result = secateur.prune(model, method=method, sparsity=target, calibration=IDS)
    view = ModelView.of(model)
    matrices = {m.name: m for m in view.matrices()}
    assert set(result.masks) == set(matrices)
    gone = 0
    for name, mask in result.masks.items():
        weight = matrices[name].tensor()
        assert mask.shape == weight.shape
        assert (weight[mask] == 0).all(), name
        if target == "2:4":
            assert (mask.reshape(mask.shape[0], -1, 4).sum(-1) == 2).all(), name
        gone += int(mask.sum())
    elements = sum(m.numel() for m in result.masks.values())
    assert gone == elements // 2 == result.report["totals"]["zeros"]
    touched = {m.key for m in view.matrices()}
    for key, value in model.state_dict().items():
        assert key in touched or torch.equal(value, before[key]), f"{key} was changed"
    with torch.no_grad():
        assert torch.isfinite(model(input_ids=IDS).logits).all()
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("method", WEIGHT_METHODS)
def test_the_contract_holds(method):
    check_method(methods[method]())


@pytest.mark.parametrize("update", ["none", "obs", "exact", "best"])
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_update_is_an_orthogonal_choice(method, update):
    model = tiny_model("llama")
    dense = {m.name: m.tensor().clone() for m in ModelView.of(model).matrices()}
    result = secateur.prune(model, method=method, sparsity=0.5, calibration=IDS, update=update)
    changed = any(
        not torch.equal(m.tensor()[~result.masks[m.name]], dense[m.name][~result.masks[m.name]])
        for m in ModelView.of(model).matrices()
    )
    assert changed == (update != "none")


@pytest.mark.parametrize(
    "settings",
    [
        {"propagate": "dense"},
        {"granularity": "true_sequential"},
        {"reconstruct": "dense", "update": "exact"},
        {"reconstruct": "dense", "granularity": "true_sequential", "update": "obs"},
        {"scope": "global"},
        {"scope": "layer"},
        {"scope": "block:16"},
        {"exclude": ["*down_proj"]},
        {"include": ["*.mlp.*"]},
    ],
)
def test_ways_to_walk(settings):
    model = tiny_model("llama")
    result = secateur.prune(model, method="sparsegpt", sparsity=0.6, calibration=IDS, **settings)
    totals = result.report["totals"]
    assert totals["zeros"] == round(0.6 * totals["elements"])


def test_the_first_block_has_nothing_to_catch_up_with():
    """With nothing pruned before, fitting to the dense stream is fitting to the block itself."""
    a, b = tiny_model("llama"), tiny_model("llama")
    secateur.prune(a, method="sparsegpt", sparsity=0.5, calibration=IDS)
    secateur.prune(b, method="sparsegpt", sparsity=0.5, calibration=IDS, reconstruct="dense")
    first = [
        torch.allclose(x.tensor(), y.tensor(), atol=1e-4)
        for x, y in zip(ModelView.of(a).matrices(), ModelView.of(b).matrices(), strict=True)
    ]
    per_block = len(first) // 2
    assert all(first[:per_block])
    assert not all(first[per_block:])
