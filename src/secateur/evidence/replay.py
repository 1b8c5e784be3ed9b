"""Block-by-block replay: run a decoder one block at a time over stored inputs.

The model's own forward does everything around the blocks (embeddings, masks, rotary tables,
final norm, head). With each block's ``forward`` replaced by a recorder that passes its input
through, one cheap pass over the data tells *how* every block is called, whatever the family
passes along; a second such pass, with the true last hidden states put in, gives exact logits.
No argument is known by name here, so a new architecture needs nothing new.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import NumericsError, UsageError
from secateur.evidence.statistics import all_finite
from secateur.models.anatomy import Block, ModelView
from secateur.progress import SILENT, Progress

Residency = Callable[[Block], AbstractContextManager[Any]]
"""Makes a block's weights present while they are used (a no-op for a resident model)."""

_HIDDEN = object()  # stands in a recorded call where the hidden states go


class _Stop(Exception):
    """Ends a forward once all that was wanted has been seen."""


@dataclass
class _Call:
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, module: nn.Module, hidden: Tensor) -> Any:
        args = [hidden if a is _HIDDEN else a for a in self.args]
        kwargs = {k: hidden if v is _HIDDEN else v for k, v in self.kwargs.items()}
        return module(*args, **kwargs)


def _template(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, _Call]:
    """Split a block's call into its hidden states and everything else."""
    if args and isinstance(args[0], Tensor):
        return args[0], _Call((_HIDDEN, *args[1:]), kwargs)
    if isinstance(kwargs.get("hidden_states"), Tensor):
        return kwargs["hidden_states"], _Call(args, {**kwargs, "hidden_states": _HIDDEN})
    raise UsageError(
        "a block is called in a way that shows no hidden states",
        fix="pass blocks='path.to.layers' to name the decoder's list of blocks",
    )


def _share(new: Any, old: Any) -> Any:
    """``new``, but built of ``old``'s tensors wherever they are equal (masks repeat per batch)."""
    if isinstance(new, Tensor) and isinstance(old, Tensor):
        same = new is old or (
            new.shape == old.shape and new.dtype == old.dtype and torch.equal(new, old)
        )
        return old if same else new
    if type(new) is type(old) and isinstance(new, tuple | list) and len(new) == len(old):
        return type(new)(_share(n, o) for n, o in zip(new, old, strict=True))
    return new


