"""How channels pass through layers with weights, norms and attention; see ``channel_trace``."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from secateur.models.channel_labels import FREE, along, changing, free, small
from secateur.models.channel_trace import Call, Rule, Trace

WHOLE = "_secateur_whole_groups"
"""On a grouped convolution that has lost groups: it goes on losing whole ones."""


def whole_groups(groups: int, each: int, module: nn.Module | None = None) -> bool:
    """Whether a grouped convolution loses whole groups, or the same channels of each.

    Args:
        groups: how many; each: its input channels.
    """
    return bool(getattr(module, WHOLE, groups >= each))


def convolution(trace: Trace, call: Call) -> Tensor:
    """``conv1d`` ... ``conv_transpose3d``, dense, grouped or depth-wise."""
    weight, bias = call.get(1, "weight"), call.get(2, "bias")
    transposed = "transpose" in call.name
    groups = call.get(6, "groups", 1)
    shape = call.out.shape
    labels = trace.certain(call.x)
    dim = labels.dim() - weight.dim() + 1
    wide = changing(trace.roots(labels))
    if any(d > dim for d in wide) and dim not in wide:
        trace.pin(labels, "is convolved with its neighbours")
    x = trace.line(labels, dim)
    if id(weight) not in trace.names:
        trace.pin(x, "meets a weight that is computed when the model runs")
        return free(shape)
    inputs, outputs = len(x), shape[dim]
    taps = prod(weight.shape[2:])
    places = call.x.shape[dim + 1 :] if transposed else shape[dim + 1 :]
    factor = 2.0 * taps * prod(places) * prod(shape[:dim])
    first, second = (1, 0) if transposed else (0, 1)  # dims of outputs and inputs in the weight
    if groups == 1:
        y = trace.new(weight, outputs).expand(outputs)
        trace.touch(weight, second, "reads", x, x)
        trace.touch(weight, first, "writes", y, y)
        trace.touch(bias, 0, "writes", y, y)
        trace.cost("conv", factor, x, y)
        return along(y, dim, shape)
    each = inputs // groups
    owner = trace.modules.get(trace.names[id(weight)].rpartition(".")[0])
    if whole_groups(groups, each, owner):
        grouped = x.view(groups, each)
        trace.atoms.merge(grouped, grouped[:, :1].expand(grouped.shape))
        if not hasattr(trace.module(), "groups"):  # no convolution, and it counts its groups
            trace.sized_by(groups, grouped)
        if each > 1 and bool((grouped < 0).any()):
            trace.pin(x, "shares a group of a convolution with a fixed channel")
        y = grouped[:, 0].repeat_interleave(outputs // groups)
        trace.touch(weight, 0, "per_unit", x if transposed else y, x if transposed else y)
        trace.touch(bias, 0, "per_unit", y, y)
        trace.cost("depthwise" if each == 1 else "grouped", factor * each, y)
        return along(y, dim, shape)
    grouped = x.view(groups, each)
    trace.atoms.merge(grouped, grouped[:1].expand(grouped.shape))
    y = trace.new(weight, outputs)
    same = y.view(groups, -1)
    trace.atoms.merge(same, same[:1].expand(same.shape))
    if transposed:  # (in, out / groups, ...)
        trace.touch(weight, 0, "reads", x, x)
        trace.touch(weight, 1, "writes", same[0].contiguous(), y)
    else:
        trace.touch(weight, 1, "reads", grouped[0].contiguous(), x)
        trace.touch(weight, 0, "writes", y, y)
    trace.touch(bias, 0, "writes", y, y)
    trace.cost("grouped", factor / groups, x, y)
    return along(y, dim, shape)


def linear(trace: Trace, call: Call) -> Tensor:
    """``x W^T + b`` over the last dimension."""
    weight, bias = call.get(1, "weight"), call.get(2, "bias")
    labels = trace.certain(call.x)
    shape = call.out.shape
    if id(weight) not in trace.names:
        known = trace.labels(weight)
        if known is None:
            trace.pin(labels, "meets a weight that is computed when the model runs")
            return free(shape)
        return _contract(trace, labels, known.mT, shape)
    wide = changing(labels)
    rows = prod(shape[:-1])
    if wide and labels.dim() - 1 not in wide:  # positions are mixed, for each channel alike
        each = small(labels)
        trace.cost("linear", 2.0 * rows * prod(weight.shape) / each.numel(), each.reshape(-1))
        return labels.narrow(-1, 0, 1).expand(shape)
    x = trace.line(labels, -1)
    y = trace.new(weight, shape[-1]).expand(shape[-1])
    trace.touch(weight, 1, "reads", x, x)
    trace.touch(weight, 0, "writes", y, y)
    trace.touch(bias, 0, "writes", y, y)
    trace.cost("linear", 2.0 * rows, x, y)
    return along(y, -1 % len(shape), shape)


def product(trace: Trace, call: Call) -> Tensor:
    """``matmul`` and ``bmm`` of two activations."""
    left, right = call.tensors()[:2]
    if call.name == "rmatmul":
        left, right = right, left
    if left.dim() < 2 or right.dim() < 2:
        known = [k for t in (left, right) if (k := trace.labels(t)) is not None]
        trace.lost(call.name, known)
        return free(call.out.shape)
    parts = []
    for tensor in (left, right):
        found = trace.labels(tensor)
        parts.append(free(tensor.shape) if found is None else found)
    return _contract(trace, parts[0], parts[1], call.out.shape)


def einsum(trace: Trace, call: Call) -> Tensor:
    """``einsum`` of two activations whose letters are all written out."""
    operands = call.tensors()
    known = [k for t in operands if (k := trace.labels(t)) is not None]
    inputs, arrow, output = str(call.get(0, "equation")).replace(" ", "").partition("->")
    letters = inputs.split(",")
    plain = arrow and "." not in inputs and all(len(set(part)) == len(part) for part in letters)
    if not plain or len(operands) != 2:
        trace.lost(call.name, known)
        return free(call.out.shape)
    parts = [(t, trace.labels(t)) for t in operands]
    left, right = (free(t.shape) if k is None else k for t, k in parts)
    return _sum_over(trace, left, letters[0], right, letters[1], output, call.out.shape)


def _contract(trace: Trace, left: Tensor, right: Tensor, shape: Any) -> Tensor:
    """Labels of ``left @ right``, (..., i, k) and (..., k, j), with batch dimensions in front."""
    batch = "".join(chr(ord("a") + n) for n in range(len(shape) - 2))
    a = left.reshape((1,) * (len(shape) - left.dim()) + tuple(left.shape))
    b = right.reshape((1,) * (len(shape) - right.dim()) + tuple(right.shape))
    return _sum_over(trace, a, batch + "XZ", b, batch + "ZY", batch + "XY", shape)


def _sum_over(
    trace: Trace, left: Tensor, a: str, right: Tensor, b: str, out: str, shape: Any
) -> Tensor:
    """Labels of a product of two tensors summed over the letters that are not in ``out``.

    What is summed goes from both at once; where both have channels that do not meet so, all of
    them become one, which is too much and never wrong.
    """
    inner = [letter for letter in dict.fromkeys(a + b) if letter not in out]
    letters = [*out, *inner]
    sizes = {n: max(p, 1) for n, p in zip(out, shape, strict=True)}
    for labels, names in ((left, a), (right, b)):
        sizes |= {n: max(sizes.get(n, 1), d) for n, d in zip(names, labels.shape, strict=True)}

    def arranged(labels: Tensor, names: str) -> Tensor:
        labels = small(labels)
        labels = labels.permute([names.index(n) for n in letters if n in names])
        place = iter(labels.shape)
        return labels.reshape([next(place) if n in names else 1 for n in letters])

    parts = [arranged(left, a), arranged(right, b)]
    wide = [max(p, q) for p, q in zip(parts[0].shape, parts[1].shape, strict=True)]
    one, two = (part.expand(wide) for part in parts)
    trace.atoms.merge(one, two)
    total = torch.where(one >= 0, one, two)
    missing = ((one < 0) | (two < 0)) & (total >= 0)
    summed = [letters.index(n) for n in inner]
    if set(summed) & set(changing(total)) and bool(missing.any()):
        trace.pin(total[missing], "meets a tensor of fixed size in a product")
    trace.cost("product", 2.0 * prod(sizes.values()) / max(1, total.numel()), total.reshape(-1))
    roots = first = trace.atoms.find(total)
    for dim in summed:
        first = first.narrow(dim, 0, 1)
    alike = roots == first
    for dim in sorted(summed, reverse=True):
        alike, first = alike.all(dim), first.squeeze(dim)
    return torch.where(alike, first, torch.tensor(FREE)).expand(tuple(shape))


def attention(trace: Trace, call: Call) -> Tensor:
    """``scaled_dot_product_attention``; its scale needs every channel of a head."""
    found = []
    for place, name in enumerate(("query", "key", "value")):
        tensor = call.get(place, name)
        labels = trace.labels(tensor)
        labels = free(tensor.shape) if labels is None else labels
        if place < 2 and labels.dim() - 1 in changing(trace.roots(labels)):
            first = labels.narrow(-1, 0, 1)
            trace.atoms.merge(small(labels), first.expand(labels.shape)[_like(labels)])
        found.append(labels)
    query, key, value = found
    scores = _contract(trace, query, key.mT, [*query.shape[:-1], key.shape[-2]])
    mask = call.get(3, "attn_mask")
    if mask is not None:
        scores = trace.met([scores, trace.operand(mask)], scores.shape)
    return _contract(trace, scores, value, call.out.shape)


def _like(labels: Tensor) -> tuple[slice, ...]:
    return tuple(slice(0, size) for size in small(labels).shape)


_MULTI_HEAD = (
    *("query", "key", "value", "embed_dim_to_check", "num_heads", "in_proj_weight", "in_proj_bias"),
    *("bias_k", "bias_v", "add_zero_attn", "dropout_p", "out_proj_weight", "out_proj_bias"),
    *("training", "key_padding_mask", "need_weights", "attn_mask", "use_separate_proj_weight"),
    *("q_proj_weight", "k_proj_weight", "v_proj_weight"),
)
"""The arguments of ``F.multi_head_attention_forward``, in order."""


def multi_head(trace: Trace, call: Call) -> list[Tensor | None]:
    """``nn.MultiheadAttention``: a unit of its inside is a head."""
    given = {n: call.get(i, n) for i, n in enumerate(_MULTI_HEAD)}
    lines = [trace.line(trace.certain(given[n]), -1) for n in ("query", "key", "value")]
    heads, width = int(given["num_heads"]), int(given["embed_dim_to_check"])
    out = call.out[0]
    separate = bool(given["use_separate_proj_weight"])
    if given["bias_k"] is not None or given["add_zero_attn"]:
        for line in lines:
            trace.pin(line, "meets an attention with added keys")
    weights = [given[f"{n}_proj_weight"] for n in "qkv"]
    inside = trace.new(given["out_proj_weight"], heads) if heads > 1 else torch.tensor([FREE])
    each = inside.repeat_interleave(width // heads)
    if separate:
        for weight, line in zip(weights, lines, strict=True):
            trace.touch(weight, 1, "reads", line, line)
            trace.touch(weight, 0, "writes", each, each)
    else:
        for line in lines[1:]:
            trace.atoms.merge(line, lines[0])
        trace.touch(given["in_proj_weight"], 1, "reads", lines[0], lines[0])
        trace.touch(given["in_proj_weight"], 0, "writes", each.repeat(3), each)
    trace.touch(given["in_proj_bias"], 0, "writes", each.repeat(3), each)
    trace.touch(given["out_proj_weight"], 1, "reads", each, each)
    made = trace.new(given["in_proj_weight"] if not separate else weights[0], width)
    trace.touch(given["out_proj_weight"], 0, "writes", made, made)
    trace.touch(given["out_proj_bias"], 0, "writes", made, made)
    trace.counts.append((trace.here, "num_heads", inside))
    asked, seen = prod(given["query"].shape[:-1]), prod(given["key"].shape[:-1])
    trace.cost("linear", 2.0 * asked, lines[0], each)
    trace.cost("linear", 2.0 * seen, lines[1], each)
    trace.cost("linear", 2.0 * seen, lines[2], each)
    trace.cost("product", 4.0 * asked * given["key"].shape[0], each)
    trace.cost("linear", 2.0 * asked, each, made)
    weights_out = None if call.out[1] is None else free(call.out[1].shape)
    return [along(made, out.dim() - 1, out.shape), weights_out]


# -- norms ----------------------------------------------------------------------------------------


def batch_norm(trace: Trace, call: Call) -> Tensor:
    """Batch and instance norm: statistics and affine numbers of each channel."""
    labels = trace.certain(call.x)
    line = trace.line(labels, 1)
    names = ("running_mean", "running_var", "weight", "bias")
    for place, name in enumerate(names, start=1):
        tensor = call.get(place, name)
        if tensor is None:
            continue
        if id(tensor) not in trace.names:
            trace.pin(line, "meets a norm whose numbers are computed")
        else:
            trace.touch(tensor, 0, "norm", line)
    return labels


def layer_norm(trace: Trace, call: Call) -> Tensor:
    """A norm over channels: those that stay are normalised among themselves."""
    return _over_channels(trace, call, call.get(2, "weight"), call.get(3, "bias"))


def rms_norm(trace: Trace, call: Call) -> Tensor:
    """The same without a mean."""
    return _over_channels(trace, call, call.get(2, "weight"), None)


def _over_channels(trace: Trace, call: Call, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    labels = trace.certain(call.x)
    sizes = call.get(1, "normalized_shape")
    dims = range(labels.dim() - len(sizes), labels.dim())
    wide = [d for d in changing(trace.roots(labels)) if d in dims]
    if not wide:
        return labels
    if len(sizes) > 1 or not _owns(trace, weight):
        trace.pin(
            labels, f"goes through a {call.name.replace('_', ' ')} that cannot be made narrower"
        )
        return labels
    _normed(trace, trace.line(labels, -1), weight, bias)
    return labels


def _owns(trace: Trace, weight: Tensor | None) -> bool:
    """Whether a norm's numbers are those of the module it is in, which can be told its width."""
    return weight is not None and trace.names.get(id(weight)) == f"{trace.here}.weight".lstrip(".")


