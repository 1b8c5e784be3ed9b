"""Networks with tap lists inside: the same outputs, gradients, state; and back."""

import copy
import io
import math
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from secateur.errors import UsageError, VerificationError
from secateur.kernels.depthwise import is_depthwise
from secateur.models import inference
from secateur.models.inference import inference_copy
from secateur.models.sparse_depthwise import SparseDepthwise, densify, sparse_state, sparsify
from secateur.models.vision.mobilenet import MobileNet
from tests.models.test_dead_channels import lively


def masks_of(model, ratio=0.7):
    generator = torch.Generator().manual_seed(3)
    return {
        f"{name}.weight": torch.rand(m.weight.shape, generator=generator) < ratio
        for name, m in model.named_modules()
        if is_depthwise(m)
    }


def zeroed(model, masks):
    model = copy.deepcopy(model)
    for name, mask in masks.items():
        model.get_parameter(name).data[mask] = 0
    return model


@pytest.fixture(scope="module")
def net():
    return lively(MobileNet(gate=True))


def test_same_outputs_with_and_without_gradients(net):
    masks, x = masks_of(net), torch.randn(2, 1, 28, 28)
    wanted = zeroed(net, masks)(x)
    model = copy.deepcopy(net)
    names = sparsify(model, masks)
    assert len(names) == 5
    assert torch.allclose(model(x), wanted, atol=1e-4)  # dense, with a gradient
    with torch.no_grad():
        assert torch.allclose(model(x), wanted, atol=1e-4)  # tap lists
    assert model.blocks[0].depthwise._taps is not None


def test_training_never_touches_the_gone(net):
    masks, x = masks_of(net), torch.randn(2, 1, 28, 28)
    model = copy.deepcopy(net)
    sparsify(model, masks)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torch.no_grad():
        before = model(x)
    F.cross_entropy(model(x), torch.tensor([1, 2])).backward()
    for name, mask in masks.items():
        assert not model.get_parameter(name).grad[mask].any()
        assert model.get_parameter(name).grad[~mask].any()
    optimizer.step()
    with torch.no_grad():  # the lists follow the weights
        after = model(x)
    assert not torch.allclose(before, after)
    with torch.no_grad():
        densify(model)
        assert torch.allclose(model(x), after, atol=1e-4)


def test_there_and_back(net):
    masks = masks_of(net)
    model = copy.deepcopy(net)
    weight = model.blocks[1].depthwise.weight
    sparsify(model, masks)
    assert model.blocks[1].depthwise.weight is weight
    back = densify(model)
    assert back.keys() == masks.keys()
    assert all(torch.equal(back[k], masks[k]) for k in masks)
    assert type(model.blocks[1].depthwise) is nn.Conv2d
    assert model.blocks[1].depthwise.weight is weight
    assert model.state_dict().keys() == net.state_dict().keys()
    assert all(not model.get_parameter(n)[m].any() for n, m in masks.items())


def test_state_dict_brings_its_masks(net):
    masks, x = masks_of(net), torch.randn(1, 1, 28, 28)
    model = copy.deepcopy(net)
    sparsify(model, masks)
    other = MobileNet(gate=True).eval()
    assert len(sparse_state(other, model.state_dict())) == 5
    with torch.no_grad():
        assert torch.equal(other(x), model(x))
    assert other.blocks[0].depthwise.taps_left == int((~masks["blocks.0.depthwise.weight"]).sum())
    assert "taps=" in repr(other)


@pytest.mark.parametrize("gate", [True, False])
def test_inference_copy(gate):
    model = lively(MobileNet(gate=gate))
    masks, x = masks_of(model), torch.randn(2, 1, 28, 28)
    state = copy.deepcopy(model.state_dict())
    fast = inference_copy(model, masks, x)
    with torch.no_grad():
        assert torch.allclose(fast(x), zeroed(model, masks)(x), atol=1e-3)
    kinds = [type(m) for m in fast.modules()]
    assert nn.BatchNorm2d not in kinds
    layers = [m for m in fast.modules() if isinstance(m, SparseDepthwise)]
    assert [(m.low, m.high) for m in layers] == [(0.0, 6.0)] * 5
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    with pytest.raises(UsageError, match="merged"):
        densify(fast)