class Replay:
    """The hidden states of a set of token windows, moved through the blocks one at a time.

    ``hidden[b]`` (B, L, d) is what batch ``b`` feeds to the next block.

    Args:
        view: the model.
        ids: (N, L) token ids.
        mask: (N, L) True for real tokens, or None when there is no padding.
        batch_size: windows per forward.
        device: where blocks run; hidden states are kept there.
        resident: makes a block's weights present (streaming); default: they are.
    """

    def __init__(
        self,
        view: ModelView,
        ids: Tensor,
        mask: Tensor | None = None,
        *,
        batch_size: int = 4,
        device: torch.device | str = "cpu",
        resident: Residency | None = None,
    ) -> None:
        self.view = view
        self.device = torch.device(device)
        self.resident: Residency = resident or (lambda block: nullcontext())
        self.ids = list(ids.split(batch_size))
        self.keep: list[Tensor | None] = (
            [None] * len(self.ids)
            if mask is None or bool(mask.all())
            else [m.to(self.device).bool() for m in mask.split(batch_size)]
        )
        self.sequences = int(ids.shape[0])
        self.hidden: list[Tensor] = []
        self._calls: list[list[_Call]] = []  # [batch][block]
        self._returns_tuple: dict[type, int] = {}  # block class -> length of its tuple, 0: a tensor

    # -- how the blocks are called ------------------------------------------------------------

    @torch.no_grad()
    def start(self) -> Replay:
        """Embed all windows and record how every block is called; then ``hidden`` is ready."""
        for b in range(len(self.ids)):
            self._calls.append([])
            previous = self._calls[b - 1] if b else []

            def record(
                i: int,
                args: Any,
                kwargs: Any,
                batch: int = b,
                previous: Sequence[_Call] = previous,
            ) -> Any:
                hidden, call = _template(args, kwargs)
                if previous:
                    old = previous[i]
                    call.args = tuple(map(_share, call.args, old.args))
                    call.kwargs = {k: _share(v, old.kwargs.get(k)) for k, v in call.kwargs.items()}
                self._calls[batch].append(call)
                if i == 0:
                    self.hidden.append(hidden.detach())
                if i == len(self.view.blocks) - 1:
                    raise _Stop
                return self._like_block(self.view.blocks[i], call, hidden)

            with self._instead_of_blocks(record):
                self._forward(b)
        return self

    def logits(self, batch: int, hidden: Tensor | None = None, row: int | None = None) -> Tensor:
        """The model's logits (B, L, V) when its blocks deliver ``hidden`` (default: the current).

        ``row`` picks one window of the batch, whose hidden states ``hidden`` then are.
        Differentiable with respect to ``hidden`` where gradients are enabled.
        """
        final = self.hidden[batch] if hidden is None else hidden

        def pass_through(i: int, args: Any, kwargs: Any) -> Any:
            given, call = _template(args, kwargs)
            last = i == len(self.view.blocks) - 1
            return self._like_block(self.view.blocks[i], call, final if last else given)

        with self._instead_of_blocks(pass_through):
            output = self._forward(batch, row)
        logits: Tensor = output.logits
        return logits

    @torch.no_grad()
    def logits_of(self, batch: int, row: int) -> Tensor:
        """The logits (1, L, V) of one window of a batch: the head's memory stays small."""
        return self.logits(batch, self.hidden[batch][row : row + 1], row)

    def _forward(self, batch: int, row: int | None = None) -> Any:
        rows = slice(None) if row is None else slice(row, row + 1)
        ids = self.ids[batch][rows].to(self.device)
        whole = self.keep[batch]
        keep = None if whole is None else whole[rows]
        mask = {} if keep is None else {"attention_mask": keep.long()}
        try:
            return self.view.model(input_ids=ids, use_cache=False, **mask)
        except _Stop:
            return None

    @contextmanager
    def _instead_of_blocks(self, behave: Callable[[int, Any, Any], Any]) -> Iterator[None]:
        def stand_in(i: int) -> Callable[..., Any]:
            return lambda *args, **kwargs: behave(i, args, kwargs)

        # A hook library may have put its own forward on the instance: it is put back as it was.
        before = [block.module.__dict__.get("forward") for block in self.view.blocks]
        for block in self.view.blocks:
            block.module.forward = stand_in(block.index)
        try:
            yield
        finally:
            for block, own in zip(self.view.blocks, before, strict=True):
                del block.module.forward
                if own is not None:
                    block.module.forward = own

    def _like_block(self, block: Block, call: _Call, hidden: Tensor) -> Any:
        """``hidden`` in the form this kind of block returns (a tensor, or a tuple before v5)."""
        kind = type(block.module)
        if kind not in self._returns_tuple:
            stand_in = block.module.__dict__.pop("forward")
            try:
                with self.resident(block):
                    output = call(block.module, hidden)
            finally:
                block.module.forward = stand_in
            self._returns_tuple[kind] = len(output) if isinstance(output, tuple) else 0
        length = self._returns_tuple[kind]
        return (hidden, *[None] * (length - 1)) if length else hidden

    # -- moving through the blocks -------------------------------------------------------------

    def run(self, block: Block, batch: int, hidden: Tensor | None = None) -> Tensor:
        """What ``block`` makes of a batch: (B, L, d). The block must be resident."""
        given = self.hidden[batch] if hidden is None else hidden
        output = self._calls[batch][block.index](block.module, given)
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result

    @torch.no_grad()
    def advance(self, block: Block) -> list[Tensor]:
        """Outputs of ``block`` for all batches; they do not replace ``hidden`` by themselves."""
        return [self.checked(block, self.run(block, b)) for b in range(len(self.hidden))]

    def checked(self, block: Block, output: Tensor) -> Tensor:
        """``output``, or an error naming the block that made it NaN or infinite."""
        if not all_finite(output):
            raise NumericsError(
                f"block '{block.name}' gives NaN or infinite activations",
                fix="use --dtype float32 (half precision overflows in some models), "
                "or check the weights with 'secateur plan'",
            )
        return output

    @torch.no_grad()
    def to_end(self, progress: Progress = SILENT, label: str = "forward") -> Replay:
        """Run every block: afterwards ``hidden`` is what the final norm sees."""
        with progress.stage(label, total=len(self.view.blocks), unit="blocks") as advance:
            for block in self.view.blocks:
                with self.resident(block):
                    self.hidden = self.advance(block)
                advance(1)
        return self
