"""Batch norms measured again: exact statistics of the pruned network, and nothing else changed."""

import pytest
import torch
from torch import nn

from secateur.errors import NumericsError, UsageError
from secateur.training.batchnorm import recalibrate


def network():
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.5),
        nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4, momentum=0.3),
    )  # fmt: skip
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(generator=generator)
        for conv in (net[0], net[4]):
            conv.weight[conv.weight.abs() < 0.7] = 0
    batches = [torch.randn(4, 3, 6, 6, generator=generator) for _ in range(5)]
    return net.eval(), batches


def test_statistics_are_those_of_the_data():
    net, batches = network()
    zeros = [conv.weight == 0 for conv in (net[0], net[4])]
    before = {n: p.clone() for n, p in net.named_parameters()}
    assert recalibrate(net, batches) == ["1", "5"]
    # By hand: each batch is normalised by itself on its way; statistics are averaged.
    mean, var = [], []
    with torch.no_grad():
        for batch in batches:
            a = net[0](batch)
            m, v = a.mean((0, 2, 3)), a.var((0, 2, 3), unbiased=False)
            mean.append(m)
            var.append(a.var((0, 2, 3)))
    torch.testing.assert_close(net[1].running_mean, torch.stack(mean).mean(0))
    torch.testing.assert_close(net[1].running_var, torch.stack(var).mean(0))
    second = []
    with torch.no_grad():
        for batch in batches:
            a = net[0](batch)
            m, v = a.mean((0, 2, 3), keepdim=True), a.var((0, 2, 3), unbiased=False, keepdim=True)
            a = (a - m) / (v + net[1].eps).sqrt()
            a = a * net[1].weight[:, None, None] + net[1].bias[:, None, None]
            second.append(net[4](a.relu()).mean((0, 2, 3)))
    torch.testing.assert_close(net[5].running_mean, torch.stack(second).mean(0))
    assert all(torch.equal(p, before[n]) for n, p in net.named_parameters())
    assert all(
        (conv.weight[gone] == 0).all()
        for conv, gone in zip((net[0], net[4]), zeros, strict=True)
    )  # fmt: skip
    assert not any(module.training for module in net.modules())
    assert [net[1].momentum, net[5].momentum] == [0.1, 0.3]


def test_it_brings_a_shifted_network_back():
    net, batches = network()
    recalibrate(net, batches)
    wanted = net(batches[0])
    with torch.no_grad():
        net[0].weight *= 3  # what batch norms undo, if their statistics follow
        net[0].bias *= 3
    apart = (net(batches[0]) - wanted).norm()
    recalibrate(net, batches)
    assert (net(batches[0]) - wanted).norm() < 1e-2 * apart


def test_what_cannot_be_is_refused_and_changes_nothing():
    with pytest.raises(UsageError, match="no batch norms"):
        recalibrate(nn.Linear(2, 2), [torch.zeros(1, 2)])
    net, batches = network()
    recalibrate(net, batches)
    before = net[1].running_mean.clone()
    with pytest.raises(UsageError, match="no batch"):
        recalibrate(net, [])
    assert torch.equal(net[1].running_mean, before)
    with pytest.raises(NumericsError, match="not finite"):
        recalibrate(net, [batches[0] * float("nan")])
