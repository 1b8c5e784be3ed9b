"""Low-rank adapters on a model's matrices: put on, trained, and merged without losing a zero.

>>> from secateur.models.anatomy import ModelView
>>> from secateur.models.tiny import tiny_model
>>> model = tiny_model("llama")
>>> adapters = Adapters.attach(ModelView.of(model), {}, AdapterOptions("lora", rank=4))
>>> sum(p.numel() for p in adapters.parameters().values()) < 0.2 * model.num_parameters()
True
>>> adapters.merge()

Source: see ``low_rank``, where the formulas are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.errors import UsageError
from secateur.models.anatomy import Matrix, ModelView
from secateur.models.discovery import is_conv1d, is_linear
from secateur.models.head import output_head
from secateur.training.adapter_options import AdapterOptions
from secateur.training.hooks import autocasted
from secateur.training.loop import Hook, Training
from secateur.training.low_rank import (
    MASKED,
    Drop,
    added_linear,
    masked_linear,
    merged,
    start,
)
from secateur.training.masked import check_masks

__all__ = ["Adapted", "AdapterOptions", "Adapters"]


class Adapted(nn.Module):
    """A frozen linear with an adapter on it.

    Args:
        base_layer: the ``nn.Linear`` or Conv1D; its own bias may be trained.
        transposed: it stores (d_in, d_out).
        gone: (d_out, d_in) bool, True where the weight is gone; None if nothing is.
        generator: of the initial A.
    """

    keep: Tensor | None

    def __init__(
        self,
        base_layer: nn.Module,
        options: AdapterOptions,
        generator: torch.Generator,
        *,
        transposed: bool = False,
        gone: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.kind, self.scale, self.rate = options.kind, options.scale, options.dropout
        self.transposed = transposed
        self.masked = True
        """Whether the mask takes part in this step (see ``AdapterOptions.every``)."""
        weight: Any = base_layer.weight
        self._wanted = bool(weight.requires_grad)
        weight.requires_grad_(False)
        rows, columns = self._weight().shape
        a, b = start(options.kind, (rows, columns), options.rank, generator, options.init)
        self.lora_a = nn.Parameter(a.to(weight.device))
        self.lora_b = nn.Parameter(b.to(weight.device))
        keep = None if gone is None or not gone.any() else (~gone).to(torch.uint8)
        self.register_buffer(
            "keep", None if keep is None else keep.to(weight.device), persistent=False
        )

    def _weight(self) -> Tensor:
        layer: Any = self.base_layer
        stored: Tensor = layer.weight.detach()
        return stored.T if self.transposed else stored

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output with the effective weight."""
        x = autocasted(x)
        learning = torch.is_grad_enabled()
        if self.kind in MASKED and (self.masked or not learning):
            bias = getattr(self.base_layer, "bias", None)
            how = (self.scale, self.kind, self._drop() if learning else None)
            return masked_linear(x, self._weight(), self.keep, self.lora_a, self.lora_b, bias, *how)
        base = self.base_layer(x)
        x = F.dropout(x, self.rate, learning)
        return added_linear(x, base, self.lora_a, self.lora_b, self.scale)

    def _drop(self) -> Drop | None:
        # From the global generator, which a training seeds for each step.
        return Drop(self.rate, int(torch.randint(2**62, ()))) if self.rate else None

    def merged(self) -> Tensor:
        """The weight with the adapter in it, float32 (d_out, d_in)."""
        with torch.no_grad():
            return merged(
                self.kind, self._weight(), self.keep, self.lora_a, self.lora_b, self.scale
            )

    def release(self) -> None:
        """Let the weight be trained again if it was before."""
        layer: Any = self.base_layer
        layer.weight.requires_grad_(self._wanted)

    def __getattr__(self, name: str) -> Any:
        # Models look at a linear's weight (its type, its device) or sizes without calling it.
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)


