"""Which parameters are trained: biases, norms, head, a scale for each row, or everything.

The subsets of PERP (Zimmer et al., 2023, arXiv:2312.15230), by name and in any union. Norms
are found by what they are (a leaf module whose own parameters are vectors), not by a list of
classes, and a subset that would be empty is an error: a Llama has no biases.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import UsageError
from secateur.models.anatomy import ModelView, text_config
from secateur.models.discovery import is_linear
from secateur.models.head import untie_head
from secateur.models.matrix import Matrix

SUBSETS: dict[str, str] = {
    "biases": "every bias, those of norms too",
    "norms": "all parameters of LayerNorms and RMSNorms",
    "head": "the language model's head (untied from the embedding first)",
    "rescale": "a scale for each output of each pruned matrix, merged afterwards",
    "all": "every parameter, masked weights excepted",
}


@dataclass
class Chosen:
    """Parameters chosen for training; only they require gradients.

    Attributes:
        parts: subset -> names of its parameters.
        trained, total: numbers of parameters, shared ones once.
    """

    model: nn.Module
    parts: dict[str, list[str]]
    finishers: list[Callable[[bool], None]] = field(default_factory=list)

    @property
    def trained(self) -> int:
        """Parameters that require gradients."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    @property
    def total(self) -> int:
        """All parameters."""
        return sum(p.numel() for p in self.model.parameters())

    def finish(self, merge: bool = True) -> None:
        """Merge what was only put in for training, or take it out unmerged."""
        for finisher in self.finishers:
            finisher(merge)
        self.finishers.clear()

    def abandon(self) -> None:
        """Take out what was only put in for training."""
        self.finish(merge=False)


def norm_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Leaf modules that hold a vector ``weight`` and no matrix, by name."""
    found = {}
    for name, module in model.named_modules():
        own = [p for p in module._parameters.values() if p is not None]
        weight = module._parameters.get("weight")
        leaf = not any(True for _ in module.children())
        if leaf and weight is not None and own and all(p.dim() == 1 for p in own):
            found[name] = module
    return found


def available(model: nn.Module) -> list[str]:
    """Subsets that would not be empty."""
    found = ["head"] if _head(model) is not None else []
    if any(m._parameters.get("bias") is not None for m in model.modules()):
        found.insert(0, "biases")
    if norm_modules(model):
        found.insert(len(found) - ("head" in found), "norms")
    return [*found, "rescale", "all"]


def usual(model: nn.Module) -> tuple[str, ...]:
    """What PERP trains when nothing else is said: the biases and norms the model has."""
    return tuple(name for name in ("biases", "norms") if name in available(model))


def refuse_empty(view: ModelView, names: Iterable[str]) -> None:
    """Nothing is changed; UsageError where ``choose`` would find a subset empty."""
    there = available(view.model)
    for name in names:
        if name not in there:
            raise _empty(view, name)


def choose(view: ModelView, names: Iterable[str], within: nn.Module | None = None) -> Chosen:
    """Let exactly the parameters of ``names`` require gradients.

    Args:
        names: of ``SUBSETS``; an empty list freezes everything (adapters train their own).
        within: only parameters of this module (a block); ``head`` lies in none.

    Raises:
        UsageError: no such subset; a subset that is empty, saying which are not.
    """
    names = list(dict.fromkeys(names))
    model = view.model
    for name in names:
        if name not in SUBSETS:
            raise UsageError(
                "there is no subset of that name",
                field="train",
                value=name,
                fix=f"any of {', '.join(SUBSETS)}",
            )
    model.requires_grad_(False)
    inside = None if within is None else {id(p) for p in within.parameters()}
    finishers: list[Callable[[bool], None]] = []
    parts: dict[str, list[str]] = {}
    # Before the others, because it puts parameters in.
    scales = _rescale(view, inside, finishers) if "rescale" in names else []
    if "head" in names and within is None:
        untie_head(model)
    for name in names:
        chosen = scales if name == "rescale" else list(_members(view, name))
        kept = [p for p in chosen if inside is None or id(p) in inside or name == "rescale"]
        if not kept:
            raise _empty(view, name)
        for parameter in kept:
            parameter.requires_grad_(True)
        ids = {id(p) for p in kept}
        parts[name] = [n for n, p in model.named_parameters() if id(p) in ids]
    return Chosen(model, parts, finishers)


def _members(view: ModelView, name: str) -> Iterable[nn.Parameter]:
    model = view.model
    if name == "biases":
        for module in model.modules():
            bias = module._parameters.get("bias")
            if bias is not None:
                yield bias
    elif name == "norms":
        for module in norm_modules(model).values():
            yield from module.parameters()
    elif name == "head":
        head = _head(model)
        if head is not None:
            yield from head.parameters()
    elif name == "all":
        yield from model.parameters()


def _empty(view: ModelView, name: str) -> UsageError:
    there = ", ".join(available(view.model))
    what = {"biases": "the model has no biases"}.get(name, f"the model has nothing in '{name}'")
    offer = ", or --add-biases to give its matrices some" if name == "biases" else ""
    return UsageError(what, field="train", value=name, fix=f"it has: {there}{offer}")


def _head(model: nn.Module) -> nn.Module | None:
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if getter is not None else None
    return head if isinstance(head, nn.Module) else None


# -- a scale for each row ---------------------------------------------------------------------


def _rescale(
    view: ModelView, inside: set[int] | None, finishers: list[Callable[[bool], None]]
) -> list[nn.Parameter]:
    """Put a ``rescale`` vector on each matrix's module: y = s * (W x) + b."""
    scales = []
    for matrix in view.matrices():
        if matrix.index is not None or (inside is not None and id(matrix.stored) not in inside):
            continue  # experts are called as one, with no output of their own to scale
        scale = nn.Parameter(torch.ones(matrix.shape[0], device=matrix.stored.device))
        matrix.module.register_parameter("rescale", scale)
        handle = matrix.module.register_forward_hook(_scaled)
        finishers.append(_merger(matrix, handle))
        scales.append(scale)
    return scales


