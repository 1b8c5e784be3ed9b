"""What the pruner sees of a model: blocks, and in each block its matrices.

A matrix is always seen as (d_out, d_in), whatever the layer stores: ``nn.Linear`` keeps it
so, GPT-2's Conv1D transposed, and a mixture of experts as slices of 3-D parameters.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from secateur.errors import UsageError
from secateur.models.capture import capture_inputs, expert_inputs
from secateur.models.discovery import (
    experts_transposed,
    find_blocks,
    is_conv1d,
    is_experts,
    is_linear,
)
from secateur.models.families import Attention, Family, family_of, is_router, role_of
from secateur.models.matrix import Matrix

__all__ = [
    "Block",
    "Matrix",
    "ModelView",
    "capture_inputs",
    "expert_inputs",
    "find_matrices",
    "text_config",
]


@dataclass(eq=False)
class Block:
    """One repeated layer of the model and its matrices, in the order they are defined."""

    index: int
    name: str
    module: nn.Module
    matrices: list[Matrix]


@dataclass(eq=False)
class ModelView:
    """A model as the pruner sees it.

    Attributes:
        path: dotted path of the list of blocks.
        family: the row of the table it was read with; None for an unknown architecture.
        excluded: name of each matrix left out -> why.
    """

    model: nn.Module
    path: str
    blocks: list[Block]
    family: Family | None = None
    excluded: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        model: nn.Module,
        blocks: str | None = None,
        include: Iterable[str] = (),
        exclude: Iterable[str] = (),
    ) -> ModelView:
        """Look at ``model``.

        Args:
            blocks: dotted path of the list of blocks, where it cannot be found alone.
            include: shell-style patterns on matrix names (``*.mlp.*``); none means all.
            exclude: patterns of matrices to leave alone.

        Raises:
            UsageError: no clear list of blocks; a pattern that matches nothing; quantised,
                LoRA-wrapped or shared weights.
        """
        _refuse_wrapped(model)
        family = family_of(getattr(text_config(model), "model_type", None))
        path, modules = find_blocks(model, family, blocks)
        excluded: dict[str, str] = {}
        found = []
        for index, module in enumerate(modules):
            name = f"{path}.{index}" if path else str(index)
            found.append(Block(index, name, module, find_matrices(module, name, family, excluded)))
        view = cls(model, path, found, family, excluded)
        view._refuse_shared()
        view._filter(tuple(include), tuple(exclude))
        return view

    def matrices(self) -> list[Matrix]:
        """All matrices, block after block."""
        return [matrix for block in self.blocks for matrix in block.matrices]

    def __getitem__(self, name: str) -> Matrix:
        """The matrix of that name; an unknown one is a UsageError."""
        for matrix in self.matrices():
            if matrix.name == name:
                return matrix
        raise UsageError(
            self.excluded.get(name, "the model has no matrix of that name"),
            field="matrix",
            value=name,
            fix=f"one of {len(self.matrices())}, such as {self.matrices()[0].name}",
        )

    @property
    def config(self) -> Any:
        """The config of the language model (of the text part, in a multimodal one)."""
        return text_config(self.model)

    @property
    def attention(self) -> Attention | None:
        """Heads, key-value heads and their width; None for an unknown family."""
        return self.family.attention(self.config) if self.family else None

    @property
    def hidden_size(self) -> int | None:
        """Width of the residual stream."""
        return getattr(self.config, "hidden_size", None)

    @property
    def mlp_width(self) -> int | None:
        """Channels inside the first MLP (of one expert, in a mixture)."""
        down = (m.shape[1] for m in self.matrices() if m.role in ("down", "fc2"))
        return next(down, None)

    def _refuse_shared(self) -> None:
        """Two matrices on one parameter would be pruned twice, against each other."""
        owner: dict[int, str] = {}
        ours = {id(m.stored): m for m in self.matrices()}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            first = owner.setdefault(id(parameter), name)
            if first != name and id(parameter) in ours:
                raise UsageError(
                    f"'{name}' and '{first}' are one and the same weight",
                    field="model",
                    value=type(self.model).__name__,
                    fix="untie them (give each its own copy) before pruning",
                )

    def _filter(self, include: tuple[str, ...], exclude: tuple[str, ...]) -> None:
        names = [m.name for m in self.matrices()]
        for kind, patterns in (("include", include), ("exclude", exclude)):
            for pattern in patterns:
                if not any(fnmatchcase(name, pattern) for name in names):
                    raise UsageError(
                        "matches no matrix",
                        field=kind,
                        value=pattern,
                        fix=f"patterns are shell-style, such as '*.mlp.*'; a name is {names[0]}",
                    )
        for block in self.blocks:
            kept = []
            for matrix in block.matrices:
                hit = next((p for p in exclude if fnmatchcase(matrix.name, p)), None)
                if hit is not None:
                    self.excluded[matrix.name] = f"excluded by '{hit}'"
                elif include and not any(fnmatchcase(matrix.name, p) for p in include):
                    self.excluded[matrix.name] = "not among the included"
                else:
                    kept.append(matrix)
            block.matrices = kept
        if not self.matrices():
            raise UsageError("nothing is left to prune", field="exclude", value=list(exclude))


def text_config(model: nn.Module) -> Any:
    """``model.config``, or its text part; None for a plain torch module."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def find_matrices(
    root: nn.Module, prefix: str, family: Family | None, excluded: dict[str, str]
) -> list[Matrix]:
    """Every matrix below ``root``, whose own name is ``prefix``; routers go to ``excluded``."""
    out: list[Matrix] = []
    # torch's own attention multiplies by its output projection without calling the module.
    unheard = {t for t, m in root.named_modules() if isinstance(m, nn.MultiheadAttention)}
    for tail, module in root.named_modules():
        name = f"{prefix}.{tail}" if tail else prefix
        _refuse_packed(name, module)
        if is_router(name, family) and not list(module.children()):
            excluded[name] = "a router: it chooses the experts"
        elif tail.rpartition(".")[0] in unheard:
            excluded[name] = "inside nn.MultiheadAttention, which shows nobody its inputs"
        elif is_linear(module):
            role = role_of(name, family)
            out.append(Matrix(name, module, transposed=is_conv1d(module), role=role))
        elif is_experts(module):
            transposed = experts_transposed(module)
            for parameter, value in module._parameters.items():
                if value is None or value.dim() != 3:
                    continue
                stem = f"{name}.{parameter}"
                role = role_of(stem, family)
                out += [
                    Matrix(f"{stem}.{i}", module, parameter, i, transposed, role)
                    for i in range(value.shape[0])
                ]
    return out


