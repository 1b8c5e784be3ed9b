"""The groups of another implementation, where it is known to be right: plain residual and depth-wise nets."""

from __future__ import annotations

import pytest
from channel_cases import network
from torch import nn

from secateur.models.channel_graph import channel_groups

pruning = pytest.importorskip("torch_pruning")


@pytest.mark.parametrize("name", ["resnet", "wrn", "mobilenet", "gated mobilenet", "dense"])
def test_the_same_layers_hang_together(name: str) -> None:
    model, example = network(name)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    graph = pruning.DependencyGraph().build_dependency(model, example_inputs=example)
    names = {module: key for key, module in model.named_modules()}
    for group in channel_groups(model, example).prunable:
        root = model.get_submodule(group.producers[0])
        assert isinstance(root, nn.Conv2d)
        unit = int(group.outputs[0].index[0, 0])
        found = graph.get_pruning_group(root, pruning.prune_conv_out_channels, [unit])
        written, read = set(), set()
        for dependency, _ in found:
            module = dependency.target.module
            if module not in names:
                continue
            kind = dependency.handler.__name__
            (read if "in_channels" in kind else written).add(names[module])
        layers = {n for n in written if isinstance(model.get_submodule(n), nn.Conv2d | nn.Linear)}
        assert layers == set(group.producers) | set(group.depthwise)
        assert read - set(group.depthwise) == set(group.consumers)
        norms = {n for n in written if isinstance(model.get_submodule(n), nn.BatchNorm2d)}
        assert norms == set(group.norms)
