"""Networks of another library, written without a thought of pruning: read, tried, cut."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from channel_cases import liven, some_gone

from secateur.models.channel_check import check_groups
from secateur.models.channel_graph import channel_groups
from secateur.models.channel_surgery import mask_channels, shrink_channels

transformers = pytest.importorskip("transformers")

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
PATCHES = {**SMALL, "intermediate_size": 32, "image_size": 32, "patch_size": 8}
STAGES = {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 2]}
NETS: dict[str, tuple[dict[str, Any], int, set[str]]] = {  # settings, image size, kinds that can go
    "ResNet": ({**STAGES, "layer_type": "bottleneck"}, 32, {"channel"}),
    "RegNet": ({**STAGES, "groups_width": 8}, 32, {"channel"}),
    "MobileNetV2": ({"depth_multiplier": 0.35, "image_size": 64}, 64, {"channel"}),
    "ConvNext": (
        {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2},
        32,
        {"stem", "channel"},
    ),
    "ViT": (PATCHES, 32, {"stem", "head", "channel"}),
    "Beit": (PATCHES, 32, {"stem", "head", "channel"}),
    "Swin": (
        {"embed_dim": 8, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
        | {"image_size": 64, "patch_size": 2},
        64,
        {"stem", "head", "channel"},
    ),
    "PoolFormer": ({"hidden_sizes": [8, 16, 16, 16], "depths": [1] * 4}, 64, {"stem", "channel"}),
}


@pytest.mark.parametrize("name", NETS)
def test_masked_is_sliced(name: str) -> None:
    settings, size, kinds = NETS[name]
    config = getattr(transformers, f"{name}Config")(**settings, num_labels=5)
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForImageClassification")(config).eval()
    liven(model)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "layer_scale" in key or "lambda" in key:  # they start near zero
                parameter.add_(0.5)
    example = torch.zeros(1, 3, size, size)
    groups = check_groups(model, channel_groups(model, example), example)
    assert {g.kind for g in groups.prunable} == kinds
    gone = some_gone(groups)
    masked, cut = deepcopy(model), deepcopy(model)
    mask_channels(masked, groups, gone)
    shrink_channels(cut, groups, gone)
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        wanted, found = masked(x).logits, cut(x).logits
        assert (wanted - model(x).logits).abs().max() > 1e-4
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
