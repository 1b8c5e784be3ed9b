"""Dead channels go and nothing changes; living ones, gated ones and padded readers are left alone."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from secateur.models import dead_channels
from secateur.models.channel_graph import channel_groups
from secateur.models.dead_channels import cut_dead_channels, fold_dead_channels
from secateur.models.vision.mobilenet import InvertedResidual, MobileNet


def lively(model, seed=0):
    """Norms with statistics and affine parts that are not those of a fresh network."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            n = module.num_features
            module.running_mean = 0.3 * torch.randn(n, generator=generator)
            module.running_var = 0.5 + torch.rand(n, generator=generator)
            module.weight.data = 0.5 + torch.rand(n, generator=generator)
            module.bias.data = torch.randn(n, generator=generator)
    return model.eval()


def kill(model, share=0.4, seed=0):
    """Masks that leave nothing of some channels and something of the others."""
    generator = torch.Generator().manual_seed(seed)
    masks = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and module.groups > 1:
            mask = torch.rand(module.weight.shape, generator=generator) < 0.5
            mask[torch.rand(len(mask), generator=generator) < share] = True
            module.weight.data[mask] = 0
            masks[f"{name}.weight"] = mask
    return masks


def fold(model, masks, example):
    groups = channel_groups(model, example)
    with torch.no_grad():
        before = model(example)
        dead = fold_dead_channels(model, groups, masks, example)
        cut_dead_channels(model, groups, masks, dead)
        after = model(example)
    return before, after, dead


class Plain(nn.Module):
    """PW1, DW, PW2, with or without a norm behind PW2."""

    def __init__(self, norm=True, reader=None, activation=F.relu6):
        super().__init__()
        self.expand = nn.Conv2d(3, 40, 1)
        self.dw = nn.Conv2d(40, 40, 3, padding=1, groups=40)
        self.bn = nn.BatchNorm2d(40)
        self.project = reader or nn.Conv2d(40, 8, 1, bias=False)
        self.after = nn.BatchNorm2d(8) if norm else nn.Identity()
        self.head = nn.Conv2d(8, 2, 1)
        self.activation = activation

    def forward(self, x):
        y = self.activation(self.bn(self.dw(F.relu(self.expand(x)))))
        return self.head(F.relu(self.after(self.project(y))))


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("activation", [F.relu6, F.silu, torch.sigmoid])
def test_folding_is_exact(norm, activation):
    model, example = lively(Plain(norm, activation=activation)), torch.randn(2, 3, 9, 9)
    masks = kill(model)
    wanted = int(masks["dw.weight"].flatten(1).all(1).sum())
    before, after, dead = fold(model, masks, example)
    assert wanted > 5
    assert {k: int(v.sum()) for k, v in dead.items()} == {"expand": wanted}
    assert torch.allclose(before, after, atol=1e-5)
    assert model.dw.out_channels == model.expand.out_channels == 40 - wanted
    assert masks["dw.weight"].shape == model.dw.weight.shape
    assert not masks["dw.weight"].flatten(1).all(1).any()


def test_a_whole_network():
    model, example = lively(MobileNet()), torch.randn(2, 1, 28, 28)
    masks = kill(model)
    wanted = sum(int(m.flatten(1).all(1).sum()) for m in masks.values())
    before, after, dead = fold(model, masks, example)
    assert sum(int(v.sum()) for v in dead.values()) == wanted > 50
    assert torch.allclose(before, after, atol=1e-4)


def test_behind_a_gate_only_zeros_go():
    model, example = lively(InvertedResidual(4, 6, 1, 10, 3, True)), torch.randn(2, 4, 9, 9)
    masks = kill(model)
    silent = masks["depthwise.weight"].flatten(1).all(1)
    bn = model.bn2
    at_rest = bn.bias - bn.running_mean * bn.weight / (bn.running_var + bn.eps).sqrt()
    zero = silent & (at_rest <= 0)
    before, after, dead = fold(model, masks, example)
    assert 0 < int(zero.sum()) < int(silent.sum())
    assert torch.equal(dead["expand"], zero)
    assert torch.allclose(before, after, atol=1e-5)


def test_a_gate_that_happens_to_be_open_is_not_believed():
    model = lively(InvertedResidual(4, 6, 1, 10, 3, True))
    model.gate.expand.bias.data.fill_(1e3)  # hard sigmoid of this is 1 on any image
    model.bn2.bias.data.fill_(3.0)
    masks = kill(model)
    before, after, dead = fold(model, masks, torch.randn(2, 4, 9, 9))
    assert not dead
    assert torch.equal(before, after)


