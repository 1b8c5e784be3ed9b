"""Widths in attributes, norms of other libraries' classes, tables kept between calls."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from channel_cases import liven, some_gone
from torch import Tensor, nn

from secateur.models.attention_heads import QkvAttention
from secateur.models.channel_check import check_groups
from secateur.models.channel_graph import ChannelGroups, channel_groups
from secateur.models.channel_sizes import sizes_of
from secateur.models.channel_surgery import mask_channels, shrink_channels
from secateur.models.vision.loading import VisionModel, fill
from secateur.models.vision.saving import save_vision


class Net(nn.Module):
    """A stem, something in the middle, a head."""

    def __init__(self, middle: nn.Module, width: int = 12, out: int = 12) -> None:
        super().__init__()
        self.stem, self.middle, self.head = nn.Conv2d(3, width, 1), middle, nn.Linear(out, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self.stem(x)).mean((2, 3)))


class Split(nn.Module):
    """Res2Net, MixNet, FasterNet: pieces whose sizes the module remembers."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.width, self.untouched, self.splits = how, 4, 8, (6, 4, 2)
        sizes = {"int": (4, 4, 4), "list": self.splits, "numbers": (4, 8), "rest": (4, 8)}[how]
        self.convs = nn.ModuleList(nn.Conv2d(n, n, 3, padding=1, groups=n) for n in sizes)

    def forward(self, x: Tensor) -> Tensor:
        sizes: Any = {
            "int": self.width,
            "list": list(self.splits),
            "numbers": [self.width, self.untouched],
            "rest": [self.width, x.shape[1] - self.width],
        }[self.how]
        parts = x.split(sizes, 1)
        return torch.cat([c(p) for c, p in zip(self.convs, parts, strict=True)], 1)


