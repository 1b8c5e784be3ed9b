"""Every construction on every kind of target: accuracy, honesty, and only original weights."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from secateur.errors import NumericsError, SecateurError, UsageError
from secateur.lottery import (
    CopyTicket,
    LogTicket,
    MalachTicket,
    MaskedNetwork,
    SubsetSumTicket,
    certify,
    dense_layers,
    from_module,
)
from secateur.lottery.intervals import propagate
from secateur.lottery.philox import points
from secateur.lottery.targets import he_mlp
from secateur.progress import Progress

EPS = 0.02
FINDERS = {
    "shared": LogTicket(weight_eps=EPS),
    "greedy": LogTicket(weight_eps=EPS, refine=1),
    "base 3/2": LogTicket(weight_eps=EPS, base="3/2"),
    "independent": LogTicket(weight_eps=EPS, pools="independent"),
    "batch": LogTicket(weight_eps=EPS, pools="batch"),
    "matching": LogTicket(weight_eps=EPS, pools="matching"),
    "uniform law": LogTicket(weight_eps=EPS, law="uniform"),
    "normal law": LogTicket(weight_eps=EPS, law="normal", pools="independent"),
    "subset sum": SubsetSumTicket(weight_eps=EPS),
    "subset sum, exact": SubsetSumTicket(weight_eps=EPS, products=12, exact=True, law="normal"),
    "product": MalachTicket(weight_eps=EPS),
    "product, shared": MalachTicket(weight_eps=EPS, pools="shared"),
    "factors": MalachTicket(weight_eps=4 * EPS, match="factors"),
    "copies": CopyTicket(weight_eps=EPS),
}
DOMAINS = {"unit": (0, 1), "signed": (-1, 1), "negative": (-2, -0.5)}


class Notes(Progress):
    def __init__(self):
        self.said = []

    def note(self, message):
        self.said.append(message)


def weight_errors(ticket):
    return [layer.weight_error for layer in propagate(ticket.fold(), ticket.box).layers]


@pytest.mark.parametrize("domain", DOMAINS.values(), ids=DOMAINS)
@pytest.mark.parametrize("finder", FINDERS.values(), ids=FINDERS)
def test_weights_are_met_and_the_masked_network_computes_them(finder, domain, small_net):
    ticket = finder.fit(small_net, domain, seed=5)
    ticket.check()
    asked = finder.weight_eps
    assert all(error <= asked * (1 + 1e-9) for error in weight_errors(ticket))
    x = points(1, 40, ticket.box.low, ticket.box.high)
    folded = ticket.fold().forward(x)
    assert torch.allclose(MaskedNetwork(ticket).run(x), folded, atol=1e-10)
    certificate = certify(ticket, starts=6, samples=16)
    assert 0 <= certificate.empirical <= certificate.bound
    gap = (folded - small_net.forward(x)).abs().max()
    assert float(gap) <= certificate.bound


@pytest.mark.parametrize("name", ["shared", "batch", "subset sum", "product, shared"])
def test_only_original_random_values_survive(name, small_net):
    """The defining property, bit for bit: the kept weights are the random network's own."""
    ticket = FINDERS[name].fit(small_net, (-1, 1), seed=8)
    other = FINDERS[name].fit(small_net, (-1, 1), seed=9)
    network = MaskedNetwork(ticket)
    again = dense_layers(ticket)
    for whole, masked, kept in zip(again, network.parts(), ticket.layers, strict=True):
        assert (whole.in_mask.sum(1) <= 1).all()
        # The sparse network holds exactly the dense random network's values on the mask ...
        own = whole.out_weight[whole.out_mask].view(torch.int32).sort().values
        assert torch.equal(masked.out_weight.view(torch.int32).sort().values, own)
        live = whole.in_mask & whole.out_mask.any(0)[:, None]
        assert torch.equal(
            masked.in_weight.view(torch.int32).sort().values,
            whole.in_weight[live].view(torch.int32).sort().values,
        )
        assert int(whole.out_mask.sum()) == len(kept.output)
    # ... and those values do not depend on the mask, only on the seed.
    assert not torch.equal(again[0].out_weight, dense_layers(other)[0].out_weight)
    x = points(2, 20, ticket.box.low, ticket.box.high)
    y = x
    for layer, whole in zip(ticket.target.layers, again, strict=True):
        hidden = (layer.columns(y) @ (whole.in_weight * whole.in_mask).double().T).relu()
        y = layer.activate((hidden @ (whole.out_weight * whole.out_mask).double().T)[:, 0])
    assert torch.allclose(y, ticket.fold().forward(x), atol=1e-12)