def test_inference_copy_without_tracing():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.dw, self.bn = nn.Conv2d(4, 4, 3, groups=4), nn.BatchNorm2d(4)

        def forward(self, x):
            y = self.bn(self.dw(x))
            return y if float(x.sum()) > 0 else -y

    model = lively(Branches())
    masks, x = masks_of(model), torch.randn(1, 4, 8, 8)
    fast = inference_copy(model, masks, x)
    with torch.no_grad():
        assert torch.allclose(fast(x), zeroed(model, masks)(x), atol=1e-4)
    assert isinstance(fast.dw, SparseDepthwise)


def test_clamps_and_norms_that_others_read_too_stay():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.dw, self.bn, self.act = nn.Conv2d(4, 4, 3, groups=4), nn.BatchNorm2d(4), nn.ReLU()

        def forward(self, x):
            y = self.dw(x)
            z = self.bn(y)
            return y + z + self.act(z)

    model = lively(Shared())
    masks, x = masks_of(model), torch.randn(1, 4, 8, 8)
    fast = inference_copy(model, masks, x)
    with torch.no_grad():
        assert torch.allclose(fast(x), zeroed(model, masks)(x), atol=1e-4)
    assert fast.dw.high == math.inf


def test_a_copy_that_differs_is_refused(net, monkeypatch):
    monkeypatch.setattr(inference, "_CLAMPS", {F.relu6: (0.0, 1.0), F.relu: (0.0, math.inf)})
    with pytest.raises(VerificationError, match="differs"):
        inference_copy(net, masks_of(net), torch.randn(2, 1, 28, 28))


@pytest.mark.slow
def test_onnx_is_dense_with_zeros(net, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    masks, x = masks_of(net), torch.randn(2, 1, 28, 28)
    model = copy.deepcopy(net)
    sparsify(model, masks)
    with torch.no_grad():
        wanted = model(x)
    path = tmp_path / "net.onnx"
    densify(model)
    torch.onnx.export(model, (x,), path, dynamo=True)
    session = onnxruntime.InferenceSession(str(path))
    (seen,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert torch.allclose(torch.from_numpy(seen), wanted, atol=1e-3)


def test_bad_input(net):
    model = copy.deepcopy(net)
    with pytest.raises(UsageError, match="no such weight"):
        sparsify(model, {"blocks.9.depthwise.weight": torch.ones(1, dtype=torch.bool)})
    with pytest.raises(UsageError, match="mask is"):
        sparsify(model, {"blocks.0.depthwise.weight": torch.ones(3, 1, 3, 3, dtype=torch.bool)})
    assert not any(isinstance(m, SparseDepthwise) for m in model.modules())
    # masks of other layers are somebody else's
    assert sparsify(model, {"stem.weight": torch.ones_like(model.stem.weight).bool()}) == []
    with pytest.raises(UsageError, match="depth-wise"):
        SparseDepthwise(nn.Conv2d(4, 4, 3), torch.ones(4, 4, 3, 3, dtype=torch.bool))


def small():
    """Two depth-wise layers, a clamp behind one."""
    torch.manual_seed(0)
    return lively(
        nn.Sequential(
            nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.ReLU6(),
            nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 4, 1),
        )
    )  # fmt: skip


@pytest.mark.parametrize("made", [lambda net, m, x: inference_copy(net, m, x), None])
def test_copies_and_every_way_of_running(made):
    net, x = small(), torch.randn(2, 3, 9, 9)
    masks = masks_of(net)
    wanted = zeroed(net, masks)(x).detach()
    model = copy.deepcopy(net)
    if made is None:
        sparsify(model, masks)
    else:
        model = made(net, masks, x)
    with torch.no_grad():
        model(x)
        stream = io.BytesIO()
        torch.save(model, stream)
        stream.seek(0)
        for other in (copy.deepcopy(model), torch.load(stream, weights_only=False)):
            assert all(m._taps is None for m in other.modules() if isinstance(m, SparseDepthwise))
            assert torch.allclose(other(x), wanted, atol=1e-5)
        assert torch.allclose(torch.func.vmap(model)(x[:, None])[:, 0], wanted, atol=1e-5)
        assert torch.allclose(torch.fx.symbolic_trace(model)(x), wanted, atol=1e-5)
        assert torch.allclose(torch.export.export(model, (x,)).module()(x), wanted, atol=1e-5)
        assert torch.allclose(torch.jit.trace(model, (x,))(x), wanted, atol=1e-5)
        assert model(x[:0]).shape == (0, 4, 9, 9)
        last = x.contiguous(memory_format=torch.channels_last)
        assert torch.allclose(model(last), wanted, atol=1e-5)
    across = torch.ones_like(x)
    slope = torch.func.jvp(model, (x,), (across,))[1]
    assert torch.allclose(slope, torch.func.jvp(zeroed(net, masks), (x,), (across,))[1], atol=1e-5)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, across)
        assert torch.autograd.forward_ad.unpack_dual(model(dual)).tangent is not None


