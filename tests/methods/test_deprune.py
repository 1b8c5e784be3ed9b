"""DEPrune on networks: what it may touch, exact shares, the same function after the fold."""

import copy
import itertools

import pytest
import torch
from torch import nn

from secateur.errors import UsageError
from secateur.kernels.depthwise import is_depthwise
from secateur.masks import depthwise as choices
from secateur.methods.deprune import DEPrune, depthwise_layers, projections
from secateur.methods.deprune_latency import Latency, input_shapes
from secateur.methods.vision_base import VisionJob, VisionTarget
from secateur.models.channel_graph import channel_groups
from secateur.models.channel_surgery import mask_channels
from secateur.models.inference import inference_copy
from secateur.models.vision.efficientnet_lite import EfficientNetLite0
from secateur.models.vision.mobilenet import MobileNet
from tests.models.test_dead_channels import lively

VARIANTS = ["dcp", "b", "bh", "weight", "fours", "channel"]


def job_of(model, share, example=None, **more):
    example = torch.zeros(1, 1, 28, 28) if example is None else example
    return VisionJob(
        model,
        channel_groups(model, example),
        VisionTarget("weights", share),
        example=example,
        **more,
    )


@pytest.fixture(scope="module")
def net():
    return lively(MobileNet(width=16))


@pytest.mark.parametrize("gate", [False, True])
def test_only_second_pointwise_layers_lose_filters(gate):
    model = MobileNet(gate=gate).eval()
    groups = channel_groups(model, torch.zeros(1, 1, 28, 28))
    found = projections(model, groups)
    names = {name for group in found for name in group.producers}
    # the stem is added to the first block's output, so both lose the same
    assert names == {"stem", *(f"blocks.{i}.project" for i in range(5))}
    assert not any(group.depthwise for group in found)


def test_projections_of_efficientnet():
    model = EfficientNetLite0(classes=3).eval()
    groups = channel_groups(model, torch.zeros(1, 3, 64, 64))
    names = {n for g in projections(model, groups) for n in g.producers}
    assert names == {f"_blocks.{i}._project_conv" for i in range(16)}
    assert len(depthwise_layers(model)) == 16


@pytest.mark.parametrize("variant", VARIANTS)
def test_shares_and_function(net, variant):
    model, x = copy.deepcopy(net), torch.randn(2, 1, 28, 28)
    before = {n: c.in_channels for n, c in depthwise_layers(model).items()}
    method = DEPrune(variant=variant, pw=0.5, measure=False)
    # what the method says it removes, removed by hand from a copy
    other = copy.deepcopy(net)
    outcome = method.prune(job_of(model, 0.8))
    taps = sum(c.weight.numel() for c in depthwise_layers(net).values())
    rows = [row for row in outcome.layers if row["kind"] == "depthwise"]
    assert len(rows) == 5
    assert outcome.record["taps_gone"] == sum(r["before"] - r["after"] for r in rows)
    assert outcome.delivered == pytest.approx(outcome.record["taps_gone"] / taps)
    if variant == "dcp":
        assert outcome.record["taps_gone"] == sum(round(0.8 * r["before"]) for r in rows)
    if variant == "weight":
        assert outcome.record["taps_gone"] == round(0.8 * taps)
    if variant in ("b", "fours"):
        assert abs(outcome.delivered - 0.8) < 0.01
    if variant == "channel":
        assert not outcome.masks
        return
    latency = Latency(other, input_shapes(other, torch.zeros(1, 1, 28, 28)), False)
    masks = method.masks(depthwise_layers(other), 0.8, latency)
    for name, mask in masks.items():
        other.get_parameter(name).data[mask] = 0
    groups = channel_groups(other, torch.zeros(1, 1, 28, 28))
    wanted = [g.key for g in projections(other, groups)]
    mask_channels(
        other, groups, {k: outcome.structure.gone[k] for k in wanted if k in outcome.structure.gone}
    )
    with torch.no_grad():
        assert torch.allclose(model(x), other(x), atol=2e-4)
    for name, mask in outcome.masks.items():
        weight = model.get_parameter(name)
        assert weight.shape == mask.shape
        assert not weight[mask].any()
        assert bool(mask.flatten(1).any(1).any())
    for name, conv in depthwise_layers(model).items():
        dead = before[name] - conv.in_channels
        assert conv.in_channels == conv.out_channels == conv.groups
        assert dead == 0 or outcome.record["folded_channels"] > 0


def test_without_fold_and_filters_shapes_stay(net):
    model = copy.deepcopy(net)
    outcome = DEPrune(variant="b", pw=0.0, fold=False).prune(job_of(model, 0.9))
    assert outcome.record["silent_channels"] > 0 == outcome.record["folded_channels"]
    assert [p.shape for p in model.parameters()] == [p.shape for p in net.parameters()]
    assert outcome.structure.gone == {}


