"""Watching the inputs of matrices during a forward pass.

Linears are watched by forward pre-hooks. Experts fused in a 3-D parameter are not modules,
so a torch function mode watches ``linear`` and ``matmul`` for weights that are slices of it,
and ``bmm`` for the whole (Llama 4 gives every expert all tokens, zeroed unless they are its
own); meanwhile transformers' batched expert kernels are switched off: they make no slices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from secateur.models.matrix import Matrix

Callback = Callable[[Matrix, Tensor], None]

_BATCHED = {torch.bmm, Tensor.bmm}
_PRODUCTS = {F.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm}


class Capture:
    """What is known about the call now being reported.

    ``rows`` is None for a linear, which sees every token of the batch. For an expert it
    holds, as (tokens,) int64, which tokens of the flattened (batch * length) input it was
    given, so that padding can be left out there too.
    """

    def __init__(self) -> None:
        self.rows: Tensor | None = None


class _ExpertMode(TorchFunctionMode):
    """Calls back for each product with a slice of a watched 3-D parameter."""

    def __init__(self, matrices: list[Matrix], callback: Callback, capture: Capture) -> None:
        super().__init__()
        self.matrices = matrices
        self.callback = callback
        self.capture = capture
        self.by_address: dict[int, Matrix] = {}
        self.hidden: Tensor | None = None
        self.rows: Tensor | None = None

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of an experts module: its slices' addresses are those of now."""
        ours = [m for m in self.matrices if m.module is module]
        self.by_address = {m.stored[m.index].data_ptr(): m for m in ours}
        self.hidden = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
        self.rows = None

    def _report(self, matrix: Matrix, inputs: Tensor, rows: Tensor | None) -> None:
        if not len(inputs):
            return
        self.capture.rows = rows
        with torch._C.DisableTorchFunction():
            self.callback(matrix, inputs)
        self.capture.rows = None

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _PRODUCTS:
            inputs, weight = (*args, *kwargs.values())[:2]
            matrix = self.by_address.get(weight.data_ptr())
            if matrix is not None and weight.dim() == 2:
                known = self.rows is not None and self.rows.numel() == inputs.shape[0]
                self._report(matrix, inputs, self.rows if known else None)
        elif func in _BATCHED:
            inputs, weight = (*args, *kwargs.values())[:2]
            if weight.data_ptr() in self.by_address:
                for each, slice_ in zip(inputs, weight, strict=True):
                    rows = each.ne(0).any(-1).nonzero().flatten()
                    self._report(self.by_address[slice_.data_ptr()], each[rows], rows)
        elif func is Tensor.__getitem__ and args[0] is self.hidden:
            index = args[1]
            if isinstance(index, Tensor) and index.dtype == torch.int64 and index.dim() == 1:
                self.rows = index
        return func(*args, **kwargs)


@contextmanager
def eager_experts(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Run these experts modules one expert at a time, as transformers' ``eager`` does."""
    configs = {id(c): c for m in modules if (c := getattr(m, "config", None)) is not None}
    attribute = "_experts_implementation_internal"
    before = {key: c.__dict__.get(attribute) for key, c in configs.items()}
    known = {key: attribute in c.__dict__ for key, c in configs.items()}
    try:
        for key, config in configs.items():
            if known[key]:
                setattr(config, attribute, "eager")
        yield
    finally:
        for key, config in configs.items():
            if known[key]:
                setattr(config, attribute, before[key])


@contextmanager
def expert_inputs(
    matrices: Iterable[Matrix], callback: Callback, capture: Capture | None = None
) -> Iterator[Capture]:
    """Call ``callback(matrix, inputs)`` for each use of an expert's slice; see ``capture_inputs``."""
    watched = [m for m in matrices if m.index is not None]
    capture = capture or Capture()
    if not watched:
        yield capture
        return
    modules = list({id(m.module): m.module for m in watched}.values())
    mode = _ExpertMode(watched, callback, capture)
    with ExitStack() as stack:
        stack.enter_context(eager_experts(modules))
        for module in modules:
            stack.callback(module.register_forward_pre_hook(mode.before, with_kwargs=True).remove)
        stack.enter_context(mode)
        yield capture


@contextmanager
def capture_inputs(matrices: Iterable[Matrix], callback: Callback) -> Iterator[Capture]:
    """Call ``callback(matrix, inputs)`` once for each use of each matrix in forward passes.

    ``inputs`` (..., d_in) is the very tensor the layer was given: linears that share an
    input (q, k, v) get the same object. Experts get (tokens, d_in), only the tokens sent to
    them; an expert no token was sent to is not reported. Everything is as before on leaving,
    also after an exception.
    """
    matrices = list(matrices)
    with ExitStack() as stack:
        for matrix in matrices:
            if matrix.index is None:
                hook = _linear_hook(matrix, callback)
                handle = matrix.module.register_forward_pre_hook(hook, with_kwargs=True)
                stack.callback(handle.remove)
        yield stack.enter_context(expert_inputs(matrices, callback))


def _linear_hook(matrix: Matrix, callback: Callback) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = args[0] if args else next(iter(kwargs.values()))
        callback(matrix, inputs)

    return hook
