"""Channels that hang together are found, and cutting them is what zeroing them is."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from channel_cases import CASES, TimmLike, Written, liven, network, some_gone
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from secateur.errors import SecateurError, UsageError
from secateur.masks.structured import StructuredMask, structure_of
from secateur.models.channel_check import check_groups
from secateur.models.channel_graph import ChannelGroups, channel_groups
from secateur.models.channel_surgery import mask_channels, shrink_channels


def counted(model: nn.Module, example: Tensor) -> float:
    """FLOPs by hooks on the modules, an independent count (attention products left out)."""
    total = 0.0

    def conv(module: Any, inputs: Any, output: Tensor) -> None:
        nonlocal total
        each = module.weight[0].numel()
        positions = output[0, 0].numel()
        if module.transposed:
            each, positions = module.weight[0].numel(), inputs[0][0].numel()
            total += 2.0 * each * positions
            return
        total += 2.0 * each * output.shape[1] * positions

    def linear(module: Any, inputs: Any, output: Tensor) -> None:
        nonlocal total
        total += 2.0 * module.weight.numel() * output.numel() / output.shape[-1]

    handles = []
    for module in model.modules():
        if isinstance(module, nn.modules.conv._ConvNd):
            handles.append(module.register_forward_hook(conv))
        elif isinstance(module, nn.Linear):
            handles.append(module.register_forward_hook(linear))
    with torch.no_grad():
        model(example)
    for handle in handles:
        handle.remove()
    return total


@pytest.mark.parametrize("name", CASES)
def test_masked_is_sliced(name: str) -> None:
    model, example = network(name)
    groups = channel_groups(model, example)
    assert len(groups.prunable) >= 1
    gone = some_gone(groups)
    masked, cut = deepcopy(model), deepcopy(model)
    mask_channels(masked, groups, gone)
    shrink_channels(cut, groups, gone)
    x = torch.randn(3, *example.shape[1:])
    with torch.no_grad():
        wanted, found = masked(x), cut(x)
        assert (wanted - model(x)).abs().max() > 1e-3  # something did go
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    widths = {key: int((~units).sum()) for key, units in gone.items()}
    assert groups.parameters(widths) == sum(p.numel() for p in cut.parameters())
    assert groups.parameters() == sum(p.numel() for p in model.parameters())
    after = channel_groups(cut, example)
    assert after.flops() == pytest.approx(groups.flops(widths))
    assert {g.key: g.n_units for g in after.prunable} == {
        g.key: widths[g.key] for g in groups.prunable if widths[g.key] > 1
    }


@pytest.mark.parametrize("name", ["resnet", "gated mobilenet", "dense", "groups", "few groups"])
def test_flops_are_those_of_the_modules(name: str) -> None:
    model, example = network(name)
    groups = channel_groups(model, example)
    gone = some_gone(groups, seed=1)
    widths = {key: int((~units).sum()) for key, units in gone.items()}
    assert groups.flops() == counted(model, example)
    shrink_channels(model, groups, gone)
    assert groups.flops(widths) == pytest.approx(counted(model, example))


def test_flops_have_the_gradient_of_their_differences() -> None:
    model, example = network("gated mobilenet")
    groups = channel_groups(model, example)
    at = {g.key: torch.tensor(float(g.n_units - 2), requires_grad=True) for g in groups.prunable}
    groups.flops(at).backward()
    for key, width in at.items():
        more = {k: float(w.detach()) + (1.0 if k == key else 0.0) for k, w in at.items()}
        less = {k: float(w.detach()) - (1.0 if k == key else 0.0) for k, w in at.items()}
        slope = (
            groups.flops(more) - groups.flops(less)
        ) / 2  # exact: linear or a product with others
        assert float(width.grad) == pytest.approx(slope, rel=1e-4), key


def test_residual_stages_are_coupled() -> None:
    model, example = network("resnet")
    groups = channel_groups(model, example)
    stage = groups["stages.1.0.conv2"]
    assert set(stage.producers) == {
        "stages.1.0.conv2",
        "stages.1.0.shortcut.0",
        "stages.1.1.conv2",
    }
    assert "stages.2.0.conv1" in stage.consumers
    assert [g.key for g in groups.fixed] == ["fc"]
    assert "output" in groups["fc"].reason
    read = {s.parameter for g in groups for s in g.slices}
    assert not any(s == "conv1.weight" and d == 1 for s, d in _places(groups))
    assert "stages.1.0.bn2.running_var" in read


def _places(groups: ChannelGroups) -> list[tuple[str, int]]:
    return [(s.parameter, s.dim) for g in groups for s in g.slices]


def test_depthwise_layers_are_named() -> None:
    model, example = network("mobilenet")
    group = channel_groups(model, example)["blocks.0.expand"]
    assert group.depthwise == ("blocks.0.depthwise",)
    assert group.consumers == ("blocks.0.project",)
    assert group.norms == ("blocks.0.bn1", "blocks.0.bn2")
    assert torch.equal(group.inputs[0].index[:, 0], torch.arange(group.n_units))


def test_ports_are_where_masks_act() -> None:
    model, example = network("inception")
    groups = channel_groups(model, example)
    gone = some_gone(groups)
    masked = deepcopy(model)
    mask_channels(masked, groups, gone)
    handles = []
    for key, units in gone.items():
        for port in groups[key].inputs:

            def hook(module: Any, inputs: Any, port: Any = port, units: Any = units) -> Any:
                x = inputs[0].clone()
                dim = 1 if isinstance(module, nn.Conv2d) else x.dim() - 1
                return (x.index_fill(dim, port.index[units].reshape(-1), 0.0),)

            handles.append(model.get_submodule(port.module).register_forward_pre_hook(hook))
    x = torch.randn(2, *example.shape[1:])
    with torch.no_grad():
        torch.testing.assert_close(model(x), masked(x))


def test_cuts_add_up_in_original_numbers() -> None:
    model, example = network("gated mobilenet")
    groups = channel_groups(model, example)
    first, second = some_gone(groups, 1, 0.3), some_gone(groups, 2, 0.3)
    both = {key: first[key] | second[key] for key in first}
    whole = deepcopy(model)
    shrink_channels(whole, groups, both)
    mask = shrink_channels(model, groups, first)
    assert structure_of(model) is mask
    again = channel_groups(model, example)
    shrink_channels(model, again, StructuredMask(second))  # a mask speaks of the original model
    assert structure_of(model) == structure_of(whole)
    x = torch.randn(2, *example.shape[1:])
    torch.testing.assert_close(model(x), whole(x))


@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_optimizer_state_follows(name: str) -> None:
    model, example = network(name)
    groups = channel_groups(model, example)
    gone = some_gone(groups)
    model.train()
    x, y = torch.randn(4, *example.shape[1:]), torch.tensor([0, 1, 2, 3])
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    for step in range(3):
        if step == 2:
            objects = [id(p) for p in model.parameters()]
            shrink_channels(model, groups, gone, [optimizer])
            assert [id(p) for p in model.parameters()] == objects
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        if step != 1:
            optimizer.zero_grad()
    for parameter in model.parameters():
        assert optimizer.state[parameter]["exp_avg"].shape == parameter.shape


def test_code_with_widths_in_it_is_noticed() -> None:
    torch.manual_seed(0)
    model, example = Written().eval(), torch.zeros(1, 3, 12, 12)
    groups = channel_groups(model, example)
    assert {g.key for g in groups.prunable} == {"patch", "qkv"}
    before = {n: p.clone() for n, p in model.state_dict().items()}
    checked = check_groups(model, groups, example)
    assert not checked.prunable
    assert "code needs its width" in checked["qkv"].reason
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())


@pytest.mark.parametrize(
    "name", ["gated mobilenet", "swin", "torch", "few groups", "einsum", "mixer", "unet"]
)
def test_what_can_be_cut_passes_the_trial(name: str) -> None:
    model, example = network(name)
    groups = channel_groups(model, example)
    assert check_groups(model, groups, example) is groups


def test_an_equal_attention_stands_in_where_code_has_widths_in_it() -> None:
    torch.manual_seed(0)
    model, example = TimmLike().eval(), torch.zeros(1, 3, 12, 12)
    groups = check_groups(model, channel_groups(model, example), example)
    assert {g.key for g in groups.prunable} == {"patch", "attn.qkv"}
    assert groups["attn.qkv"].rewritten == ("attn",)
    gone = some_gone(groups)
    masked, cut = deepcopy(model), deepcopy(model)
    mask_channels(masked, groups, gone)
    shrink_channels(cut, groups, gone)
    x = torch.randn(2, 3, 12, 12)
    torch.testing.assert_close(cut(x), masked(x), rtol=1e-4, atol=1e-5)
    again = channel_groups(cut, example)
    assert again["attn.qkv"].n_units == 2
    assert check_groups(cut, again, example) is again


def test_an_attention_that_computes_something_else_is_left_alone() -> None:
    torch.manual_seed(0)
    model, example = TimmLike(twisted=True).eval(), torch.zeros(1, 3, 12, 12)
    groups = check_groups(model, channel_groups(model, example), example)
    assert not groups.prunable


def test_a_silent_branch_is_tried_too() -> None:
    class Silent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.scale = Written(), nn.Parameter(torch.full((5,), 1e-6))
            self.conv, self.fc = nn.Conv2d(3, 6, 3), nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            try:
                beside = self.inner(x)
            except RuntimeError:  # a cut that goes wrong, and that nothing loud would tell
                beside = x.new_zeros(1, 5)
            return self.fc(self.conv(x).mean((2, 3))) + self.scale * beside

    torch.manual_seed(0)
    model, example = Silent().eval(), torch.zeros(1, 3, 12, 12)
    checked = check_groups(model, channel_groups(model, example), example)
    assert [g.key for g in checked.prunable] == ["conv"]


class Twice(nn.Module):
    """One convolution used two times."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, padding=1)
        self.norm, self.fc = nn.BatchNorm2d(6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(self.stem(x))))
        return self.fc(F.relu(self.norm(self.conv(x))).mean((2, 3)))


