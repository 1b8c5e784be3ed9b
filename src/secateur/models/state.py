"""State borrowed for a computation and given back as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from secateur.models.anatomy import text_config

_BORROWED = "use_cache_before"


def forget_graphs(model: nn.Module) -> None:
    """Detach what modules remember of their last forward: a tensor with a graph cannot be copied."""
    for module in model.modules():
        for name, value in vars(module).items():
            vars(module)[name] = _without_graph(value)
            if isinstance(value, list):
                value[:] = map(_without_graph, value)


def _without_graph(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) and value.grad_fn is not None else value


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """Evaluation mode, no key-value cache, no gradients; all put back on leaving.

    Inside, ``requires_grad`` is off everywhere (switch it on where gradients are wanted).
    Each module's training flag, each parameter's ``requires_grad`` and the configs'
    ``use_cache`` return to what they were, after success and after an exception alike.
    """
    training = [(module, module.training) for module in model.modules()]
    # By owner and name, not by object: streaming replaces parameters in between.
    wanted = [
        (module, name, parameter.requires_grad)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None
    ]
    configs: dict[int, Any] = {
        id(c): c for c in (getattr(model, "config", None), text_config(model))
    }
    caches = [(c, c.use_cache) for c in configs.values() if hasattr(c, "use_cache")]
    before = model.__dict__.get(_BORROWED)
    model.__dict__[_BORROWED] = before or [flag for _, flag in caches]
    try:
        model.eval()
        for config, _ in caches:
            config.use_cache = False
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        yield model
    finally:
        for module, flag in training:
            module.training = flag
        for config, flag in caches:
            config.use_cache = flag
        if before is None:
            del model.__dict__[_BORROWED]
        else:
            model.__dict__[_BORROWED] = before
        for module, name, flag in wanted:
            parameter_now = module._parameters.get(name)
            if parameter_now is not None:
                parameter_now.requires_grad_(flag)


def own_use_cache(model: nn.Module, flag: bool) -> bool:
    """``use_cache`` as the model's own config says it, also while it is borrowed."""
    borrowed = model.__dict__.get(_BORROWED)
    return bool(borrowed[0]) if borrowed else flag


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' own progress bars; ours are drawn by whoever asked for them."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
