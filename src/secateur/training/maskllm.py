"""MaskLLM: the N:M mask is learned end to end, the weights stay as they are.

Each group of M weights of a row has logits pi over its masks; every forward multiplies the frozen
weights by a mixture drawn by Gumbel-softmax, and only pi is trained::

    W^ = W * M~,   M~ = softmax((kappa_t pi + g) / tau_t) S
    L  = L_LM - lambda (1 - t/T) sum ||W^||^2

with kappa rising from 100 to 500 and tau falling from 4 to 0.05, linearly in t/T. It starts from a
one-shot mask M0: ``pi = N(0, 0.01^2) + alpha std(pi) (M0 S^T - N^2/M)`` with alpha = 3, which makes
it the most likely mask of 94.5 % of the groups. At the end the most likely mask is taken.

Source: Fang et al., "MaskLLM: Learnable Semi-Structured Sparsity for Large Language Models",
NeurIPS 2024 (arXiv 2409.17481), section 3. Groups too wide to enumerate use one logit a weight
(``kernels.soft_top``), which is ours.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.errors import UsageError
from secateur.kernels.candidate_mix import CandidateMix, Draw, key_of
from secateur.kernels.soft_top import SoftTop
from secateur.models.anatomy import Matrix, ModelView
from secateur.models.discovery import is_linear
from secateur.training.held_masks import Held
from secateur.training.hooks import autocasted
from secateur.training.loop import Batch, Hook, Loss, Training, next_token_loss
from secateur.training.mask_logits import Learning, first_logits


class _MaskedLinear(torch.autograd.Function):
    """(x (..., d_in), W (d_out, d_in), logits) -> (W^ x + b, ||W^||^2); keeps neither W^ nor M~."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        logits: Tensor,
        bias: Tensor | None,
        mix: Any,
        draw: Draw,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight, logits)
        ctx.how = (mix, draw)
        masked = mix.masked(_groups(weight, mix), logits.detach(), draw).view(weight.shape)
        square = masked.square().sum()
        return F.linear(x, masked.to(x.dtype), None if bias is None else bias.to(x.dtype)), square

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        grad, square = grads
        x, weight, logits = ctx.saved_tensors
        mix, draw = ctx.how
        flat = grad.reshape(-1, grad.shape[-1])
        d_weight = (flat.T @ x.reshape(-1, x.shape[-1])).float()
        d_logits, masked = mix.backward(
            _groups(weight, mix),
            logits.detach(),
            d_weight.reshape(-1, mix.group),
            square,
            draw,
        )
        d_x = grad @ masked.view(weight.shape).to(grad.dtype) if ctx.needs_input_grad[0] else None
        return d_x, None, d_logits.to(logits.dtype), None, None, None


def _groups(weight: Tensor, mix: CandidateMix | SoftTop) -> Tensor:
    return weight.detach().float().reshape(-1, mix.group)


