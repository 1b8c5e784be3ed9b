"""Certificates hold: on a thousand random targets, in exact arithmetic, and against attacks."""

import itertools
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from secateur.errors import UsageError
from secateur.lottery import Box, LogTicket, certify, certify_pruning, from_module
from secateur.lottery.attack import gap_at
from secateur.lottery.certificate import FLOAT32, bound_error, float32_deviation
from secateur.lottery.folded import pruned_network
from secateur.lottery.intervals import propagate, upper_product
from secateur.lottery.philox import points


def random_chain(seed, depth=2, slope=0.0):
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 7, (depth + 1,), generator=generator).tolist()
    parts = []
    for inputs, outputs in itertools.pairwise(sizes):
        linear = nn.Linear(inputs, outputs, bias=bool(seed % 3))
        for weight in linear.parameters():
            nn.init.normal_(weight, 0, 1, generator=generator)
        parts += [linear, nn.LeakyReLU(slope) if slope else nn.ReLU()]
    return from_module(nn.Sequential(*parts[:-1])), generator


def test_a_thousand_random_targets():
    """certificate >= empirical, for real tickets of random networks on random boxes."""
    finder = LogTicket(weight_eps=0.05, refine=1)
    ratios = []
    for seed in range(1000):
        target, generator = random_chain(seed, depth=1 + seed % 3, slope=0.2 * (seed % 4 == 1))
        low = torch.randn(target.input_shape, generator=generator).double()
        high = low + torch.rand(target.input_shape, generator=generator).double()
        ticket = finder.fit(target, (low, high), seed=seed)
        folded = ticket.fold()
        x = points(seed, 24, low, high)
        corner = torch.where(x[:12] > (low + high) / 2, high, low)
        worst = float(gap_at(folded, torch.cat([x, corner])).max())
        bound = float(propagate(folded, ticket.box).error.max())
        assert 0 <= worst <= bound
        if seed % 10 == 0:
            tight = float(bound_error(folded, ticket.box, "zonotope").max())
            assert worst <= tight <= bound
        ratios.append(worst / max(bound, 1e-300))
    assert max(ratios) > 0.3  # the bound is not idle


@given(seed=st.integers(0, 10_000), depth=st.integers(1, 4), slope=st.sampled_from([0.0, 0.3]))
@settings(max_examples=60, deadline=None)
def test_pruning_is_certified(seed, depth, slope):
    target, generator = random_chain(seed, depth, slope)
    matrices = [
        layer.matrix * (torch.rand(layer.matrix.shape, generator=generator) > 0.3)
        for layer in target.layers
    ]
    box = Box.of((-1, 2), target.input_shape)
    network = pruned_network(target, matrices)
    interval, zonotope = (bound_error(network, box, m) for m in ("interval", "zonotope"))
    x = points(seed, 60, box.low, box.high)
    gap = (network.forward(x) - target.forward(x)).abs().amax(0).reshape(-1)
    assert bool((gap <= zonotope + 1e-12).all())  # the gap itself is rounded
    assert bool((zonotope <= interval).all())


def test_a_leaky_slope_keeps_its_float64_digits():
    """A slope rounded to float32 once made this bound too small by 1e-8."""
    target, generator = random_chain(481, 2, 0.3)
    matrices = [
        layer.matrix * (torch.rand(layer.matrix.shape, generator=generator) > 0.3)
        for layer in target.layers
    ]
    network = pruned_network(target, matrices)
    box = Box.of((-1, 2), target.input_shape)
    found = certify(network, box, method="zonotope")
    assert found.empirical <= found.bound


def test_one_layer_is_bounded_exactly():
    """A single affine layer on a box: the sup error is attained at a corner."""
    torch.manual_seed(0)
    target = from_module(nn.Sequential(nn.Linear(5, 3)))
    pruned = [target.layers[0].matrix * torch.tensor([1, 0, 1, 1, 0, 1])]
    box = Box.of((0, 1), (5,))
    corners = torch.tensor(list(itertools.product((0.0, 1.0), repeat=5))).double()
    network = pruned_network(target, pruned)
    exact = (network.forward(corners) - target.forward(corners)).abs().max()
    tight = float(bound_error(network, box, "zonotope").max())
    assert tight == pytest.approx(float(exact), rel=1e-9)
    assert tight >= float(exact)