def _refuse_wrapped(model: nn.Module) -> None:
    """LoRA holds two weights in one linear; offloading keeps a weight where we cannot write it."""
    for name, module in model.named_modules():
        if hasattr(module, "base_layer") and hasattr(module, "merge"):
            raise UsageError(
                f"'{name}' is wrapped by an adapter ({type(module).__name__})",
                field="model",
                value=type(model).__name__,
                fix="merge it first: model = model.merge_and_unload()",
            )
        if getattr(getattr(module, "_hf_hook", None), "offload", False):
            raise UsageError(
                f"'{name}' is offloaded by accelerate",
                field="model",
                value=type(model).__name__,
                fix="load it without device_map, or give the folder and stream=True",
            )


_PACKED = ("qweight", "weight_packed", "packed_weight", "B", "W_q")


def _refuse_packed(name: str, module: nn.Module) -> None:
    """Weights stored as integers, 8-bit floats or packed codes cannot be pruned as they are."""
    own = {**module._parameters, **module._buffers}
    weight = own.get("weight")
    packed = next((key for key in _PACKED if own.get(key) is not None), None)
    what = None
    if packed and weight is None and hasattr(module, "in_features"):
        what = f"packed codes ('{packed}')"
    elif isinstance(weight, Tensor) and is_linear(module):
        plain = type(weight) in (nn.Parameter, Tensor) and type(weight.data) is Tensor
        if not weight.is_floating_point() or weight.element_size() < 2:
            what = str(weight.dtype)
        elif not plain:
            what = type(weight if type(weight) is not nn.Parameter else weight.data).__name__
    if what:
        raise UsageError(
            f"'{name}' is quantised: its weight is {what}",
            field="model",
            value=type(module).__name__,
            fix="load the model without quantisation (or call model.dequantize()), prune, then quantise",
        )