def test_a_shared_layer_loses_the_same_both_times() -> None:
    torch.manual_seed(0)
    model, example = Twice().eval(), torch.zeros(1, 3, 6, 6)
    groups = channel_groups(model, example)
    assert groups["stem"].producers == ("stem", "conv")
    assert check_groups(model, groups, example) is groups


def _softmax(x: Tensor) -> Tensor:
    return x.softmax(1)


def _statistics(x: Tensor) -> Tensor:
    return x - x.mean(1, keepdim=True)


def _picked(x: Tensor) -> Tensor:
    return torch.cat([x[:, :2] * 2, x[:, 2:]], 1)


def _constant(x: Tensor) -> Tensor:
    return x + torch.ones(6, 1, 1)


@pytest.mark.parametrize("function", [_softmax, _statistics, _picked, _constant])
def test_what_needs_all_channels_keeps_them(function: Any) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 1)
            self.fc = nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.b(function(self.a(x))).mean((2, 3)))

    groups = channel_groups(Net(), torch.zeros(1, 3, 5, 5))
    assert groups["a"].reason
    assert groups["b"].prunable


class Odd(nn.Module):
    """Something no rule knows."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.a, self.fc = how, nn.Conv2d(3, 6, 1), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if self.how == "op":
            x = torch.fft.fft(x).abs()
        elif self.how == "numpy":
            x = torch.from_numpy(x.detach().numpy() * 2)
        return self.fc(x.mean((2, 3)))


@pytest.mark.parametrize("how", ["op", "numpy"])
def test_an_operation_that_cannot_be_followed_is_named(how: str) -> None:
    with pytest.raises(SecateurError) as caught:
        channel_groups(Odd(how), torch.zeros(1, 3, 5, 5))
    assert "cannot be followed" in caught.value.message or "followed" in str(caught.value)
    if how == "op":
        assert "fft_fft" in str(caught.value)
        kept = channel_groups(Odd(how), torch.zeros(1, 3, 5, 5), unknown="keep")
        assert not kept.prunable
        assert "fft" in kept["a"].reason


def test_bad_masks_and_examples_are_refused() -> None:
    model, example = network("resnet")
    groups = channel_groups(model, example)
    key = groups.prunable[0].key
    units = groups[key].n_units
    for gone, words in (
        ({"nowhere": torch.zeros(3, dtype=torch.bool)}, "no such group"),
        ({key: torch.ones(units, dtype=torch.bool)}, "would go"),
        ({key: torch.ones(units - 1, dtype=torch.bool)}, "one bool"),
        ({"fc": torch.tensor([True, *[False] * 4])}, "cannot lose"),
    ):
        with pytest.raises(UsageError, match=words):
            shrink_channels(model, groups, gone)
    with pytest.raises(UsageError, match="does not run"):
        channel_groups(model, torch.zeros(1, 2, 12, 12))


# -- random networks -----------------------------------------------------------------------------


class Random(nn.Module):
    """Layers in a row, each drawn: what went before may come back by a sum or a concatenation."""

    def __init__(self, plan: list[tuple[str, int]]) -> None:
        super().__init__()
        self.plan, self.layers = plan, nn.ModuleList()
        widths = [4]
        self.stem = nn.Conv2d(3, 4, 1)
        for kind, number in plan:
            width, layer = widths[-1], nn.Identity()
            if kind == "conv":
                layer = nn.Conv2d(width, 2 + number, 3, padding=1)
                width = 2 + number
            elif kind == "depthwise":
                layer = nn.Conv2d(width, width, 3, padding=1, groups=width)
            elif kind == "norm":
                layer = nn.BatchNorm2d(width)
            elif kind == "grouped" and width % 2 == 0:
                layer = nn.Conv2d(width, width, 1, groups=2)
            elif kind == "gate":
                layer = nn.Sequential(nn.Conv2d(width, 3, 1), nn.ReLU(), nn.Conv2d(3, width, 1))
            elif kind == "cat":
                width += widths[number % len(widths)]
            elif kind == "add":
                layer = nn.Conv2d(width, widths[number % len(widths)], 1)
                width = widths[number % len(widths)]
            self.layers.append(layer)
            widths.append(width)
        self.fc = nn.Linear(widths[-1], 3)

    def forward(self, x: Tensor) -> Tensor:
        seen = [self.stem(x)]
        for (kind, number), layer in zip(self.plan, self.layers, strict=True):
            x, old = seen[-1], seen[number % len(seen)]
            if kind == "cat":
                x = torch.cat([x, old], 1)
            elif kind == "add":
                x = layer(x) + old
            elif kind == "gate":
                x = x * torch.sigmoid(layer(x.mean((2, 3), keepdim=True)))
            elif kind == "relu":
                x = F.relu(x)
            else:
                x = layer(x)
            seen.append(x)
        return self.fc(seen[-1].mean((2, 3)))


KINDS = ["conv", "depthwise", "norm", "grouped", "gate", "cat", "add", "relu"]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 5)), min_size=1, max_size=8),
    st.integers(0, 99),
)
def test_any_network_cut_is_any_network_masked(plan: list[tuple[str, int]], seed: int) -> None:
    torch.manual_seed(seed)
    model = Random(plan)
    liven(model)
    model.eval()
    example = torch.randn(1, 3, 4, 4)
    groups = channel_groups(model, example)
    gone = some_gone(groups, seed)
    masked, cut = deepcopy(model), deepcopy(model)
    mask_channels(masked, groups, gone)
    shrink_channels(cut, groups, gone)
    with torch.no_grad():
        wanted, found = masked(example), cut(example)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    widths = {key: int((~units).sum()) for key, units in gone.items()}
    assert groups.parameters(widths) == sum(p.numel() for p in cut.parameters())