def test_leaky_relu_convolution_and_batch_norm():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3, stride=2, padding=1),
        nn.BatchNorm2d(3),
        nn.LeakyReLU(0.2),
        nn.Conv2d(3, 2, (1, 2), bias=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(2 * 4 * 2, 4),
    )
    model[1].running_mean.uniform_(-1, 1)
    model[1].running_var.uniform_(0.5, 2)
    model.eval()
    target = from_module(model, (2, 7, 5))
    x = torch.rand(9, 2, 7, 5)
    with torch.no_grad():
        assert torch.allclose(target.forward(x.double()).float(), model(x), atol=1e-5)
    for finder in (LogTicket(weight_eps=0.01), SubsetSumTicket(weight_eps=0.01)):
        ticket = finder.fit(target, (-1, 1), seed=1)
        assert max(weight_errors(ticket)) <= 0.01
        points_in = points(4, 6, ticket.box.low, ticket.box.high)
        masked = MaskedNetwork(ticket).run(points_in)
        assert torch.allclose(masked, ticket.fold().forward(points_in), atol=1e-10)
        for method in ("interval", "zonotope"):
            certificate = certify(ticket, method=method, starts=4, samples=8)
            assert certificate.empirical <= certificate.bound


@pytest.mark.parametrize("slope", [0.01, 0.3, 0.9])
def test_leaky_targets_on_signed_inputs(slope):
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Linear(4, 5), nn.LeakyReLU(slope), nn.Linear(5, 5), nn.LeakyReLU(slope), nn.Linear(5, 2)
    )
    for finder in (LogTicket(weight_eps=EPS), CopyTicket(weight_eps=EPS)):
        ticket = finder.fit(model, (-1, 1), seed=2)
        assert max(weight_errors(ticket)) <= EPS * (1 + 1e-9)
        x = points(3, 30, ticket.box.low, ticket.box.high)
        assert torch.allclose(MaskedNetwork(ticket).run(x), ticket.fold().forward(x), atol=1e-10)


def test_copies_keep_to_eps(small_net):
    ticket = CopyTicket(eps=0.5).fit(small_net, (-1, 1))
    assert float(propagate(ticket.fold(), ticket.box).error.max()) <= 0.5 * (1 + 1e-9)


class TestCorners:
    def fit(self, matrix, finder=None, domain=(0, 1)):
        linear = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False)
        linear.weight.data.copy_(matrix)
        return (finder or LogTicket(weight_eps=1e-3)).fit(nn.Sequential(linear), domain)

    def test_identity(self):
        ticket = self.fit(torch.eye(4), domain=(-1, 1))
        x = torch.eye(4).double()
        assert torch.allclose(ticket.fold().forward(x), x, atol=1e-3)

    @pytest.mark.parametrize("name", FINDERS)
    def test_zero_weights_keep_nothing(self, name):
        ticket = self.fit(torch.zeros(3, 2), FINDERS[name])
        assert ticket.size().kept == 0
        assert certify(ticket, starts=2, samples=4).bound < 1e-290

    @pytest.mark.parametrize("weight", [1.0, -1.0, 3e-4, 1e6, -1e-12])
    def test_one_weight(self, weight):
        finder = LogTicket(weight_eps=max(abs(weight) * 1e-3, 1e-15))
        ticket = self.fit(torch.tensor([[weight]]), finder)
        folded = ticket.fold().layers[0].positive
        true = ticket.target.layers[0].matrix
        assert float((folded - true).abs()) <= finder.weight_eps

    def test_weights_below_eps_may_vanish(self):
        ticket = self.fit(torch.full((2, 2), 1e-5), LogTicket(weight_eps=1e-2))
        assert max(weight_errors(ticket)) <= 1e-2

    def test_inputs_that_are_always_zero_need_no_neurons(self):
        finder = LogTicket(weight_eps=1e-3)
        matrix = torch.tensor([[1.0, -0.5]])
        low, high = torch.tensor([0.0, 0.0]), torch.tensor([0.0, 1.0])
        ticket = self.fit(matrix, finder, (low, high))
        assert set(ticket.layers[0].column.tolist()) == {1}

    def test_a_very_small_eps(self):
        ticket = self.fit(torch.tensor([[0.3, -0.9]]), LogTicket(weight_eps=1e-10))
        assert max(weight_errors(ticket)) <= 1e-10


@pytest.mark.parametrize("rule", ["theorem", "box", "actual"])
def test_eps_is_kept_and_proved(rule, digits_net):
    ticket = LogTicket(eps=0.5, eps_rule=rule).fit(digits_net, (0, 1))
    certificate = certify(ticket, starts=4, samples=32)
    assert certificate.empirical <= certificate.bound <= 0.5
    if rule == "actual":
        assert certificate.bound > 0.1  # not needlessly exact


def test_accuracy_of_the_digits_ticket(digits, digits_net):
    ticket = LogTicket(weight_eps=1e-2).fit(digits_net, (0, 1))
    dense = digits.accuracy(digits_net.forward(digits.x_test.double()))
    sparse = digits.accuracy(MaskedNetwork(ticket).run(digits.x_test))
    assert dense > 0.9
    assert abs(dense - sparse) < 0.02


