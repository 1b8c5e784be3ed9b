"""How channels pass through torch's operations that multiply no weights; see ``channel_trace``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from secateur.models.channel_labels import FREE, along, changing, free, small
from secateur.models.channel_products import PRODUCTS
from secateur.models.channel_sizes import Sized, lists
from secateur.models.channel_trace import Call, Rule, Trace


def _words(text: str) -> list[str]:
    return text.split()


_HEADS = ("num_heads", "n_heads", "heads", "num_attention_heads", "n_head", "nhead")

ELEMENTWISE = _words("""
abs absolute add sub subtract mul multiply div divide true_divide floor_divide neg negative exp exp2
expm1 log log1p log2 log10 sqrt rsqrt square pow reciprocal sigmoid logsigmoid tanh tanhshrink relu
relu6 hardtanh hardswish hardsigmoid hardshrink softshrink silu gelu elu selu celu leaky_relu rrelu
softplus softsign mish threshold clamp clamp_min clamp_max clip dropout dropout1d dropout2d dropout3d
alpha_dropout feature_dropout feature_alpha_dropout contiguous to type type_as float double half
bfloat16 cpu cuda clone detach identity maximum minimum fmax fmin where lerp addcmul addcdiv erf erfc
sign sgn round floor ceil trunc frac sin cos tan asin acos atan atan2 sinh cosh logit nan_to_num
masked_fill isnan isinf isfinite eq ne lt le gt ge logical_and logical_or logical_not remainder fmod
zeros_like ones_like full_like empty_like rand_like randn_like bernoulli requires_grad positive rsub
radd rmul rtruediv rpow truediv iadd isub imul itruediv ipow and or invert copy fill fill_ zero alias
""")

SPATIAL = [
    f"{kind}_pool{d}d"
    for kind in ("avg", "max", "lp", "adaptive_avg", "adaptive_max")
    for d in "123"
]
LITERAL = _words("""
permute transpose t T mT H mH movedim moveaxis swapaxes swapdims squeeze unsqueeze expand expand_as
repeat tile roll flip repeat_interleave broadcast_to pixel_shuffle pixel_unshuffle channel_shuffle
""")
REDUCTIONS = _words("""
mean sum nansum nanmean amax amin max min prod std var norm vector_norm logsumexp argmax argmin any
all median mode cumsum cumprod softmax log_softmax softmin normalize std_mean var_mean sort topk argsort
""")
_KEEPS_SHAPE = {"softmax", "log_softmax", "softmin", "normalize", "cumsum", "cumprod", "sort"}
_LAST = {"sort", "argsort", "topk"}


def elementwise(trace: Trace, call: Call) -> Tensor | None:
    """What meets element by element goes together."""
    return trace.joined(call.tensors(), call.out.shape)


def literal(trace: Trace, call: Call) -> Tensor:
    """Moves elements about: done on the labels as on the activation."""
    labels = trace.labels(call.x)
    assert labels is not None
    if call.name == "expand_as":
        return labels.expand(call.out.shape)
    if call.name == "repeat_interleave" and not isinstance(call.get(1, "repeats"), int):
        trace.lost(call.name, [labels])
        return free(call.out.shape)
    result: Tensor = call.func(labels, *call.args[1:], **call.kwargs)
    return result


def reshape(trace: Trace, call: Call) -> Tensor:
    """Splits and joins dimensions. Splitting channels couples them so that whole parts go."""
    before = trace.labels(call.x)
    assert before is not None
    after = before.reshape(call.out.shape)
    wide = changing(trace.roots(after))
    if len(wide) <= max(1, len(changing(trace.roots(before)))) or trace.only_parameter(before):
        _asked(trace, call, after)
        return after
    _asked(trace, call, after)
    unit, owner = wide[-1], None
    ordered = [wide[-2], *[d for d in wide if d != wide[-2]]]
    for module, attribute, value in _head_counts(trace):
        if value == 1:
            trace.atoms.merge(small(after), _first_of(after))
            trace.pin(after, "is a single head")
            return after
        found = next((d for d in ordered if after.shape[d] == value), None)
        if found is not None:
            unit, owner = found, (module, attribute)
            break
    first = small(after).movedim(unit, 0).reshape(after.shape[unit], -1)
    trace.atoms.merge(first, first[:, :1].expand(first.shape))
    if owner is not None:
        trace.counts.append((*owner, first[:, 0].contiguous()))
    return after


def _asked(trace: Trace, call: Call, after: Tensor) -> None:
    """Widths that a ``reshape`` was given, if the module has them in attributes."""
    given = call.args[1:] or call.kwargs.get("shape", ())
    sizes = given[0] if given and isinstance(given[0], list | tuple) else given
    if call.name not in ("view", "reshape") or len(sizes) != after.dim():
        return
    heads = {value for _, _, value in _head_counts(trace)}
    for dim in changing(after):
        if sizes[dim] == after.shape[dim] and sizes[dim] not in heads:
            line = _at(after, dim)
            trace.sized_by(sizes[dim], line)
            names = lists(trace.module(), sizes) if trace.here else []
            trace.sized += [Sized(trace.here, name, dim, line) for name in names]


def _at(labels: Tensor, dim: int) -> Tensor:
    """(n, m) labels of all that lies at each position of ``dim``."""
    return small(labels).movedim(dim, 0).reshape(labels.shape[dim], -1)


def _first_of(labels: Tensor) -> Tensor:
    labels = small(labels)
    return labels.reshape(-1)[:1].expand(labels.numel()).reshape(labels.shape)


def _head_counts(trace: Trace) -> list[tuple[str, str, int]]:
    """Attributes that say how many heads there are, innermost module first."""
    found = []
    for name in reversed(trace.stack):
        for attribute in _HEADS:
            value = getattr(trace.modules[name], attribute, None)
            if isinstance(value, int) and value > 0:
                found.append((name, attribute, value))
    return found


def index(trace: Trace, call: Call) -> Tensor:
    """``x[...]`` and its kin: numbers in the code that count channels must stay right."""
    labels = trace.labels(call.x)
    if labels is None:  # a constant looked up by something followed
        return free(call.out.shape)
    if any(isinstance(a, Tensor) and trace.labels(a) is not None for a in _parts(call.args[1:])):
        trace.lost(call.name, [labels])
        return free(call.out.shape)
    result: Tensor = call.func(labels, *map(_here, call.args[1:]), **call.kwargs)
    roots = trace.roots(labels)
    picked = any(_indexed(call, dim, labels.shape) for dim in changing(roots))
    if picked and not trace.only_parameter(labels):
        trace.pin(labels, "is indexed by numbers in the model's code")
    return result


def _here(value: Any) -> Any:
    """An index on the labels' device."""
    if isinstance(value, tuple | list):
        return type(value)(_here(part) for part in value)
    return value.cpu() if isinstance(value, Tensor) else value