def test_filters_alone_leave_depthwise_widths(net):
    model = copy.deepcopy(net)
    before = {n: c.in_channels for n, c in depthwise_layers(model).items()}
    DEPrune(variant="dcp", pw=0.5).prune(job_of(model, 0.0))
    assert {n: c.in_channels for n, c in depthwise_layers(model).items()} == before
    blocks = list(model.blocks)
    for block, after in itertools.pairwise(blocks):
        assert block.project.out_channels == after.expand.in_channels
    assert blocks[1].project.out_channels == blocks[2].project.out_channels == 16  # they add up
    assert model(torch.randn(1, 1, 28, 28)).shape == (1, 10)


@pytest.mark.parametrize("criterion", ["l1", "l2", "fpgm"])
def test_criteria_remove_planted_filters(criterion):
    model = lively(MobileNet(width=16))
    keys = ["blocks.1.project", "blocks.2.project"]
    for key in keys:  # coupled by the skip: the same filters are small in both
        weight = model.get_submodule(key).weight.data
        weight[5:13] = weight[5:6] * 1e-3
    outcome = DEPrune(variant="dcp", pw=0.25, criterion=criterion).prune(job_of(model, 0.0))
    gone = outcome.structure.gone["blocks.1.project"]
    if criterion == "fpgm":  # nearest to all others: the copies of one filter
        assert int(gone[5:13].sum()) >= 7
    else:
        assert gone.nonzero().view(-1).tolist() == list(range(5, 13))


def test_filters_are_aligned_where_there_is_room():
    model = lively(MobileNet(width=64, expansion=1))
    outcome = DEPrune(variant="bh", pw=0.4, measure=False).prune(job_of(model, 0.7))
    widths = [row["after"] for row in outcome.layers if row["kind"] == "pointwise"]
    assert widths
    assert all(width % 32 == 0 for width in widths)
    columns = [row["columns"] for row in outcome.layers if row["kind"] == "depthwise"]
    assert all(width % 32 == 0 for width in columns)


def test_measured_latency_asks_each_width_once(net):
    latency = Latency(net, input_shapes(net, torch.zeros(1, 1, 28, 28)))
    if latency.source != "measured":
        pytest.skip("no compiled kernel here")
    first = latency.columns("blocks.0.depthwise", 64)
    assert first > 0
    assert latency.columns("blocks.0.depthwise", 64) == first
    assert latency.filters(("blocks.1.project",), ("blocks.2.expand",), 16) > 0
    assert [row[0] for row in latency.rows] == [
        "blocks.0.depthwise", "blocks.1.project out", "blocks.2.expand in",
    ]  # fmt: skip


def test_limits_of_the_recipe_hold(net):
    model = copy.deepcopy(net)
    outcome = DEPrune(variant="b", pw=0.9).prune(job_of(model, 0.97, at_least=12, round_to=4))
    for row in outcome.layers:
        if row["kind"] == "pointwise":
            assert row["after"] >= 12
            assert row["after"] % 4 == 0 or row["after"] == row["before"]
    assert all(c.in_channels >= 12 for c in depthwise_layers(model).values())


def test_what_is_refused(net):
    plain = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 1, 1)).eval()
    with pytest.raises(UsageError, match="no depth-wise"):
        DEPrune().prune(job_of(plain, 0.5))
    with pytest.raises(UsageError, match="pw"):
        DEPrune(pw=1.0)
    with pytest.raises(UsageError, match=r"\[0, 1\)"):
        DEPrune(variant="b", pw=0.0).prune(job_of(copy.deepcopy(net), 1.0))
    # one output channel is no depth-wise layer
    assert not is_depthwise(nn.Conv2d(1, 1, 3))


def test_a_multiplier_has_taps_of_its_own():
    class Doubled(nn.Module):
        def __init__(self):
            super().__init__()
            self.expand = nn.Conv2d(1, 32, 1)
            self.dw = nn.Conv2d(32, 64, 3, padding=1, groups=32)
            self.bn = nn.BatchNorm2d(64)
            self.project = nn.Conv2d(64, 8, 1)
            self.head = nn.Conv2d(8, 2, 1)

        def forward(self, x):
            return self.head(self.project(torch.relu(self.bn(self.dw(torch.relu(self.expand(x)))))))

    model = lively(Doubled())
    before = copy.deepcopy(model)
    masks = {"dw.weight": choices.balanced(model.dw.weight, choices.columns(9, 0.8))}
    before.dw.weight.data[masks["dw.weight"]] = 0
    outcome = DEPrune(variant="b", pw=0.0).prune(job_of(model, 0.8))
    x = torch.randn(1, 1, 28, 28)
    with torch.no_grad():
        assert torch.allclose(model(x), before(x), atol=1e-4)
    assert outcome.record["taps"] == 64 * 9


