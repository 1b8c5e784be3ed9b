"""Edge-popup: the mask learns, the weights do not move."""

import pytest
import torch
from torch import nn

from secateur.errors import UsageError
from secateur.lottery.edge_popup import EdgePopup, shuffle_masks
from secateur.lottery.targets import mlp
from secateur.masks.scored import TopK, masked_layers


def accuracy(digits, model):
    with torch.no_grad():
        return digits.accuracy(model(digits.x_test))


def weights_of(model):
    return [part.weight.clone() for part in masked_layers(model)]


@pytest.fixture(scope="module")
def trained(digits):
    finder = EdgePopup(keep=0.5, epochs=12)
    fresh = finder.convert(mlp((64, 128, 10)))
    model = finder.fit(mlp((64, 128, 10)), digits.x_train, digits.y_train)
    return finder, fresh, model


def test_a_trained_mask_beats_chance_and_random_masks(digits, trained):
    _, fresh, model = trained
    learnt = accuracy(digits, model)
    shuffle_masks(fresh, 5)
    assert learnt > 0.85
    assert learnt > accuracy(digits, fresh) + 0.4


def test_weights_are_frozen_bit_for_bit(trained):
    _, fresh, model = trained
    before, after = weights_of(fresh), weights_of(model)
    assert all(torch.equal(one, two) for one, two in zip(before, after, strict=True))
    assert {name.rsplit(".", 1)[-1] for name, _ in model.named_parameters()} == {"scores"}


def test_exactly_the_kept_fraction_survives(trained):
    _, _, model = trained
    for part in masked_layers(model):
        assert int(part.mask().sum()) == part.weight.numel() // 2
        assert set(part.weight.abs().flatten().tolist()) == {float(part.weight.abs().max())}


def test_keep_all_and_keep_almost_none_degrade(digits, trained):
    learnt = accuracy(digits, trained[2])
    for keep in (1.0, 0.0005):
        model = EdgePopup(keep=keep, epochs=3).fit(
            mlp((64, 128, 10)), digits.x_train, digits.y_train
        )
        assert accuracy(digits, model) < learnt - 0.3


def test_the_gradient_passes_straight_through():
    scores = torch.tensor([-3.0, 1.0, -2.0, 0.5], requires_grad=True)
    weight = torch.tensor([1.0, -2.0, 3.0, 4.0])
    mask = TopK.apply(scores.abs(), 2)
    assert mask.tolist() == [1, 0, 1, 0]
    (weight * mask * torch.tensor([1.0, 1.0, 2.0, 3.0])).sum().backward()
    # dL/ds = dL/dw_eff * w * sign(s), for kept and removed weights alike
    assert scores.grad.tolist() == [-1.0, -2.0, -6.0, 12.0]


def test_keep_and_sparsity_are_the_same_thing_said_twice():
    assert EdgePopup(keep=0.3).kept_of(1000) == EdgePopup(sparsity=0.7).kept_of(1000) == 300
    assert EdgePopup(keep=0.001).kept_of(10) == 1


def test_convolutions_and_norms_are_converted():
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2)
    )
    masked = EdgePopup(keep=0.5, init="kaiming", scale_fan=False).convert(model)
    assert masked(torch.rand(3, 1, 4, 4)).shape == (3, 2)
    assert [type(p).__name__ for p in masked_layers(masked)] == ["MaskedConv2d", "MaskedLinear"]
    assert not any("bias" in name for name, _ in masked.named_parameters())


@pytest.mark.parametrize(
    "options",
    [{}, {"keep": 0.5, "sparsity": 0.5}, {"keep": 0}, {"keep": 1.5}, {"sparsity": 1.0},
     {"keep": 0.5, "init": "zeros"}],
)  # fmt: skip
def test_bad_options(options):
    with pytest.raises(UsageError):
        EdgePopup(**options)


def test_modules_without_a_masked_form_are_refused():
    with pytest.raises(UsageError, match="LSTM"):
        EdgePopup(keep=0.5).convert(nn.Sequential(nn.LSTM(3, 3)))