class Gated(nn.Module):
    """A frozen linear under a mask that is being learned.

    Without a ``draw`` it computes with the most likely mask, as it will be exported.
    """

    def __init__(
        self, base_layer: nn.Module, mix: CandidateMix | SoftTop, logits: Tensor, transposed: bool
    ) -> None:
        super().__init__()
        self.base_layer, self.mix, self.transposed = base_layer, mix, transposed
        self.mask_logits = nn.Parameter(logits)
        self.draw: Draw | None = None
        self.open = False
        """True: compute with the dense weight, for a teacher that costs no second model."""
        self.square: Tensor | None = None
        """Sum of squares of the masked weight of the last forward, for the regularisation."""

    def dense(self) -> Tensor:
        """The frozen weight, (d_out, d_in)."""
        stored: Tensor = self.base_layer.weight.detach()  # type: ignore[operator]
        return stored.T if self.transposed else stored

    @torch.no_grad()
    def mask(self) -> Tensor:
        """The most likely mask, (d_out, d_in) bool, True = pruned."""
        return self.mix.choose(self.mask_logits).view(self.dense().shape)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output under the drawn, or else the most likely, mask."""
        if self.open:
            return self.base_layer(x)
        x = autocasted(x)
        bias: Any = getattr(self.base_layer, "bias", None)
        if self.draw is None:
            weight = self.dense().masked_fill(self.mask(), 0).to(x.dtype)
            return F.linear(x, weight, None if bias is None else bias.to(x.dtype))
        # The mixture is made in float32 whatever the products are computed in.
        with torch.autocast(x.device.type, enabled=False):
            y, self.square = _MaskedLinear.apply(
                x, self.dense(), self.mask_logits, bias, self.mix, self.draw
            )
        return y

    def __getattr__(self, name: str) -> Any:
        # Models look at a linear's weight (its type, its device) or sizes without calling it.
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)


@dataclass
class LearnedMasks(Hook):
    """The masks of a model while they are learned: a hook of the training loop.

    Every weight of the model is frozen; what is trained are the logits. Use as a context manager
    to be sure that the model is left as it was.
    """

    model: nn.Module
    options: Learning
    modules: dict[str, Gated] = field(default_factory=dict)
    held: dict[str, Held] = field(default_factory=dict)
    """The matrices whose masks are settled while the others' are learned."""
    start: dict[str, Tensor] = field(default_factory=dict)
    """The mask each matrix started from: its prior, or else the first logits' choice."""
    moved: list[tuple[int, float, float]] = field(default_factory=list)
    """(step, share of groups whose mask changed, share of the mixture on the weights it keeps)."""
    _micro: tuple[int, int] = (-1, 0)
    _weight: float = 0.0
    _trained: list[nn.Parameter] = field(default_factory=list)

    @classmethod
    def attach(
        cls,
        view: ModelView,
        patterns: Mapping[str, tuple[int, int]],
        options: Learning,
        prior: Mapping[str, Tensor] | None = None,
        learn: Collection[str] | None = None,
    ) -> LearnedMasks:
        """Put logits on the matrices of ``view`` and freeze all else.

        Slices of fused experts are no layers of their own and are left out.

        Args:
            patterns: matrix name -> (N, M).
            prior: matrix name -> (d_out, d_in) bool, True = pruned; None or missing: no prior.
            learn: the matrices to learn now, all others held under their prior; None: all.

        Raises:
            UsageError: M does not divide a matrix's inputs; no matrix can carry a mask.
        """
        masks, known = cls(view.model, options), prior or {}
        masks._trained = [p for p in view.model.parameters() if p.requires_grad]
        view.model.requires_grad_(False)
        generator = torch.Generator().manual_seed(options.seed)
        try:
            for matrix in filter(learnable, view.matrices()):
                if learn is not None and matrix.name not in learn:
                    masks._hold(matrix, known[matrix.name])
                    continue
                given = known.get(matrix.name)
                mix = options.mixture(matrix, *patterns[matrix.name], given)
                masks._put(matrix, mix, first_logits(matrix, mix, options, given, generator))
            if not masks.modules:
                raise UsageError(
                    "no matrix can carry a mask: the experts are fused in one parameter",
                    field="method",
                    value="maskllm",
                )
        except BaseException:
            masks.detach()
            raise
        masks.start = {
            n: known[n] if n in known else m.mask().cpu() for n, m in masks.modules.items()
        }
        return masks

    def _put(self, matrix: Matrix, mix: CandidateMix | SoftTop, logits: Tensor) -> None:
        gated = Gated(matrix.module, mix, logits.to(matrix.stored.device), matrix.transposed)
        self.modules[matrix.name] = gated
        self._replace(matrix.name, gated)

    def _hold(self, matrix: Matrix, gone: Tensor) -> None:
        held = Held(matrix.module, gone.to(matrix.stored.device), matrix.transposed)
        self.held[matrix.name] = held
        self._replace(matrix.name, held)

    def _replace(self, name: str, module: nn.Module) -> None:
        parent, _, leaf = name.rpartition(".")
        owner = self.model.get_submodule(parent)
        module.train(owner._modules[leaf].training)  # type: ignore[union-attr]
        owner._modules[leaf] = module

    def detach(self) -> dict[str, Tensor]:
        """Take the logits off and leave the dense model; returns the most likely masks."""
        masks = {name: module.mask().cpu() for name, module in self.modules.items()}
        for name, module in (*self.modules.items(), *self.held.items()):
            layer: Any = module.base_layer
            self._replace(name, layer)
        self.modules, self.held = {}, {}
        for parameter in self._trained:
            parameter.requires_grad_(True)
        return masks

    def __enter__(self) -> LearnedMasks:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def loss(self, inner: Loss = next_token_loss) -> Loss:
        """``inner`` less the reward of large surviving weights, which fades with training."""

        def regularised(model: nn.Module, batch: Batch) -> Tensor:
            value = inner(model, batch)
            squares = [m.square for m in self.modules.values() if m.square is not None]
            if not self._weight or not squares:
                return value
            return value - self._weight * torch.stack(squares).sum().to(value.device)

        return regularised

    def before_forward(self, at: Training) -> None:
        """See ``Hook``: a new draw for every forward, of every process, of every layer."""
        step, micro = self._micro
        self._micro = (at.step, micro + 1 if step == at.step else 0)
        self._weight = self.options.weight_reg * (1 - at.done)
        rank = at.accelerator.process_index
        for number, module in enumerate(self.modules.values()):
            module.square = None  # of an earlier forward: an expert may get no tokens in this one
            key = key_of(self.options.seed, at.step, self._micro[1], rank, number)
            module.draw = self.options.draw(at.done, key)

    def after_step(self, at: Training) -> None:
        """See ``Hook``: how far the masks have moved, about a hundred times."""
        for module in self.modules.values():
            module.square = None
        if at.step % max(1, at.settings.steps // 100) == 0 or at.step == at.settings.steps:
            self.moved.append((at.step, *self.movement(at.done)))

    def end(self, at: Training) -> None:
        """See ``Hook``."""
        self._no_draw()

    def state(self) -> dict[str, Tensor]:
        """See ``Hook``."""
        return {"moved": torch.tensor(self.moved, dtype=torch.float64).reshape(-1, 3)}

    def restore(self, state: dict[str, Tensor], at: Training) -> None:
        """See ``Hook``."""
        self.moved = [(int(s), a, b) for s, a, b in state["moved"].tolist()]

    def _no_draw(self) -> None:
        for module in self.modules.values():
            module.draw = None

    @contextmanager
    def settled(self) -> Iterator[None]:
        """The model under its most likely masks, for a while (validation)."""
        draws = [module.draw for module in self.modules.values()]
        self._no_draw()
        try:
            yield
        finally:
            for module, draw in zip(self.modules.values(), draws, strict=True):
                module.draw = draw

    def teacher(self) -> nn.Module:
        """The dense model as a module, made of the very same weights with the masks lifted."""
        return _Lifted(self)

    @torch.no_grad()
    def movement(self, done: float) -> tuple[float, float]:
        """(share of groups whose mask is not the first one, share of the mixture on kept weights).

        The second is 1 when the mixture is as good as the mask that will be taken from it.
        """
        changed = groups = kept_weights = 0
        settled = 0.0
        draw = self.options.draw(done, None)
        for name, module in self.modules.items():
            mask = module.mask()
            differs = (mask.cpu() != self.start[name]).view(-1, module.mix.group).any(-1)
            changed, groups = changed + int(differs.sum()), groups + differs.numel()
            kept = (~mask).float().view(-1, module.mix.group)
            kept_weights += differs.numel() * module.mix.keep
            settled += float(module.mix.masked(kept, module.mask_logits.detach(), draw).sum())
        return changed / groups, settled / kept_weights


class _Lifted(nn.Module):
    """The model without its masks; holds no parameters of its own."""

    def __init__(self, masks: LearnedMasks) -> None:
        super().__init__()
        object.__setattr__(self, "_masks", masks)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The dense model's output."""
        masks: Any = self._masks
        modules = [*masks.modules.values(), *masks.held.values()]
        for module in modules:
            module.open = True
        try:
            return masks.model(*args, **kwargs)
        finally:
            for module in modules:
                module.open = False


def learnable(matrix: Matrix) -> bool:
    """Whether a mask can be learned for it: it is a layer of its own."""
    return matrix.index is None and is_linear(matrix.module)