def test_in_inference_mode():
    net, x = small(), torch.randn(2, 3, 9, 9)
    masks = masks_of(net)
    with torch.inference_mode():
        model = copy.deepcopy(net)  # its tensors have no version to look at
        sparsify(model, masks)
        first = model(x)
        assert torch.allclose(first, zeroed(net, masks)(x), atol=1e-5)
        assert torch.allclose(inference_copy(net, masks, x)(x), first, atol=1e-5)
        for parameter in model.parameters():
            parameter.mul_(2)
        assert not torch.allclose(model(x), first)


class Shifted(nn.Conv2d):
    """As timm's for TensorFlow's weights: it pads by itself."""

    def forward(self, x):
        return super().forward(F.pad(x, (0, 2, 0, 2)))


def test_layers_that_are_no_lists_keep_their_zeros():
    def wide(**options):
        return nn.Conv2d(8, 8, 3, groups=8, **options)

    torch.manual_seed(0)
    net = lively(
        nn.Sequential(
            nn.Conv2d(3, 8, 1), Shifted(8, 8, 3, groups=8), nn.BatchNorm2d(8),
            wide(padding=1, padding_mode="reflect"), nn.BatchNorm2d(8), wide(), nn.BatchNorm2d(8),
        )
    )  # fmt: skip
    x, masks = torch.randn(2, 3, 9, 9), masks_of(net)
    fast = inference_copy(net, masks, x)
    assert sum(isinstance(m, SparseDepthwise) for m in fast.modules()) == 1
    with torch.no_grad():
        assert torch.allclose(fast(x), zeroed(net, masks)(x), atol=1e-4)
        assert sparsify(net, masks) == ["5"]
    net = nn.Sequential(nn.utils.parametrizations.weight_norm(wide()), nn.BatchNorm2d(8))
    lively(net)
    x = torch.randn(1, 8, 9, 9)
    assert torch.allclose(inference_copy(net, {}, x)(x), net(x), atol=1e-5)


def test_what_was_merged_stays_merged():
    net, x = small(), torch.randn(2, 3, 9, 9)
    masks = masks_of(net)
    fast = inference_copy(net, masks, x)
    with torch.no_grad():
        again = inference_copy(fast, {}, x)  # a sparse network is traced around its lists
        assert sum(isinstance(m, SparseDepthwise) for m in again.modules()) == 2
        assert torch.allclose(again(x), fast(x), atol=1e-6)
        wanted = fast(x)
        assert len(sparsify(fast, masks)) == 2  # a new mask, the old clamp
        assert torch.allclose(fast(x), wanted, atol=1e-6)
    behind = lively(nn.Sequential(*fast.children(), nn.BatchNorm2d(4)))
    assert torch.allclose(inference_copy(behind, {}, x)(x), behind(x), atol=1e-4)


def test_logits_inside_an_output():
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = small()

        def forward(self, x):
            return types.SimpleNamespace(logits=self.net(x))

    net, x = Wrapped().eval(), torch.randn(1, 3, 9, 9)
    masks = masks_of(net)
    with torch.no_grad():
        fast = inference_copy(net, masks, x)
        assert torch.allclose(fast(x).logits, zeroed(net, masks)(x).logits, atol=1e-5)