def test_rounding_goes_outward():
    """The helper's result is never below the exact rational value, on hard cases."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(40):
        matrix = torch.rand(2, 30, generator=generator).double() ** 20
        x = torch.rand(30, generator=generator).double() * 10.0 ** float(
            torch.randint(-30, 30, (1,), generator=generator)
        )
        upper = upper_product(matrix, x)
        for row, value in zip(matrix.tolist(), upper.tolist(), strict=True):
            exact = sum(Fraction(a) * Fraction(b) for a, b in zip(row, x.tolist(), strict=True))
            assert Fraction(value) >= exact


def test_exact_rational_evaluation_stays_inside():
    """The bound holds for the exact ticket (rational arithmetic), not just for its float64 image."""
    target, _ = random_chain(7)
    ticket = LogTicket(weight_eps=0.01).fit(target, (-1, 1), seed=7)
    layers = []
    for number, (layer, kept) in enumerate(zip(target.layers, ticket.layers, strict=True)):
        a = kept.in_weights(ticket.seed, number, layer).tolist()
        b = kept.out_weights(ticket.seed, number, layer).tolist()
        layers.append(list(zip(kept.output, kept.column, a, b, strict=True)))

    def exact(x, layers_of, columns_of):
        for number, layer in enumerate(target.layers):
            t = [*x, Fraction(1)] if layer.bias else list(x)
            y = layers_of(number, layer, t)
            x = [max(v, Fraction(0)) if layer.slope == 0 else v for v in y]
        return x

    def of_ticket(number, layer, t):
        y = [Fraction(0)] * layer.matrix.shape[0]
        for output, column, a, b in layers[number]:
            y[output] += Fraction(b) * max(Fraction(a) * t[column], Fraction(0))
        return y

    def of_target(number, layer, t):
        return [
            sum(Fraction(w) * v for w, v in zip(row, t, strict=True))
            for row in layer.matrix.tolist()
        ]

    bound = Fraction(float(propagate(ticket.fold(), ticket.box).error.max()))
    for point in points(3, 6, ticket.box.low, ticket.box.high).tolist():
        x = [Fraction(v) for v in point]
        one, two = exact(x, of_ticket, None), exact(x, of_target, None)
        assert max(abs(p - q) for p, q in zip(one, two, strict=True)) <= bound


def test_the_certificate_vanishes_with_eps(small_net):
    bounds = [
        certify(LogTicket(weight_eps=e).fit(small_net, (-1, 1)), starts=2, samples=4).bound
        for e in (1e-1, 1e-3, 1e-5, 1e-7)
    ]
    assert bounds == sorted(bounds, reverse=True)
    assert bounds[-1] < 1e-5


def test_attack_attains_what_it_reports(digits, digits_net):
    ticket = LogTicket(weight_eps=1e-2).fit(digits_net, (0, 1))
    certificate = certify(ticket, data=digits.x_test)
    folded = ticket.fold()
    value = float(gap_at(folded, certificate.witness[None])[0])
    assert value * (1 - 1e-9) <= certificate.empirical <= value
    worst = float(gap_at(folded, digits.x_test.double()).max())
    assert certificate.empirical >= worst * (1 - 1e-9)
    tight = certify(ticket, method="zonotope").bound
    assert certificate.empirical <= tight < 0.6 * certificate.bound


@pytest.mark.parametrize("change", [0.0, 1e-300, 1e-18, 2.0**-52, 1e-9])
def test_the_witness_is_rounded_down(change):
    """What was found is attained in exact arithmetic, and never exceeds even a near-zero bound."""
    for seed in range(30):
        target, generator = random_chain(seed, depth=1 + seed % 3, slope=0.25 * (seed % 2))
        matrices = [
            layer.matrix + change * torch.randn(layer.matrix.shape, generator=generator).double()
            for layer in target.layers
        ]
        found = certify_pruning(target, matrices, (-1, 2))
        assert found.empirical <= found.bound
        if change == 0:
            assert found.empirical == 0
        one, two = (
            exact_run(layers, target, found.witness)
            for layers in (matrices, [layer.matrix for layer in target.layers])
        )
        assert max(abs(p - q) for p, q in zip(one, two, strict=True)) >= Fraction(found.empirical)


def exact_run(matrices, target, witness):
    """The network's output in rational arithmetic."""
    x = [Fraction(v) for v in witness.tolist()]
    for matrix, layer in zip(matrices, target.layers, strict=True):
        t = [*x, Fraction(1)] if layer.bias else x
        y = [sum(Fraction(w) * v for w, v in zip(row, t, strict=True)) for row in matrix.tolist()]
        x = [v if v >= 0 else v * Fraction(layer.slope) for v in y]
    return x


def test_underflow_is_in_the_float32_bound():
    """Inputs so small that float32 products vanish: the run is off by everything, and covered."""
    target = from_module(nn.Sequential(nn.Linear(6, 4, bias=False)))
    box = (0.0, 1e-42)
    ticket = LogTicket(weight_eps=1e-2).fit(target, box)
    certificate = certify(ticket, samples=64)
    assert 0 < certificate.float32_measured <= certificate.float32_bound
    relative_only = float(propagate(ticket.fold(), ticket.box, FLOAT32[0]).error.max())
    assert certificate.float32_measured > relative_only - certificate.bound


def test_float32_runs_stay_within_their_bound(digits_net):
    ticket = LogTicket(weight_eps=1e-4).fit(digits_net, (0, 1))
    certificate = certify(ticket, samples=200)
    drift = float32_deviation(ticket, ticket.fold(), ticket.box, samples=200)
    assert 0 < drift == certificate.float32_measured
    assert drift <= certificate.float32_bound
    assert certificate.bound < certificate.float32_bound


def test_the_same_network_has_no_error(digits_net):
    assert certify_pruning(digits_net, digits_net, (0, 1), method="zonotope").bound < 1e-290


def test_bad_requests(small_net, digits_net):
    with pytest.raises(UsageError, match="architecture"):
        certify_pruning(small_net, digits_net, (0, 1))
    with pytest.raises(UsageError, match="method"):
        certify_pruning(small_net, small_net, (0, 1), method="guess")
    with pytest.raises(UsageError, match="domain"):
        certify(pruned_network(small_net, [x.matrix for x in small_net.layers]))
    with pytest.raises(UsageError, match="shape"):
        certify_pruning(small_net, small_net, Box.of((0, 1), (3,)))
    matrices = [layer.matrix for layer in small_net.layers]
    for wrong in (matrices[:1], [matrices[0][:, :1], matrices[1]]):
        with pytest.raises(UsageError, match="one matrix"):
            certify_pruning(small_net, wrong, (0, 1))
    with pytest.raises(UsageError, match="finite"):
        certify_pruning(small_net, [matrices[0] * float("nan"), matrices[1]], (0, 1))