class Blur(nn.Module):
    """A fixed filter for every channel."""

    def __init__(self) -> None:
        super().__init__()
        self.channels = 12
        self.register_buffer("filter", torch.rand(12, 1, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.filter, groups=self.channels)


class Attention(nn.Module):
    """Self-attention that has its inner width in an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.attn_dim = 4, 3, 12
        self.inner, self.out = nn.Linear(12, 36), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        y = x.flatten(2).transpose(1, 2)
        y = self.inner(y).reshape(b, h * w, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(*y.unbind(0)).transpose(1, 2)
        y = self.out(y.reshape(b, h * w, self.attn_dim))
        return x + y.transpose(1, 2).reshape(x.shape)


class Scale(nn.Module):
    """PoolFormer: the shape in which scales are multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.shape, self.scale = (12, 1, 1), nn.Parameter(torch.rand(12) + 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale.view(self.shape)


MIDDLES: dict[str, Any] = {
    **{f"split by {how}": lambda how=how: Split(how) for how in ("int", "list", "numbers", "rest")},
    "blur": Blur,
    "attention": Attention,
    "scale": Scale,
}


def both(model: nn.Module, groups: ChannelGroups) -> tuple[Tensor, Tensor, nn.Module]:
    """Outputs of the network masked and of the network cut."""
    gone = some_gone(groups)
    masked, cut = deepcopy(model), deepcopy(model)
    mask_channels(masked, groups, gone)
    shrink_channels(cut, groups, gone)
    x = torch.randn(2, 3, 6, 6)
    return masked(x), cut(x), cut


@pytest.mark.parametrize("name", MIDDLES)
def test_widths_in_attributes_follow(name: str, tmp_path: Any) -> None:
    torch.manual_seed(0)
    model, example = Net(MIDDLES[name]()).eval(), torch.randn(1, 3, 6, 6)
    groups = check_groups(model, channel_groups(model, example), example)
    assert [g.key for g in groups.fixed] == ["head"]
    wanted, found, cut = both(model, groups)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert sizes_of(cut)["middle"]
    # and again, and from disk
    again = check_groups(cut, channel_groups(cut, example), example)
    assert again.widths() == {g.key: g.n_units for g in channel_groups(cut, example)}
    save_vision(VisionModel(cut, "net", input=(3, 6, 6)), tmp_path)
    opened = fill(deepcopy(model), tmp_path)
    x = torch.randn(2, 3, 6, 6)
    assert torch.equal(opened(x), cut(x))
    wanted, found, _ = both(cut, again)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_an_attribute_of_the_same_value_is_left_alone() -> None:
    class Scaled(Split):
        def forward(self, x: Tensor) -> Tensor:
            width = x.shape[1] // 3  # not from the attribute, which means something else
            parts = x.split(width, 1)
            return torch.cat([c(p) for c, p in zip(self.convs, parts, strict=True)], 1) / self.width

    torch.manual_seed(0)
    model, example = Net(Scaled("int")).eval(), torch.randn(1, 3, 6, 6)
    groups = check_groups(model, channel_groups(model, example), example)
    assert [g.key for g in groups.fixed] == ["head"]
    wanted, found, cut = both(model, groups)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert cut.middle.width == 4
    assert not sizes_of(cut)


class LayerNorm2d(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(x.movedim(1, -1), self.normalized_shape, self.weight, self.bias, self.eps)
        return x.movedim(-1, 1)


class RMSNorm2d(nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class OneGroup(nn.GroupNorm):
    def __init__(self, width: int) -> None:
        super().__init__(1, width)


@pytest.mark.parametrize("norm", [LayerNorm2d, RMSNorm2d, OneGroup])
def test_norms_over_channels_look_at_what_stays(norm: Any) -> None:
    torch.manual_seed(0)
    model = Net(nn.Sequential(norm(12), nn.Conv2d(12, 12, 1), norm(12)))
    liven(model)
    example = torch.randn(1, 3, 6, 6)
    groups = channel_groups(model.eval(), example)
    assert [g.key for g in groups.fixed] == ["head"]
    assert {g.kind for g in groups.prunable} == {"stem"}
    wanted, found, cut = both(model, groups)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert type(cut.middle[0]) is norm
    assert check_groups(model, groups, example) is groups
    masked = deepcopy(model)
    mask_channels(masked, groups, some_gone(groups, 1, 0.2))
    gone = {k: v for k, v in some_gone(groups).items() if k == "stem"}
    mask_channels(masked, groups, gone)  # twice: what went before stays gone
    assert masked.state_dict().keys() == model.state_dict().keys()
    shrink_channels(masked, groups, gone)
    assert type(masked.middle[0]) is norm
    assert masked.middle[0].weight.shape == (12 - int(gone["stem"].sum()),)


class Selective(nn.Module):
    """SKNet: paths stacked, summed, and weighted by a softmax over them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(12, 12, 3, padding=1), nn.Conv2d(12, 12, 1)
        self.fc, self.paths = nn.Conv2d(12, 24, 1), 2

    def forward(self, x: Tensor) -> Tensor:
        y = torch.stack([self.a(x), self.b(x)], 1)
        gate = self.fc(y.sum(1).mean((2, 3), keepdim=True))
        b, c = gate.shape[:2]
        return (y * gate.view(b, self.paths, c // self.paths, 1, 1).softmax(1)).sum(1)


class Together(nn.Module):
    """SwinV2: a bias put together from two parameters and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(12, 12, bias=False)
        self.a, self.c = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))
        self.register_buffer("b", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        bias = torch.cat([self.a, self.b, self.c])
        return F.linear(x.movedim(1, -1), self.inner.weight, bias).movedim(-1, 1)


class Sliced(nn.Module):
    """GhostNet: a slice that leaves nothing out."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Conv2d(12, 6, 1), nn.Conv2d(6, 6, 3, padding=1, groups=6), 12

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return torch.cat([y, self.b(y)], 1)[:, : self.out]


@pytest.mark.parametrize("middle", [Selective, Sliced, Together])
def test_paths_and_slices_are_followed(middle: Any) -> None:
    torch.manual_seed(0)
    model, example = Net(middle()).eval(), torch.randn(1, 3, 6, 6)
    groups = channel_groups(model, example)
    assert [g.key for g in groups.fixed] == ["head"]
    wanted, found, _ = both(model, groups)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert check_groups(model, groups, example) is groups


def test_channels_convolved_with_their_neighbours_stay() -> None:
    class Neighbours(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(1, 1, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            gate = self.conv(x.mean((2, 3))[:, None]).sigmoid()
            return x * gate[:, 0, :, None, None]

    groups = channel_groups(Net(Neighbours()).eval(), torch.randn(1, 3, 6, 6))
    assert "neighbours" in groups["stem"].reason


def test_a_bias_that_is_computed_otherwise_keeps_its_channels() -> None:
    class Computed(Together):
        def forward(self, x: Tensor) -> Tensor:
            bias = torch.arange(12.0)
            return F.linear(x.movedim(1, -1), self.inner.weight, bias).movedim(-1, 1)

    groups = channel_groups(Net(Computed()).eval(), torch.randn(1, 3, 6, 6))
    assert "computed" in groups["middle.inner"].reason


def test_tables_kept_between_calls_are_made_anew() -> None:
    class Kept(nn.Module):
        """LeViT keeps a table of biases while in evaluation mode."""

        def __init__(self) -> None:
            super().__init__()
            self.bias, self.table = nn.Parameter(torch.randn(12, 1, 1)), {}

        def train(self, mode: bool = True) -> Any:
            self.table = {}
            return super().train(mode)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.table.setdefault("bias", self.bias * 1)

    torch.manual_seed(0)
    model, example = Net(Kept()).eval(), torch.randn(1, 3, 6, 6)
    with torch.no_grad():
        model(example)
        groups = channel_groups(model, example)
        gone = some_gone(groups)
        masked = deepcopy(model)
        mask_channels(masked, groups, gone)
        shrink_channels(model, groups, gone)
        assert not model.training
        torch.testing.assert_close(model(example), masked(example), rtol=1e-4, atol=1e-5)


def test_our_attention_takes_what_timm_gives() -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.num_heads, self.qkv, self.proj = 2, nn.Linear(8, 24), nn.Linear(8, 8)
            self.attn_drop = nn.Dropout(0.0)

    torch.manual_seed(0)
    ours, x = QkvAttention(Whole()).eval(), torch.randn(2, 5, 8)
    seen = torch.ones(5, 5, dtype=torch.bool).tril()
    bias = torch.zeros(5, 5).masked_fill(~seen, float("-inf"))
    wanted = ours(x, attn_mask=bias)
    torch.testing.assert_close(ours(x, attn_mask=seen), wanted)
    torch.testing.assert_close(ours(x, is_causal=True), wanted)
    assert not torch.allclose(ours(x), wanted)


def test_standardised_weights_keep_their_channels() -> None:
    class Standardised(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            weight = F.batch_norm(self.weight.reshape(1, 12, -1), None, None, training=True)
            return F.conv2d(x, weight.reshape_as(self.weight), self.bias)

    groups = channel_groups(Net(Standardised(12, 12, 1)).eval(), torch.randn(1, 3, 6, 6))
    assert "computed" in groups["stem"].reason
    assert not groups.prunable
    weighted = nn.utils.parametrizations.weight_norm(nn.Conv2d(12, 12, 1))
    groups = channel_groups(Net(weighted).eval(), torch.randn(1, 3, 6, 6))
    assert "computed" in groups["stem"].reason


def test_rounding_that_is_blown_up_refuses_nothing() -> None:
    class Steep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(70, 70, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return y + 3 * (1e7 * y.sum((2, 3), keepdim=True)).sin()

    torch.manual_seed(0)
    model, example = Net(Steep(), 70, 70).eval(), torch.randn(1, 3, 6, 6)
    groups = check_groups(model, channel_groups(model, example), example)
    assert [g.key for g in groups.fixed] == ["head"]