def test_sizes_are_ordered_as_the_theory_says(digits_net):
    """subset sum < matching < shared < independent << Malach, random neurons at equal error."""
    order = [
        SubsetSumTicket(weight_eps=1e-2),
        LogTicket(weight_eps=1e-2, pools="matching"),
        LogTicket(weight_eps=1e-2),
        LogTicket(weight_eps=1e-2, pools="independent"),
    ]
    sizes = [finder.fit(digits_net, (0, 1)).size().neurons for finder in order]
    sizes.append(MalachTicket(weight_eps=1e-2).estimate(digits_net).neurons)
    assert sizes == sorted(sizes)
    assert sizes[-1] > 5 * sizes[-2]


@pytest.mark.parametrize("name", ["shared", "batch", "subset sum", "product", "copies"])
def test_the_estimate_is_the_size(name, small_net):
    finder = FINDERS[name]
    ticket = finder.fit(small_net, (-1, 1), seed=0)
    estimate, size = finder.estimate(small_net, (-1, 1)), ticket.size()
    if not any(r["grown_pools"] for r in ticket.history["layers"]) and name != "copies":
        assert (estimate.neurons, estimate.random) == (size.neurons, size.random)
    assert size.neurons >= estimate.neurons


@pytest.mark.parametrize("name", FINDERS)
def test_the_same_seed_gives_the_same_ticket(name, small_net):
    first, second = (FINDERS[name].fit(small_net, (-1, 1), seed=3) for _ in range(2))
    for one, two in zip(first.layers, second.layers, strict=True):
        assert np.array_equal(one.neuron, two.neuron)
        assert np.array_equal(one.sizes, two.sizes)


@pytest.mark.parametrize("name", ["shared", "subset sum", "product"])
def test_engines_find_the_same_ticket(name, small_net):
    pytest.importorskip("numba")
    import dataclasses

    tickets = [
        dataclasses.replace(FINDERS[name], engine=engine).fit(small_net, (-1, 1), seed=3)
        for engine in ("compiled", "torch")
    ]
    for one, two in zip(*(t.layers for t in tickets), strict=True):
        assert np.array_equal(one.neuron, two.neuron)
        assert np.array_equal(one.output, two.output)


def test_failures_stay_below_delta(small_net):
    """B6: over 200 seeds at most delta (and three sigma) of the first pools have an empty slot."""
    runs, delta = 200, 0.1
    finder = LogTicket(weight_eps=1e-2, delta=delta, refine=1, growth=0, on_failure="accept")
    empty = sum(
        any(r["empty_slots"] for r in finder.fit(small_net, seed=s).history["layers"])
        for s in range(runs)
    )
    assert empty / runs <= delta + 3 * math.sqrt(delta * (1 - delta) / runs)