def _scaled(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    scale = module._parameters["rescale"]
    bias = module._parameters.get("bias")
    assert scale is not None
    if bias is None:
        return output * scale.to(output.dtype)
    return (output - bias) * scale.to(output.dtype) + bias


def _merger(matrix: Matrix, handle: Any) -> Callable[[bool], None]:
    def finish(merge: bool) -> None:
        scale = matrix.module._parameters.pop("rescale")
        assert scale is not None
        handle.remove()
        if merge:
            matrix.write(matrix.tensor().float() * scale.detach().float()[:, None])

    return finish


# -- biases where there are none --------------------------------------------------------------


def add_biases(view: ModelView) -> list[str]:
    """Give the linears biases of zero, where the architecture has a place for them.

    Llama and its kin have one (``attention_bias`` and ``mlp_bias`` in their config), so the
    model still opens with plain transformers.

    Returns:
        Names of the new biases.

    Raises:
        UsageError: the architecture knows no such biases.
    """
    import copy

    from transformers import AutoModelForCausalLM

    model = view.model
    config = text_config(model)
    flags = [f for f in ("attention_bias", "mlp_bias") if getattr(config, f, None) is False]
    wanted: list[str] = []
    if flags:
        changed = copy.deepcopy(config)
        for flag in flags:
            setattr(changed, flag, True)
        with torch.device("meta"):
            twin: Any = AutoModelForCausalLM.from_config(changed)
        have = dict(model.named_parameters())
        wanted = [n for n, _ in twin.named_parameters() if n.endswith(".bias") and n not in have]
    modules = dict(model.named_modules())
    wanted = [n for n in wanted if is_linear(modules.get(n.removesuffix(".bias"), nn.Identity()))]
    if not wanted:
        raise UsageError(
            f"a {type(model).__name__} has no place for more biases",
            field="add_biases",
            value=True,
            fix=f"train what there is: {', '.join(available(model))}",
        )
    for name in wanted:
        module = modules[name.removesuffix(".bias")]
        weight = module._parameters["weight"]
        assert weight is not None
        module.bias = nn.Parameter(weight.new_zeros(weight.shape[0]), requires_grad=False)
    for flag in flags:
        setattr(config, flag, True)
    return wanted