def _parts(args: Any) -> list[Any]:
    return [p for a in args for p in (a if isinstance(a, tuple | list) else (a,))]


def _indexed(call: Call, dim: int, shape: torch.Size) -> bool:
    """Whether a call picks among the elements along ``dim``."""
    dims = len(shape)
    if call.name != "getitem":
        return bool(call.get(1, "dim") % dims == dim)
    items = call.args[1] if isinstance(call.args[1], tuple) else (call.args[1],)
    used = sum(_takes(item) for item in items)
    place = 0
    for item in items:
        if item is Ellipsis:
            place += dims - used
            continue
        for _ in range(_takes(item)):
            if place == dim and not _takes_all(item, shape[dim]):
                return True
            place += 1
    return False


def _takes_all(item: Any, size: int) -> bool:
    """Whether a slice leaves nothing out, nor would if there were fewer."""
    if not isinstance(item, slice) or item.step not in (None, 1):
        return False
    return item.start in (None, 0) and (item.stop is None or item.stop >= size)


def _takes(item: Any) -> int:
    if item is None or item is Ellipsis:
        return 0
    if isinstance(item, Tensor) and item.dtype == torch.bool:
        return item.dim()
    return 1


def pieces(trace: Trace, call: Call) -> list[Tensor]:
    """``chunk`` and ``split``: pieces stay alike when all of them lose the same."""
    labels = trace.labels(call.x)
    assert labels is not None
    dim = call.get(2, "dim", 0)
    if call.name == "unbind":
        dim = call.get(1, "dim", 0)
    dim %= labels.dim()
    if call.name == "unbind":
        parts = [p.squeeze(dim) for p in labels.split(1, dim)]
    else:
        parts = list(labels.split([p.shape[dim] for p in call.out], dim))
    if dim in changing(trace.roots(labels)):
        alike = all(p.shape == parts[0].shape for p in parts)
        known = call.name != "unbind" and _split_by(trace, call, parts, dim, not alike)
        if call.name == "unbind" or not (alike or known):
            trace.pin(labels, "is split at numbers in the model's code")
        elif alike:
            for part in parts[1:]:
                trace.atoms.merge(part, parts[0])
    return parts