class _Starved(LogTicket):
    """Pools of a tenth of the size they should have."""

    def plan(self, task, tasks, plans):
        import dataclasses

        plan = super().plan(task, tasks, plans)
        return dataclasses.replace(plan, size=plan.size // 10)


class TestFailureIsNeverSilent:
    def test_pools_grow_and_say_so(self, small_net):
        notes = Notes()
        ticket = _Starved(weight_eps=1e-3, refine=1).fit(small_net, progress=notes)
        assert any("enlarging" in line for line in notes.said)
        assert sum(r["grown_pools"] for r in ticket.history["layers"]) > 0
        assert max(weight_errors(ticket)) <= 1e-3

    def test_without_growth_it_raises(self, small_net):
        with pytest.raises(SecateurError, match="weights are further"):
            _Starved(weight_eps=1e-3, refine=1, growth=0).fit(small_net)

    @pytest.mark.parametrize(("seed", "attempts"), [(0, 1), (1, 4)])
    def test_copies_grow_where_pools_do_not_do(self, seed, attempts):
        """Pools in front of the first layer grow alone; too few copies redo the network."""
        ticket = CopyTicket(weight_eps=1e-3, copies=14).fit(he_mlp((30, 4, 1)), seed=seed)
        assert ticket.history["layers"][0]["grown_pools"] > 0
        assert ticket.history["attempts"] == attempts
        assert ticket.history["copies"] == 14 + 2 * (attempts - 1) == ticket.layers[0].copies
        bound = [layer.weight_error for layer in propagate(ticket.fold(), ticket.box).layers]
        assert max(bound) <= 1e-3 * (1 + 1e-9)

    def test_accepting_is_recorded_and_certified(self, small_net):
        finder = _Starved(weight_eps=1e-3, refine=1, growth=0, on_failure="accept")
        notes = Notes()
        ticket = finder.fit(small_net, progress=notes)
        assert any("accepted" in line for line in notes.said)
        assert sum(r["failed_weights"] for r in ticket.history["layers"]) > 0
        assert max(weight_errors(ticket)) > 1e-3
        certificate = certify(ticket, starts=4, samples=8)
        assert certificate.empirical <= certificate.bound


class TestBadInput:
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"eps": 0.1, "weight_eps": 0.1},
            {"eps": 0},
            {"eps": -1.0},
            {"eps": math.inf},
            {"eps": "small"},
            {"weight_eps": math.nan},
            {"eps": 0.1, "delta": 0},
            {"eps": 0.1, "delta": 1},
            {"eps": 0.1, "pools": "private"},
            {"eps": 0.1, "law": "cauchy"},
            {"eps": 0.1, "law": "uniform", "pools": "batch"},
            {"eps": 0.1, "refine": 0},
            {"eps": 0.1, "base": 2},
            {"eps": 0.1, "on_failure": "ignore"},
            {"eps": True},
            {"eps": 0.1, "delta": "low"},
            {"eps": 0.1, "eps_rule": "guess"},
            {"eps": 0.1, "engine": "gpu"},
            {"eps": 0.1, "growth": -1},
            {"eps": 0.1, "growth": 1.5},
            {"eps": 0.1, "growth": "4"},
            {"eps": 0.1, "memory_limit": 0},
            {"eps": 0.1, "draw_limit": "many"},
            {"eps": 0.1, "refine": 2.0},
            {"eps": 0.1, "refine": True},
            {"eps": 0.1, "pools": ["shared"]},
        ],
    )
    def test_options(self, options):
        with pytest.raises(UsageError):
            LogTicket(**options)

    def test_options_of_the_others(self):
        for kind, options in (
            (SubsetSumTicket, {"products": 0}),
            (SubsetSumTicket, {"products": 99}),
            (SubsetSumTicket, {"law": "hyperbolic"}),
            (MalachTicket, {"match": "both"}),
            (MalachTicket, {"pools": "batch"}),
            (CopyTicket, {"copies": 0}),
            (CopyTicket, {"copies": 15.0}),
            (SubsetSumTicket, {"products": "21"}),
            (SubsetSumTicket, {"exact": "yes"}),
            (MalachTicket, {"match": None}),
        ):
            with pytest.raises(UsageError):
                kind(eps=0.1, **options)

    @pytest.mark.parametrize(
        "model",
        [
            nn.Sequential(nn.Linear(3, 3), nn.GELU(), nn.Linear(3, 1)),
            nn.Sequential(nn.Linear(3, 3), nn.Softmax(1), nn.Linear(3, 1)),
            nn.Sequential(nn.ReLU(), nn.Linear(3, 1)),
            nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.BatchNorm1d(3).eval()),
            nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)),
            nn.Sequential(nn.Conv2d(2, 2, 3)),
            nn.Sequential(nn.Linear(3, 4), nn.Linear(3, 4)),
            nn.Sequential(),
            nn.LSTM(3, 3),
        ],
        ids=lambda m: "-".join(type(p).__name__ for p in m.children()) or type(m).__name__,
    )
    def test_unsupported_networks(self, model):
        with pytest.raises(UsageError):
            LogTicket(eps=0.1).fit(model)

    def test_weights_that_are_not_finite(self):
        model = nn.Linear(2, 2)
        model.weight.data[0, 1] = math.nan
        with pytest.raises(NumericsError, match="not all finite"):
            LogTicket(eps=0.1).fit(model)

    @pytest.mark.parametrize("domain", [(0, math.inf), (1, 0), "0;1", "a,b", (math.nan, 1)])
    def test_domains(self, domain, small_net):
        with pytest.raises((UsageError, ValueError)):
            LogTicket(eps=0.1).fit(small_net, domain)

    def test_memory_and_work_are_refused_before_they_start(self, digits_net):
        with pytest.raises(UsageError, match="memory_limit"):
            LogTicket(weight_eps=1e-2, memory_limit=10_000).fit(digits_net)
        with pytest.raises(UsageError, match="draw_limit"):
            MalachTicket(weight_eps=1e-6, draw_limit=10**9).fit(digits_net)

    def test_a_convolution_cannot_be_copied(self):
        target = from_module(nn.Sequential(nn.Conv2d(1, 1, 2)), (1, 3, 3))
        with pytest.raises(UsageError, match="dense"):
            CopyTicket(weight_eps=0.1).fit(target)

    @pytest.mark.parametrize("eps", [1e-30, 1e-300])
    def test_an_eps_below_what_float64_can_prove(self, eps, small_net):
        with pytest.raises(UsageError, match="float64"):
            LogTicket(eps=eps).fit(small_net)

    def test_engines(self, small_net):
        with pytest.raises(UsageError, match="engine"):
            LogTicket(eps=0.1, engine="abacus").fit(small_net)
