"""A model whose blocks stay on disk, brought into memory one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from secateur.errors import MissingExtra, SecateurError
from secateur.models.anatomy import Block, ModelView
from secateur.models.checks import check_weights
from secateur.models.names import CheckpointMap
from secateur.models.saving import tied_names
from secateur.models.shards import SafetensorsFolder


class _EmptyOnMeta(TorchFunctionMode):
    """``torch.empty`` without a device gives a meta tensor."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty and kwargs.get("device") is None:
            kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


def without_weights(build: Callable[[], Any]) -> Any:
    """``build()`` with its parameters on meta and its buffers real, tied weights tied.

    Buffers (rotary tables and such) are computed by the constructor and stored nowhere, so
    they must be real. Parameters are nearly all made by ``torch.empty``: made on meta from
    the start they never touch the heap, whose fragments would count against a limit.
    """
    try:
        from accelerate import init_empty_weights
    except ImportError:
        raise MissingExtra("accelerate", "hf", "streaming a model") from None

    with init_empty_weights(include_buffers=False), _EmptyOnMeta():
        model = build()
    if any(buffer.is_meta for buffer in model.buffers()):
        with init_empty_weights(include_buffers=False):
            model = build()
    model.tie_weights()
    return model


class StreamedModel:
    """Embeddings, final norm and head in memory; the blocks' parameters on the meta device.

    Peak memory is that of what lies outside the blocks, one block, and one tensor as the
    checkpoint stores it (one block's experts, where those are fused); it does not grow with
    depth. What is written to a block's weights
    inside ``resident`` is gone after it: save it first (``saving.block_state``).

    Attributes:
        model: the model, in evaluation mode.
        view: its anatomy, with which the list of blocks was found.
    """

    def __init__(
        self,
        model: Any,
        tensors: SafetensorsFolder,
        device: torch.device,
        blocks: str | None = None,
    ) -> None:
        self.model = model
        self.device = device
        self.view = ModelView.of(model, blocks)
        self.names = CheckpointMap(model, tensors)
        self._inside = f"{self.view.path}."
        self._resident: set[int] = set()
        self._check_names()
        self._load_outside()
        model.eval()

    @classmethod
    def open(
        cls,
        folder: Path | str,
        config: Any = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        trust_remote_code: bool = False,
        blocks: str | None = None,
    ) -> StreamedModel:
        """Build the model of a checkpoint folder and load all that lies outside its blocks.

        Raises:
            SecateurError: damaged files, or tensors that do not match the model.
        """
        from transformers import AutoConfig, AutoModelForCausalLM

        options = {"trust_remote_code": trust_remote_code}
        if config is None:
            config = AutoConfig.from_pretrained(folder, local_files_only=True, **options)
        tensors = SafetensorsFolder(folder)
        model = without_weights(
            lambda: AutoModelForCausalLM.from_config(config, dtype=dtype, **options)
        )
        return cls(model, tensors, torch.device(device), blocks)

    @contextmanager
    def resident(self, block: Block) -> Iterator[Block]:
        """Have the block's weights in memory inside the context (nesting is free).

        Raises:
            NumericsError: NaN or infinity in a weight.
        """
        if block.index in self._resident:
            yield block
            return
        away = {
            (module, name): parameter
            for module in block.module.modules()
            for name, parameter in module._parameters.items()
            if parameter is not None
        }
        try:
            self._resident.add(block.index)
            self._fill(block.module, block.name)
            yield block
        finally:
            self._resident.discard(block.index)
            for (module, name), parameter in away.items():
                module._parameters[name] = parameter

    def _check_names(self) -> None:
        tied = tied_names(self.model)
        second = self._other_names(tied)
        buffers = {name for name, _ in self.model.named_buffers()}
        for name in self.model.state_dict():
            known = name in self.names or any(n in self.names for n in second.get(name, ()))
            if not known and name not in tied and name not in buffers:
                self.names.read([name])  # raises, naming it

    def _other_names(self, tied: set[str]) -> dict[str, list[str]]:
        """For the first name of each tied weight, its other names."""
        groups: dict[int, list[str]] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            groups.setdefault(id(parameter), []).append(name)
        return {
            name: [n for n in group if n != name]
            for group in groups.values()
            for name in group
            if name not in tied
        }

    def _load_outside(self) -> None:
        tied = tied_names(self.model)
        others = self._other_names(tied)
        for name in self.model.state_dict():
            if name.startswith(self._inside) or name in tied:
                continue
            source = next((n for n in (name, *others.get(name, ())) if n in self.names), None)
            if source is not None:
                self._put(name, self.names.read([source])[source])
        self.model.tie_weights()
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.to(self.device)

    def _fill(self, module: nn.Module, prefix: str) -> None:
        names = [f"{prefix}.{name}" for name in module.state_dict()]
        made: dict[str, Tensor] = {}
        for name in names:
            if name not in made and name in self.names:
                made.update(self.names.read([name]))
            if name in made:
                self._put(name, made.pop(name))

    def _put(self, name: str, tensor: Tensor) -> None:
        owner, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(owner)
        old = module._parameters.get(leaf)
        table: dict[str, Any] = module._parameters if old is not None else module._buffers
        old = table[leaf]
        if tuple(old.shape) != tuple(tensor.shape):
            raise SecateurError(
                f"'{name}' is {tuple(tensor.shape)} in the checkpoint, {tuple(old.shape)} in the model",
                fix="check that config.json and the weights belong together",
            )
        check_weights({name: tensor})
        value = tensor.to(self.device, old.dtype)
        if isinstance(old, nn.Parameter):
            value = nn.Parameter(
                value, requires_grad=old.requires_grad and value.is_floating_point()
            )
        table[leaf] = value