def _split_by(trace: Trace, call: Call, parts: list[Tensor], dim: int, sure: bool) -> bool:
    """Whether the module has the sizes of the pieces in attributes."""
    sizes = call.get(1, "split_size_or_sections", call.get(1, "split_size"))
    if call.name == "chunk" or not trace.here:
        return False
    lines = [_at(part, dim) for part in parts]
    if isinstance(sizes, int):
        return not sure and trace.sized_by(sizes, lines[0])
    names = lists(trace.module(), [int(size) for size in sizes])
    trace.sized += [
        Sized(trace.here, name, place, line, sure)
        for name in names
        for place, line in enumerate(lines)
    ]
    # pieces given one by one; what no attribute says is what the others leave
    found = [trace.sized_by(int(n), line, sure) for n, line in zip(sizes, lines, strict=True)]
    return bool(names) or any(found)


def concatenate(trace: Trace, call: Call) -> Tensor:
    """``cat`` and ``stack``."""
    tensors = call.get(0, "tensors")
    known = [trace.labels(t) for t in tensors]
    parts = [free(t.shape) if k is None else k for t, k in zip(tensors, known, strict=True)]
    dim = call.get(1, "dim", 0)
    result = torch.stack(parts, dim) if call.name == "stack" else torch.cat(parts, dim)
    across = [d for d in changing(result) if d != dim % result.dim()]
    for part in parts:
        sizes = [small(part).shape[d] for d in across] if part.dim() == result.dim() else [0]
        if across and bool((small(part) == FREE).all()) and max(sizes) <= 1:
            trace.pin(result, "is joined with a tensor of fixed size")
            break
    return result


