"""Finding a model's list of blocks: by family, by the user's word, or by looking."""

from __future__ import annotations

from torch import nn

from secateur.errors import UsageError
from secateur.models.families import UNSUPPORTED, Family

SURE = 0.8
"""Share of all block weights the longest list must hold to be taken without asking."""


def is_linear(module: nn.Module) -> bool:
    """True for ``nn.Linear`` (subclasses too) and the Conv1D of GPT-2."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def is_conv1d(module: nn.Module) -> bool:
    """True for transformers' Conv1D, a linear that stores its weight as (d_in, d_out)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def is_experts(module: nn.Module) -> bool:
    """True for a module that holds the matrices of many experts in 3-D parameters."""
    own = module._parameters.values()
    fused = any(p is not None and p.dim() == 3 for p in own)
    named = hasattr(module, "num_experts") or "Expert" in type(module).__name__
    return fused and named


def experts_transposed(module: nn.Module) -> bool:
    """True if the experts' parameters are (expert, d_in, d_out) rather than (expert, out, in).

    transformers says so itself on most experts; on the others the width that
    ``gate_up_proj`` takes in tells.
    """
    declared = getattr(module, "is_transposed", None)
    if declared is not None:
        return bool(declared)
    first = module._parameters.get("gate_up_proj")
    hidden = getattr(module, "hidden_size", None) or getattr(module, "hidden_dim", None)
    if first is None or hidden is None or first.shape[-1] == first.shape[-2]:
        return type(module).__name__ == "Llama4TextExperts"
    return bool(first.shape[-2] == hidden)


def _weights_in(module: nn.Module) -> int:
    """Number of prunable weights below ``module``."""
    found = (m for m in module.modules() if is_linear(m) or is_experts(m))
    return sum(p.numel() for m in found for p in m._parameters.values() if p is not None)


def _alike(children: list[nn.Module]) -> bool:
    """One class, or (hybrids of attention and Mamba) all of them some kind of layer or block."""
    kinds = {type(child) for child in children}
    named = all(kind.__name__.endswith(("Layer", "Block")) for kind in kinds)
    plain = any(is_linear(child) or isinstance(child, nn.ModuleList) for child in children)
    return not plain and (len(kinds) == 1 or named)


def candidates(model: nn.Module) -> dict[str, nn.Module]:
    """Outermost lists whose children are alike and hold linears, by dotted path."""
    out: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        children = list(module.children())
        if not isinstance(module, nn.ModuleList | nn.Sequential) or not children:
            continue
        if any(name.startswith(f"{outer}." if outer else "") for outer in out):
            continue
        if _alike(children) and all(_weights_in(c) for c in children):
            out[name] = module
    return out


def _listing(found: dict[str, nn.Module]) -> str:
    lines = (
        f"{n} ({len(list(m.children()))} x {type(next(m.children())).__name__})"
        for n, m in found.items()
    )
    return ", ".join(lines) or "none found"


def find_blocks(
    model: nn.Module, family: Family | None, override: str | None
) -> tuple[str, list[nn.Module]]:
    """The dotted path of the list of blocks, and the blocks.

    Raises:
        UsageError: the path given is not a list of modules, or no list is clearly the one.
    """
    config = getattr(model, "config", None)
    reason = UNSUPPORTED.get(getattr(config, "model_type", ""))
    if reason:
        raise UsageError(reason, field="model", value=config.model_type)  # type: ignore[union-attr]
    if override is not None:
        return override, _children_at(model, override)
    for path in family.blocks if family else ():
        try:
            return path, list(model.get_submodule(path).children())
        except AttributeError:
            continue
    found = candidates(model)
    fix = f"name the list yourself (blocks='path.to.layers'); candidates: {_listing(found)}"
    if getattr(config, "is_encoder_decoder", False) and len(found) != 1:
        raise UsageError(
            "an encoder-decoder has more than one list of blocks", field="blocks", fix=fix
        )
    if not found:
        raise UsageError("no list of blocks with linears was found", field="blocks", fix=fix)
    sizes = {name: _weights_in(module) for name, module in found.items()}
    path = max(found, key=lambda name: (len(list(found[name].children())), sizes[name]))
    if sizes[path] < SURE * sum(sizes.values()):
        raise UsageError("several lists could be the blocks", field="blocks", fix=fix)
    return path, list(found[path].children())


def _children_at(model: nn.Module, path: str) -> list[nn.Module]:
    found = candidates(model)
    try:
        module = model.get_submodule(path)
    except AttributeError:
        raise UsageError(
            "the model has no module of that name",
            field="blocks",
            value=path,
            fix=f"candidates: {_listing(found)}",
        ) from None
    if not isinstance(module, nn.ModuleList | nn.Sequential) or len(module) == 0:
        raise UsageError(
            f"a {type(module).__name__}, not a list of blocks",
            field="blocks",
            value=path,
            fix=f"candidates: {_listing(found)}",
        )
    return list(module)