class Standardised(nn.Conv2d):
    """As in NFNets: a tap that is zero is not zero when it is used."""

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight, self.bias)


class Shifted(nn.Conv2d):
    """As for TensorFlow's weights: it pads by itself."""

    def forward(self, x):
        return super().forward(nn.functional.pad(x, (1, 1, 1, 1)))


def replaced(make):
    """A network, its second depth-wise layer (of 48 channels) made by ``make``."""
    model = lively(MobileNet(width=8))
    old = model.blocks[1].depthwise
    padding = 0 if make is Shifted else 1
    model.blocks[1].depthwise = make(
        old.in_channels, old.out_channels, 3, old.stride, padding, groups=old.groups, bias=False
    )
    return model


@pytest.mark.parametrize("variant", ["b", "bh"])
def test_layers_whose_weights_are_computed_keep_their_taps(variant):
    weighted = lambda *a, **k: nn.utils.parametrizations.weight_norm(nn.Conv2d(*a, **k))  # noqa: E731
    for make in (Standardised, weighted):
        model = replaced(make)
        job = job_of(model, 0.8)
        outcome = DEPrune(variant=variant, pw=0.0, fold=False).prune(job)
        assert "blocks.1.depthwise.weight" not in outcome.masks
        assert len(outcome.masks) == 4
        assert "blocks.1.depthwise" in job.notes[0]
    alone = nn.Sequential(
        nn.Conv2d(1, 4, 1), Standardised(4, 4, 3, groups=4), nn.Conv2d(4, 2, 1)
    ).eval()
    with pytest.raises(UsageError, match="computes its"):
        DEPrune().prune(job_of(alone, 0.5))


def test_layers_that_cannot_be_lists_are_pruned_and_not_timed():
    model = replaced(Shifted)
    x = torch.randn(2, 1, 28, 28)
    outcome = DEPrune(variant="bh", pw=0.0).prune(job_of(model, 0.8))
    assert "blocks.1.depthwise.weight" in outcome.masks
    assert not any(row[0] == "blocks.1.depthwise" for row in outcome.record["latency"]["rows"])
    with torch.no_grad():
        fast = inference_copy(model, outcome.masks, x)
        assert torch.allclose(fast(x), model(x), atol=1e-4)


def test_a_layer_that_does_not_run_counts_for_nothing():
    model = lively(MobileNet(width=8))
    model.spare = nn.Conv2d(512, 512, 3, groups=512)
    outcome = DEPrune(pw=0.0).prune(job_of(model, 0.8))
    assert "spare.weight" not in outcome.masks
    assert outcome.delivered == pytest.approx(0.8, abs=0.01)


@pytest.mark.parametrize("variant", ["dcp", "b", "bh", "weight", "fours"])
def test_no_layer_loses_all_its_taps(variant, net):
    model = copy.deepcopy(net)
    outcome = DEPrune(variant=variant, pw=0.0, fold=False, measure=False).prune(
        job_of(model, 0.9999)
    )
    assert len(outcome.masks) == 5
    assert not any(bool(mask.all()) for mask in outcome.masks.values())


def test_a_squeeze_is_no_projection_even_at_one_pixel():
    model = MobileNet(gate=True).eval()
    groups = channel_groups(model, torch.zeros(1, 1, 28, 28))
    small = channel_groups(model, torch.zeros(1, 1, 4, 4))  # the last blocks work on one pixel
    assert [g.key for g in projections(model, small)] == [g.key for g in projections(model, groups)]


def test_an_expansion_behind_the_depthwise_layer_counts():
    class Block(nn.Module):
        """As in ConvNeXt: what it writes is added to what the depth-wise layer read."""

        def __init__(self):
            super().__init__()
            self.stem, self.dw = nn.Conv2d(1, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
            self.fc1, self.fc2 = nn.Conv2d(8, 24, 1), nn.Conv2d(24, 8, 1)
            self.head = nn.Conv2d(8, 2, 1)

        def forward(self, x):
            x = self.stem(x)
            return self.head(x + self.fc2(torch.relu(self.fc1(self.dw(x)))))

    model = Block().eval()
    groups = channel_groups(model, torch.zeros(1, 1, 9, 9))
    assert [g.key for g in projections(model, groups)] == ["fc1"]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("variant", ["b", "bh"])
def test_on_a_device(variant, net):
    model, x = copy.deepcopy(net).to("cuda"), torch.randn(2, 1, 28, 28)
    outcome = DEPrune(variant=variant).prune(job_of(model, 0.8))
    with torch.no_grad():
        wanted = copy.deepcopy(model).cpu()(x)
        assert torch.allclose(model(x.to("cuda")).cpu(), wanted, atol=1e-3)
        fast = inference_copy(model, outcome.masks, x.to("cuda"))
        assert torch.allclose(fast(x.to("cuda")).cpu(), wanted, atol=1e-2)
