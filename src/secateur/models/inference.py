"""A copy of a vision network for inference only: batch norms folded, clamps merged, tap lists in.

The network is traced with ``torch.fx``. A batch norm after a convolution becomes part of its
weights; a ReLU or ReLU6 after a masked depth-wise convolution becomes the clamp at the end of its
kernel, which saves a pass over memory. What cannot be traced only gets the tap lists. The copy is
run beside the network and refused if they differ.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval

from secateur.errors import VerificationError
from secateur.kernels.depthwise import computes_plainly
from secateur.models.sparse_depthwise import SparseDepthwise, sparsify
from secateur.models.vision.outputs import logits_of

_CLAMPS: dict[Any, tuple[float, float]] = {
    F.relu: (0.0, math.inf),
    torch.relu: (0.0, math.inf),
    F.relu6: (0.0, 6.0),
    "relu": (0.0, math.inf),
    "relu_": (0.0, math.inf),
}
TOLERANCE = 1e-3
"""Largest difference allowed between the copy and the network, of the largest output."""


def inference_copy(
    model: nn.Module, masks: Mapping[str, Tensor], example: Tensor, *, merge: bool = True
) -> nn.Module:
    """The fastest form of ``model`` that there is here; the model stays as it is.

    Args:
        masks: weight name -> True where gone; those of depth-wise layers become tap lists.
        example: an input; the two are compared on it.
        merge: fold batch norms and clamps too.

    Returns:
        A module in evaluation mode whose outputs are the model's to rounding.

    Raises:
        VerificationError: they differ.
    """
    with torch.no_grad():
        before = copy.deepcopy(model).eval()
        for name, mask in masks.items():
            weight = before.get_parameter(name)
            weight.masked_fill_(mask.to(weight.device), 0)
        wanted = logits_of(before(example))
        merged = _merged(before, masks) if merge else None
        if merged is None:
            merged = before
            sparsify(merged, masks)
        for parameter in merged.parameters():
            parameter.requires_grad_(False)
        got = logits_of(merged(example))
    gap = float((got - wanted).abs().max() / wanted.abs().max().clamp_min(1e-12))
    if not gap <= TOLERANCE:
        raise VerificationError(
            f"the network for inference differs from the pruned one by {gap:.1e}",
            field="model",
            value=type(model).__name__,
        )
    return merged


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, SparseDepthwise) or super().is_leaf_module(m, module_qualified_name)


def _merged(model: nn.Module, masks: Mapping[str, Tensor]) -> nn.Module | None:
    """The traced network with all merged; None if it cannot be traced."""
    try:
        graph = fx.GraphModule(model, _Tracer().trace(model))
    except Exception:  # anything may go wrong in a stranger's forward: then nothing is merged
        return None
    modules = dict(graph.named_modules())
    fold_norms(graph, modules)
    graph.recompile()
    names = [n for n in masks if n.removesuffix(".weight") in modules]
    sparsify(graph, {n: masks[n] for n in names})
    modules = dict(graph.named_modules())
    for node in list(graph.graph.nodes):
        clamp = _clamp(node, modules)
        source = node.args[0] if clamp and node.args else None
        if not isinstance(source, fx.Node) or len(source.users) != 1 or source.op != "call_module":
            continue
        layer = modules.get(str(source.target))
        if not isinstance(layer, SparseDepthwise) or layer.clamps:
            continue
        if _calls(graph, str(source.target)) == 1:
            assert clamp is not None
            layer.low, layer.high = clamp
            node.replace_all_uses_with(source)
            graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()
    graph.delete_all_unused_submodules()
    graph.recompile()
    return graph.eval()


def fold_norms(graph: fx.GraphModule, modules: dict[str, nn.Module]) -> int:
    """Make every batch norm that follows a convolution alone part of it; returns how many."""
    folded = 0
    for node in list(graph.graph.nodes):
        norm = modules.get(str(node.target)) if node.op == "call_module" else None
        source = node.args[0] if node.args else None
        if not isinstance(norm, _BatchNorm) or not isinstance(source, fx.Node):
            continue
        conv = modules.get(str(source.target)) if source.op == "call_module" else None
        alone = len(source.users) == 1 and _calls(graph, str(source.target)) == 1
        if not isinstance(conv, nn.Conv2d) or not alone or norm.running_mean is None:
            continue
        if not computes_plainly(conv) or (isinstance(conv, SparseDepthwise) and conv.clamps):
            continue
        fused = fuse_conv_bn_eval(conv, norm)
        parent, _, child = str(source.target).rpartition(".")
        setattr(graph.get_submodule(parent), child, fused)
        modules[str(source.target)] = fused
        node.replace_all_uses_with(source)
        graph.graph.erase_node(node)
        folded += 1
    return folded


def _calls(graph: fx.GraphModule, name: str) -> int:
    return sum(n.op == "call_module" and n.target == name for n in graph.graph.nodes)


def _clamp(node: fx.Node, modules: Mapping[str, nn.Module]) -> tuple[float, float] | None:
    """The bounds of an activation that is a clamp."""
    if node.op in ("call_function", "call_method"):
        return _CLAMPS.get(node.target)
    module = modules.get(str(node.target)) if node.op == "call_module" else None
    if isinstance(module, nn.Hardtanh):  # nn.ReLU6 is one
        return float(module.min_val), float(module.max_val)
    return (0.0, math.inf) if isinstance(module, nn.ReLU) else None
