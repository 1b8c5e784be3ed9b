"""One set of weights, two executions: both are the sliced network when gates are 0 and 1."""

import copy

import pytest
import torch
from channel_cases import CASES, network, some_gone
from torch import nn

from secateur.models.channel_graph import channel_groups
from secateur.models.channel_surgery import shrink_channels
from secateur.models.dual_path import DualPath, filter_norms


def prepared(name):
    model, example = network(name)
    groups = channel_groups(model, example)
    images = torch.randn(3, *example.shape[1:], generator=torch.Generator().manual_seed(1))
    gone = some_gone(groups)
    return model, groups, images, gone, {key: ~units for key, units in gone.items()}


@pytest.mark.parametrize("name", sorted(CASES))
@torch.no_grad()
def test_gates_of_zero_and_one_are_the_sliced_network(name):
    model, groups, images, gone, kept = prepared(name)
    paths = DualPath(model, groups)
    before = model(images)
    cut = copy.deepcopy(model)
    shrink_channels(cut, groups, gone)
    gates = {key: units.float() for key, units in kept.items()}
    for training in (False, True):
        cut.train(training)
        model.train(training)
        state = copy.deepcopy(model.state_dict())
        wanted = cut(images)
        hard = paths.hard(kept, images)
        model.load_state_dict(state)
        with paths.soft(gates):
            soft = model(images)
        model.load_state_dict(state)
        if name == "einsum":  # it gets other strides, so another order of sums
            torch.testing.assert_close(hard, wanted, rtol=1e-6, atol=1e-6)
        else:
            assert torch.equal(hard, wanted)
        assert torch.allclose(soft, wanted, atol=2e-5)
        assert not torch.allclose(before, wanted, atol=1e-3)
    model.eval()
    assert torch.equal(model(images), before)  # nothing stays behind
    with paths.soft({key: torch.ones(len(units)) for key, units in kept.items()}):
        assert torch.allclose(model(images), before, atol=2e-5)


@pytest.mark.parametrize("name", ["resnet", "vit", "gated mobilenet"])
def test_what_is_sliced_off_learns_nothing_from_the_hard_network(name):
    model, groups, images, gone, kept = prepared(name)
    paths = DualPath(model, groups)
    paths.hard(kept, images).square().sum().backward()
    parameters = dict(model.named_parameters())
    for key, units in gone.items():
        group = next(g for g in groups if g.key == key)
        for part in group.slices:
            if part.parameter in parameters:
                grad = parameters[part.parameter].grad
                off = part.index[units].reshape(-1)
                assert not grad.index_select(part.dim, off).any()
    assert all(p.grad is not None and bool(p.grad.any()) for p in [next(model.parameters())])


def test_gates_have_the_gradient_of_a_factor():
    model, groups, images, _, _ = prepared("mobilenet")
    model.double()
    paths = DualPath(model, groups)
    generator = torch.Generator().manual_seed(3)
    gates = {
        g.key: torch.rand(g.n_units, generator=generator, dtype=torch.float64)
        for g in groups.prunable
    }
    key = groups.prunable[1].key
    direction = torch.randn(len(gates[key]), generator=generator, dtype=torch.float64)

    def value(t):
        with paths.soft({**gates, key: gates[key] + t * direction}):
            return model(images.double()).square().sum()

    t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(value(t), t)
    with torch.no_grad():
        wanted = (value(torch.tensor(1e-5)) - value(torch.tensor(-1e-5))) / 2e-5
    assert abs(float(slope - wanted)) < 1e-5 * abs(float(wanted))


def test_units_are_ranked_by_the_mean_norm_of_their_filters():
    net = nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 1))
    groups = channel_groups(net, torch.zeros(1, 2, 5, 5))
    norms = filter_norms(net, groups["0"])
    assert torch.allclose(norms, net[0].weight.detach().abs().sum((1, 2, 3)))
    model, groups, *_ = prepared("resnet")
    stage = max(groups.prunable, key=lambda g: len(g.producers))
    layers = [model.get_submodule(name).weight.detach() for name in stage.producers]
    assert len(layers) > 1
    wanted = torch.stack([w.abs().sum((1, 2, 3)) for w in layers]).mean(0)
    assert torch.allclose(filter_norms(model, stage), wanted, rtol=1e-5)


class Buffered(nn.Module):
    """Channels are scaled by a buffer, and its batch norm never measures."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3)
        self.bn = nn.BatchNorm2d(8)
        self.register_buffer("scale", torch.linspace(0.5, 1.5, 8)[:, None, None])
        self.last = nn.Linear(8, 4)
        self.bn.running_var = torch.linspace(0.5, 4.0, 8)

    def train(self, mode=True):
        super().train(mode)
        self.bn.eval()
        return self

    def forward(self, x):
        return self.last(torch.relu(self.bn(self.conv(x)) * self.scale).mean((2, 3)))


@torch.no_grad()
def test_the_hard_network_has_the_buffers_of_the_units_it_keeps():
    torch.manual_seed(0)
    model, images = Buffered().train(), torch.randn(3, 1, 6, 6)
    groups = channel_groups(model, images[:1])
    paths, before = DualPath(model, groups), copy.deepcopy(model.state_dict())
    for kept in (torch.arange(8) < 3, torch.arange(8) >= 5):  # as many, but others
        cut = copy.deepcopy(model)
        shrink_channels(cut, groups, {"conv": ~kept})
        assert torch.equal(paths.hard({"conv": kept}, images), cut(images))
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