def _normed(trace: Trace, line: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    trace.touch(weight, 0, "norm", line)
    trace.touch(bias, 0, "norm", line)
    trace.normed.append(line)


def group_norm(trace: Trace, call: Call) -> Tensor:
    """A norm over groups of channels, which go as a whole; over one group as a layer norm."""
    labels = trace.certain(call.x)
    line = trace.line(labels, 1)
    groups, weight, bias = call.get(1, "num_groups"), call.get(2, "weight"), call.get(3, "bias")
    if not _owns(trace, weight) or (groups > 1 and bool((line < 0).any())):
        trace.pin(line, "goes through a group norm that cannot be made narrower")
        return labels
    if groups == 1:
        _normed(trace, line, weight, bias)
        return labels
    grouped = line.view(groups, -1)
    trace.atoms.merge(grouped, grouped[:, :1].expand(grouped.shape))
    trace.touch(weight, 0, "norm", line)
    trace.touch(bias, 0, "norm", line)
    return labels


LAYERS: dict[str, Rule] = (
    dict.fromkeys([f"conv{d}d" for d in "123"], convolution)
    | dict.fromkeys([f"conv_transpose{d}d" for d in "123"], convolution)
    | dict.fromkeys(["batch_norm", "instance_norm"], batch_norm)
    | {
        "linear": linear,
        "multi_head_attention_forward": multi_head,
        "layer_norm": layer_norm,
        "rms_norm": rms_norm,
        "group_norm": group_norm,
    }
)
"""Those whose first argument is the activation and whose others are weights."""
PRODUCTS: dict[str, Rule] = (
    LAYERS
    | dict.fromkeys(["matmul", "bmm", "rmatmul"], product)
    | {"scaled_dot_product_attention": attention, "einsum": einsum}
)
