"""Files: what is claimed is re-checked from the seed, and every tampering is noticed."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from secateur.errors import SecateurError, UsageError, VerificationError
from secateur.lottery import (
    CopyTicket,
    LogTicket,
    MalachTicket,
    SubsetSumTicket,
    certify,
    from_file,
    load_ticket,
    save_network,
    save_ticket,
)
from secateur.lottery.store import FORMAT
from secateur.lottery.ticket import narrow
from secateur.lottery.verify import verify_ticket

FINDERS = [
    LogTicket(eps=0.5),
    LogTicket(weight_eps=0.02, pools="independent"),
    LogTicket(weight_eps=0.02, pools="matching"),
    SubsetSumTicket(weight_eps=0.02),
    MalachTicket(weight_eps=0.05),
    CopyTicket(weight_eps=0.05),
]


@pytest.fixture
def path(small_net, tmp_path):
    ticket = LogTicket(eps=0.5).fit(small_net, (-1, 1), seed=77)
    save_ticket(ticket, tmp_path / "t.safetensors", certify(ticket, starts=4, samples=16))
    return tmp_path / "t.safetensors"


def altered(path, change):
    """The file with its header or tensors changed by ``change(header, tensors)``."""
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()[FORMAT])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    change(header, tensors)
    save_file(tensors, path, {FORMAT: json.dumps(header)})
    return path


@pytest.mark.parametrize(
    "finder", FINDERS, ids=lambda f: f"{f.name}-{getattr(f, 'pools', 'subset')}"
)
@pytest.mark.parametrize("method", ["interval", "zonotope"])
def test_round_trip_and_verification(finder, method, small_net, tmp_path):
    ticket = finder.fit(small_net, (-1, 1), seed=2**64 - 5)
    certificate = certify(ticket, method=method, starts=4, samples=16)
    save_ticket(ticket, tmp_path / "t.safetensors", certificate)
    again, read = load_ticket(tmp_path / "t.safetensors")
    assert read == certificate
    assert (again.seed, again.weight_eps, again.eps) == (
        ticket.seed,
        ticket.weight_eps,
        ticket.eps,
    )
    for one, two in zip(again.fold().layers, ticket.fold().layers, strict=True):
        assert torch.equal(one.positive, two.positive)
    result = verify_ticket(tmp_path / "t.safetensors", small_net)
    assert result.holds, result.record()
    assert {"bits", "target", "bound", "witness", "float32 run"} <= {c.name for c in result.checks}


def test_no_random_weight_is_stored(path):
    with safe_open(path, "pt") as file:
        kinds = {key.split(".")[0]: file.get_tensor(key).dtype for key in file.keys()}  # noqa: SIM118
    floats = {key for key, dtype in kinds.items() if dtype.is_floating_point}
    assert floats == {"target", "box", "witness"}
    ticket, _ = load_ticket(path)
    assert path.stat().st_size < 20_000 < 4 * ticket.size().random


class TestTampering:
    def check(self, path, match):
        with pytest.raises(VerificationError, match=match):
            verify_ticket(path).raise_if_false()

    def test_another_seed(self, path):
        self.check(altered(path, lambda h, t: h.update(seed=78)), "weights from the seed")

    def test_a_smaller_bound(self, path):
        def change(header, tensors):
            header["certificate"]["bound"] *= 0.99

        self.check(altered(path, change), "bound")

    @pytest.mark.parametrize(
        ("field", "value", "check"),
        [
            ("per_output", [0.0, 0.0, 0.0], "bound"),
            ("per_output", [], "bound"),
            ("per_output", 0.0, "damaged"),
            ("weight_error", [0.0, 0.0], "weight error"),
            ("float32_bound", 0.0, "float32 run"),
            ("float32_bound", None, "float32 run"),
        ],
    )
    def test_another_claim(self, path, field, value, check):
        def change(header, tensors):
            header["certificate"] |= {field: value, "float32_measured": 0.0}

        self.check(altered(path, change), check)

    def test_no_witness(self, path):
        self.check(altered(path, lambda h, t: t.pop("witness")), "witness")

    def test_a_smaller_eps(self, path):
        self.check(altered(path, lambda h, t: h.update(eps=1e-9)), "epsilon")

    def test_a_larger_error_claimed_at_the_witness(self, path):
        def change(header, tensors):
            header["certificate"]["empirical"] *= 1.01

        self.check(altered(path, change), "witness")

    def test_a_witness_outside_the_box(self, path):
        self.check(altered(path, lambda h, t: t["witness"].mul_(3.0)), "witness")

    def test_another_edge(self, path):
        def change(header, tensors):
            neurons = tensors["neurons.0"].long()
            for place in range(0, len(neurons), 3):
                neurons[place] += 1
            tensors["neurons.0"] = neurons.int()

        self.check(altered(path, change), "weights from the seed|twice|bound")

    def test_an_edge_that_does_not_exist(self, path):
        def change(header, tensors):
            tensors["neurons.1"] = tensors["neurons.1"].int()
            tensors["neurons.1"][0] = 10**6

        self.check(altered(path, change), "do not exist")

    def test_an_edge_twice(self, path):
        def change(header, tensors):
            counts, neurons = tensors["counts.0"], tensors["neurons.0"]
            place = int((counts >= 2).nonzero()[0, 0])
            begin = int(counts[:place].sum())
            neurons[begin + 1] = neurons[begin]

        self.check(altered(path, change), "twice")

    def test_other_target_weights(self, path):
        self.check(altered(path, lambda h, t: t["target.0"].mul_(1.01)), "SHA-256")

    def test_lists_of_the_wrong_length(self, path):
        def change(header, tensors):
            tensors["neurons.0"] = tensors["neurons.0"][:-1].clone()

        self.check(altered(path, change), "length")

    @pytest.mark.parametrize(
        "change",
        [
            lambda h, t: h["layers"].pop(),
            lambda h, t: h["layers"].append(h["layers"][0]),
            lambda h, t: h["weight_eps"].pop(),
            lambda h, t: h.update(weight_eps=[0.1, -1.0]),
            lambda h, t: h.update(eps="small"),
            lambda h, t: h.update(history=[]),
            lambda h, t: h["layers"][0].update(copies=2),
            lambda h, t: h["layers"][1].update(carried=3),
            lambda h, t: h["layers"][0].update(per_weight=1),
            lambda h, t: h["layers"][0].update(copies="1"),
            lambda h, t: h["certificate"].update(empirical="0"),
            lambda h, t: t.update({"box.low": t["box.low"][:1].clone()}),
            lambda h, t: t.update({"box.low": t["box.low"].float()}),
            lambda h, t: t.update({"box.high": t["box.high"] - 9}),
            lambda h, t: t.update({"witness": t["witness"][None]}),
            lambda h, t: t.update({"witness": t["witness"] * float("nan")}),
            lambda h, t: t.update({"extra": torch.zeros(1)}),
            lambda h, t: t.update({"counts.0": t["counts.0"].double()}),
            lambda h, t: t.update({"neurons.0": -t["neurons.0"].int()}),
            lambda h, t: t.update({"sizes.0": torch.tensor([3, 4])}),
            lambda h, t: t.update({"target.0": t["target.0"].float()}),
        ],
        ids=lambda change: change.__code__.co_consts[1:3].__repr__(),
    )
    def test_parts_that_do_not_fit_together(self, path, change):
        with pytest.raises((VerificationError, UsageError)):
            verify_ticket(altered(path, change))

    def test_a_missing_part(self, path):
        self.check(altered(path, lambda h, t: h.pop("layers")), "damaged")

    def test_another_target(self, path, digits_net):
        with pytest.raises(VerificationError, match="not the network"):
            verify_ticket(path, digits_net).raise_if_false()

    def test_no_certificate(self, path):
        self.check(altered(path, lambda h, t: h.update(certificate=None)), "certificate")


@pytest.mark.parametrize(
    "finder", FINDERS, ids=lambda f: f"{f.name}-{getattr(f, 'pools', 'subset')}"
)
def test_the_size_says_what_is_in_the_file(finder, small_net, tmp_path):
    ticket = finder.fit(small_net, (-1, 1), seed=3)
    save_ticket(ticket, tmp_path / "t.safetensors")
    with safe_open(tmp_path / "t.safetensors", "pt") as file:
        lists = [k for k in file.keys() if k.split(".")[0] in ("sizes", "counts", "neurons")]  # noqa: SIM118
        stored = sum(file.get_tensor(k).numpy().nbytes for k in lists)
    assert ticket.size().seed_and_bits == stored


def test_lists_use_the_smallest_type():
    for top, kind in ((255, "uint8"), (256, "int16"), (2**15, "int32"), (2**31, "int64")):
        values = narrow(np.array([0, top]))
        assert values.dtype == kind
        assert values.tolist() == [0, top]


def test_files_that_are_no_tickets(tmp_path, path):
    with pytest.raises(UsageError, match="no such file"):
        load_ticket(tmp_path / "missing")
    (tmp_path / "text").write_text("hello, this is not a tensor file at all")
    with pytest.raises(SecateurError, match="not a safetensors"):
        load_ticket(tmp_path / "text")
    save_file({"a": torch.ones(2)}, tmp_path / "plain")
    with pytest.raises(UsageError, match="not a ticket"):
        load_ticket(tmp_path / "plain")
    altered(path, lambda h, t: h.update(version=99))
    with pytest.raises(UsageError, match="version"):
        load_ticket(path)


def test_networks_travel_by_file(small_net, tmp_path):
    save_network(small_net, tmp_path / "n.safetensors")
    assert from_file(tmp_path / "n.safetensors").digest() == small_net.digest()
    plain = {
        f"{2 * i}.{kind}": value.float().contiguous()
        for i, layer in enumerate(small_net.layers)
        for kind, value in (("weight", layer.matrix[:, :-1]), ("bias", layer.matrix[:, -1]))
    }
    save_file(plain, tmp_path / "plain.safetensors")
    assert from_file(tmp_path / "plain.safetensors").digest() == small_net.digest()
    save_file({"conv.weight": torch.ones(2, 1, 3, 3)}, tmp_path / "conv.safetensors")
    with pytest.raises(UsageError, match="2-D"):
        from_file(tmp_path / "conv.safetensors")