@dataclass
class Adapters:
    """The adapters put on a model, by the name of the matrix.

    As a context manager it takes them off again, unmerged, when an exception passes; after
    ``merge`` or ``detach`` the model has the modules, names and tensors it had before.
    """

    model: nn.Module
    options: AdapterOptions
    modules: dict[str, Adapted] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    """Name of each matrix without an adapter -> why."""

    @classmethod
    def attach(
        cls, view: ModelView, masks: Mapping[str, Tensor], options: AdapterOptions
    ) -> Adapters:
        """Put adapters on the matrices of ``view``; the model computes what it did before.

        Their parameters are float32 and want gradients; what else is trained is the caller's
        choice (the matrices themselves are frozen).

        Args:
            masks: matrix name -> (d_out, d_in) bool, True where the weight is gone; a matrix
                without one has nothing gone.

        Raises:
            UsageError: a mask that does not fit the model, a target that is not there, a head
                that shares its weight with the embedding.
        """
        check_masks(view, masks)
        skipped: dict[str, str] = {}
        chosen = targeted(view, options.targets, skipped)
        adapters = cls.attach_to(view.model, chosen, masks, options)
        adapters.skipped = skipped
        if options.head:
            try:
                adapters._put_on_head()
            except BaseException:
                adapters.detach()
                raise
        return adapters

    @classmethod
    def attach_to(
        cls,
        model: nn.Module,
        matrices: Iterable[Matrix],
        masks: Mapping[str, Tensor],
        options: AdapterOptions,
    ) -> Adapters:
        """Put adapters on these matrices (also ones outside the blocks) of ``model``.

        Raises:
            UsageError: a matrix whose weight another module shares; fused experts.
        """
        adapters = cls(model, options)
        generator = torch.Generator().manual_seed(options.seed)
        matrices = list(matrices)
        for matrix in matrices:
            _refuse_unfit(model, matrix)
        for matrix in matrices:
            adapted = Adapted(
                matrix.module,
                options,
                generator,
                transposed=matrix.transposed,
                gone=masks.get(matrix.name),
            )
            adapters._put(matrix.name, adapted)
        return adapters

    def _put(self, name: str, adapted: Adapted) -> None:
        adapted.train(adapted.base_layer.training)
        parent, _, leaf = name.rpartition(".")
        self.model.get_submodule(parent)._modules[leaf] = adapted
        self.modules[name] = adapted

    def _put_on_head(self) -> None:
        """A plain LoRA of the same rank on the head, which is not pruned."""
        name, module = output_head(self.model)
        head = Matrix(name, module, transposed=is_conv1d(module))
        plain = replace(self.options, kind="lora", every=1, seed=self.options.seed + 1)
        self.modules |= self.attach_to(self.model, [head], {}, plain).modules

    def hooks(self) -> list[Hook]:
        """What a training has to call while these adapters are on."""
        return [] if self.options.every == 1 else [_Alternating(self)]

    def parameters(self) -> dict[str, nn.Parameter]:
        """A and B of every adapter, as ``matrix.lora_a`` and ``matrix.lora_b``."""
        return {
            f"{name}.{part}": getattr(module, part)
            for name, module in self.modules.items()
            for part in ("lora_a", "lora_b")
        }

    def state(self) -> dict[str, Tensor]:
        """Copies of all parameters, on the CPU."""
        return {name: p.detach().cpu().clone() for name, p in self.parameters().items()}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take the values of ``state``.

        Raises:
            UsageError: other names or shapes than these adapters'.
        """
        own = self.parameters()
        for name in sorted(own.keys() ^ state.keys()):
            raise UsageError(
                "the saved adapters are of other matrices", field="adapters", value=name
            )
        for name, parameter in own.items():
            if parameter.shape != state[name].shape:
                raise UsageError(
                    f"a saved adapter is {tuple(state[name].shape)}, not {tuple(parameter.shape)}",
                    field="adapters",
                    value=name,
                    fix="use the rank it was saved with",
                )
            parameter.copy_(state[name])

    @torch.no_grad()
    def merge(self) -> None:
        """Write the effective weights into the matrices and take the adapters off.

        Computed in float32 and rounded once to the matrix's type. What was zero by its mask
        is zero, to the bit.

        Raises:
            UsageError: ``lora`` on a matrix with a mask, whose zeros would fill in.
            NumericsError: a weight that is not finite; nothing has been merged then.
        """
        for name, module in self.modules.items():
            if module.kind == "lora" and module.keep is not None:
                raise UsageError(
                    f"merging would fill the zeros of '{name}'",
                    field="kind",
                    value="lora",
                    fix="train mask-lora, scale-lora or lora-prune; or export it as an adapter",
                )
        matrices = {
            name: Matrix(name, m.base_layer, transposed=m.transposed)
            for name, m in self.modules.items()
        }
        for name, module in self.modules.items():
            if not torch.isfinite(module.lora_a).all() or not torch.isfinite(module.lora_b).all():
                matrices[name].write(module.merged())  # raises, naming it
        for name, module in self.modules.items():
            matrices[name].write(module.merged())
        self.detach()

    def detach(self) -> None:
        """Take the adapters off without merging."""
        for name, module in self.modules.items():
            parent, _, leaf = name.rpartition(".")
            self.model.get_submodule(parent)._modules[leaf] = module.base_layer
            module.release()
        self.modules = {}

    def __enter__(self) -> Adapters:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.detach()


class _Alternating(Hook):
    """Lets the masks take part in every n-th step."""

    def __init__(self, adapters: Adapters) -> None:
        self.adapters = adapters

    def before_forward(self, at: Training) -> None:
        """See ``Hook``."""
        masked = at.step % self.adapters.options.every == 0
        for name in self.adapters.modules:
            # In the model that is trained: sharded, it is a twin of the one they were put on.
            at.model.get_submodule(name).masked = masked  # type: ignore[assignment]


def targeted(
    view: ModelView, targets: tuple[str, ...], skipped: dict[str, str] | None = None
) -> list[Matrix]:
    """The matrices that get an adapter; the others go to ``skipped``, with the reason.

    Raises:
        UsageError: a target that is not there; nothing that can carry an adapter.
    """
    skipped = {} if skipped is None else skipped
    matrices = view.matrices()
    for target in targets:
        if not any(_meant(m, target) for m in matrices):
            roles = sorted({m.role for m in matrices if m.role})
            raise UsageError(
                "matches no matrix",
                field="targets",
                value=target,
                fix=f"a role ({', '.join(roles)}) or a pattern on names such as {matrices[0].name}",
            )
    out = []
    for matrix in matrices:
        if targets and not any(_meant(matrix, target) for target in targets):
            skipped[matrix.name] = "not among the targets"
        elif matrix.index is not None or not is_linear(matrix.module):
            skipped[matrix.name] = "a slice of fused experts, which is no layer of its own"
        else:
            out.append(matrix)
    if not out:
        raise UsageError(
            "no matrix can carry an adapter: the experts are fused in one parameter",
            field="targets",
            value=list(targets),
            fix="name the attention's matrices (q, k, v, o), or train another subset",
        )
    return out


def _meant(matrix: Matrix, target: str) -> bool:
    return matrix.role == target or fnmatchcase(matrix.name, target)


def _refuse_unfit(model: nn.Module, matrix: Matrix) -> None:
    if matrix.index is not None:
        raise UsageError(
            "a slice of fused experts is no layer that could carry an adapter",
            field="targets",
            value=matrix.name,
            fix="name the attention's matrices (q, k, v, o)",
        )
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter is matrix.stored and name != matrix.key:
            raise UsageError(
                f"shares its weight with '{name}', which merging would change too",
                field="head" if name.endswith("embed_tokens.weight") else "targets",
                value=matrix.name,
                fix="untie them first (secateur.models.head.untie_head(model)), or leave it out",
            )