def test_readers_that_pad_see_the_border():
    model = lively(Plain(reader=nn.Conv2d(40, 8, 3, padding=1, bias=False)))
    model.bn.bias.data.abs_().add_(2)  # no constant is zero
    masks = kill(model)
    before, after, dead = fold(model, masks, torch.randn(2, 3, 9, 9))
    assert not dead
    assert torch.equal(before, after)
    model = lively(Plain(reader=nn.Conv2d(40, 8, 3, bias=False)))
    before, after, dead = fold(model, kill(model), torch.randn(2, 3, 9, 9))
    assert dead
    assert torch.allclose(before, after, atol=1e-5)


def test_a_skip_keeps_the_channel_alive():
    class Skips(Plain):
        def forward(self, x):
            y = F.relu(self.expand(x))
            y = y + F.relu6(self.bn(self.dw(y)))
            return self.head(self.after(self.project(y)))

    model = lively(Skips())
    model.expand.bias.data.fill_(-100.0)  # zero on every image we could show it
    masks = kill(model)
    before, after, dead = fold(model, masks, torch.randn(2, 3, 9, 9))
    assert not dead
    assert torch.equal(before, after)


def test_a_group_is_never_emptied_and_nothing_is_done_without_dead_channels():
    model = lively(Plain())
    masks = {"dw.weight": torch.ones(40, 1, 3, 3, dtype=torch.bool)}
    model.dw.weight.data.zero_()
    before, after, dead = fold(model, masks, torch.randn(2, 3, 9, 9))
    assert int(dead["expand"].sum()) == 39
    assert torch.allclose(before, after, atol=1e-5)
    model = lively(Plain())
    same = copy.deepcopy(model)
    assert fold(model, {}, torch.randn(2, 3, 9, 9))[2] == {}
    for a, b in zip(model.state_dict().values(), same.state_dict().values(), strict=True):
        assert torch.equal(a, b)


class Read(nn.Module):
    """PW1, DW with constants above zero, and something that reads them otherwise than ``Plain``."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.expand, self.dw = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.project = Shifted(8, 6, 3) if how == "pads by itself" else nn.Conv2d(8, 6, 1)
        self.bn, self.other, self.key = nn.BatchNorm2d(6), nn.BatchNorm2d(6), nn.Conv2d(3, 8, 1)
        self.line, self.more, self.head = (
            nn.Parameter(torch.randn(8)),
            nn.Conv2d(3, 6, 1),
            nn.Linear(6, 5),
        )

    def forward(self, x):
        y = self.project(z := F.relu(self.dw(self.expand(x))))
        if self.how == "norm and skip":
            y = y + F.relu(self.bn(y))
        elif self.how == "two norms":
            y = F.relu(self.bn(y)) + F.relu(self.other(self.project(z.flip(-1))))
        elif self.how == "norm of two":
            y = F.relu(self.bn(y)) + F.relu(self.bn(self.more(x)))
        elif self.how == "changed in place":
            y *= 2
            y = F.relu(self.bn(y))
        elif self.how == "pads by itself":
            y = F.relu(y)
        elif self.how == "product":
            scores = z.flatten(2).transpose(1, 2) @ self.key(x).flatten(2)
            y = (self.more(x).flatten(2) @ scores.softmax(-1)).unflatten(2, x.shape[2:])
        elif self.how == "sum":
            y = y * torch.einsum("bchw,c->bhw", z, self.line).sigmoid()[:, None]
        return self.head(y.mean((2, 3)))


class Shifted(nn.Conv2d):
    """Pads its input, which its attributes do not say."""

    def forward(self, x):
        return super().forward(F.pad(x, (0, 2, 0, 2)))


@pytest.mark.parametrize(
    "how",
    [
        *("norm and skip", "two norms", "norm of two", "changed in place"),
        *("pads by itself", "product", "sum"),
    ],
)
def test_constants_that_somebody_else_reads_too(how):
    torch.manual_seed(0)
    model = lively(Read(how))
    model.dw.bias.data.abs_().add_(0.5)
    masks = kill(model)
    before, after, dead = fold(model, masks, torch.randn(2, 3, 8, 8))
    assert bool(dead) == (how not in ("pads by itself", "product", "sum"))
    assert torch.allclose(before, after, atol=1e-5)


def test_a_fold_that_would_change_something_is_not_made(monkeypatch):
    monkeypatch.setattr(dead_channels, "_takes_constants", lambda reader: True)
    model = lively(Plain(reader=nn.Conv2d(40, 8, 3, padding=1, bias=False)))
    model.bn.bias.data.abs_().add_(2)
    before, after, dead = fold(model, kill(model), torch.randn(2, 3, 9, 9))
    assert not dead
    assert torch.equal(before, after)