def pad(trace: Trace, call: Call) -> Tensor:
    """What is added beside channels belongs to none; beside positions it belongs to all."""
    labels = trace.labels(call.x)
    assert labels is not None
    widths = list(call.get(1, "pad"))
    for number in range(len(widths) // 2):
        dim = labels.dim() - 1 - number
        before, after = widths[2 * number], widths[2 * number + 1]
        size = labels.shape[dim] + before + after
        shape = [*labels.shape[:dim], size, *labels.shape[dim + 1 :]]
        if dim not in changing(labels):
            labels = labels.narrow(dim, 0, 1).expand(shape)
            continue
        wider = torch.full(shape, FREE)
        low, high = max(before, 0), size - max(after, 0)
        start = max(-before, 0)
        wider.narrow(dim, low, high - low).copy_(labels.narrow(dim, start, high - low))
        if before < 0 or after < 0 or call.get(2, "mode", "constant") != "constant":
            trace.pin(labels, "is cropped or padded by its own values")
        labels = wider
    return labels


def spatial(trace: Trace, call: Call) -> Any:
    """Pooling and resizing: each channel by itself."""
    labels = trace.labels(call.x)
    assert labels is not None
    outs = call.out if isinstance(call.out, tuple | list) else [call.out]
    shape = outs[0].shape
    digit = next((int(c) for c in call.name if c.isdigit()), None)
    dim = labels.dim() - 1 - digit if digit else 1
    line = trace.line(labels, dim)
    result = along(line, dim, shape)
    return result if isinstance(call.out, Tensor) else [result] * len(outs)


def unfold(trace: Trace, call: Call) -> Tensor:
    """``F.unfold``: each channel becomes as many as the window has positions."""
    labels = trace.labels(call.x)
    assert labels is not None
    if call.out.dim() != call.x.dim() - 1:  # Tensor.unfold
        trace.lost(call.name, [labels])
        return free(call.out.shape)
    line = trace.line(labels, labels.dim() - 3)
    dim = call.out.dim() - 2
    return along(line.repeat_interleave(call.out.shape[dim] // len(line)), dim, call.out.shape)


def reduction(trace: Trace, call: Call) -> Any:
    """Sums, means, softmax: over positions; over channels they need all of them."""
    labels = trace.labels(call.x)
    assert labels is not None
    if call.name in ("max", "min") and isinstance(call.get(1, "other"), Tensor):
        return trace.joined(call.tensors(), call.out.shape)
    place = 2 if call.name in ("norm", "vector_norm", "normalize", "topk") else 1
    dims = call.get(place, "dim", -1 if call.name in _LAST else None)
    dims = call.kwargs.get("axis", dims)
    if isinstance(dims, bool):
        dims = None
    if dims is None:
        dims = list(range(labels.dim())) if call.name != "normalize" else [1]
    dims = sorted({d % labels.dim() for d in (dims if isinstance(dims, list | tuple) else [dims])})
    roots = trace.roots(labels)
    mixed = set(dims) & set(changing(roots))
    if mixed and set(changing(roots)) - mixed:  # channels of several tensors side by side
        for dim in mixed:
            part = small(labels)
            trace.atoms.merge(part, part.narrow(dim, 0, 1).expand(part.shape))
        roots = trace.roots(labels)
        mixed = set(dims) & set(changing(roots))
    if mixed:
        trace.pin(labels, f"goes through '{call.name}' over channels")
    outs = [call.out] if isinstance(call.out, Tensor) else call.out
    results: list[Tensor | None] = []
    for out in outs:
        if not isinstance(out, Tensor):
            results.append(None)
        elif mixed:
            results.append(free(out.shape))
        elif tuple(out.shape) == tuple(labels.shape) and call.name in _KEEPS_SHAPE:
            results.append(labels)
        else:
            kept = roots
            for dim in reversed(dims):
                kept = kept.narrow(dim, 0, 1)
                if out.dim() < labels.dim():
                    kept = kept.squeeze(dim)
            results.append(kept.expand(out.shape))
    return results[0] if isinstance(call.out, Tensor) else results


def prelu(trace: Trace, call: Call) -> Tensor:
    """One slope, or one for each channel."""
    labels = trace.certain(call.x)
    weight = call.get(1, "weight")
    if weight.numel() > 1:
        if id(weight) not in trace.names:
            trace.pin(labels, "has slopes that are computed")
        else:
            trace.touch(weight, 0, "per_unit", trace.line(labels, 1))
    return labels


RULES: dict[str, Rule] = (
    dict.fromkeys(ELEMENTWISE, elementwise)
    | dict.fromkeys(LITERAL, literal)
    | dict.fromkeys(["view", "reshape", "view_as", "reshape_as", "flatten", "unflatten"], reshape)
    | dict.fromkeys(["getitem", "select", "narrow", "index_select"], index)
    | dict.fromkeys(["chunk", "split", "tensor_split", "unbind", "split_with_sizes"], pieces)
    | dict.fromkeys(["cat", "concat", "concatenate", "stack"], concatenate)
    | dict.fromkeys([*SPATIAL, "interpolate", "upsample", "grid_sample"], spatial)
    | dict.fromkeys(REDUCTIONS, reduction)
    | {"pad": pad, "unfold": unfold, "prelu": prelu}
    | PRODUCTS
)
