"""The output head of a language model, and the weight it may share with the embedding."""

from __future__ import annotations

from typing import Any

from torch import nn

from secateur.errors import UsageError
from secateur.models.discovery import is_linear


def output_head(model: nn.Module) -> tuple[str, nn.Module]:
    """Name and module of the linear that makes the logits.

    Raises:
        UsageError: the model shows none.
    """
    source: Any = model
    head = source.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None or not is_linear(head):
        raise UsageError(
            "the model shows no linear output head", field="head", value=type(model).__name__
        )
    return next(name for name, module in model.named_modules() if module is head), head


def is_tied(model: nn.Module) -> bool:
    """True if the head and the input embedding are one and the same weight."""
    source: Any = model
    return source.get_input_embeddings().weight is source.get_output_embeddings().weight


def untie_head(model: nn.Module) -> bool:
    """Give the head a weight of its own and say so in the config; False if it had one already.

    What is trained into a tied head would change the embedding of every input token too.
    """
    output_head(model)
    if not is_tied(model):
        return False
    source: Any = model
    head = source.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone(), head.weight.requires_grad)
    config = source.config
    for part in (config, config.get_text_config() if hasattr(config, "get_text_config") else None):
        if part is not None and hasattr(part, "tie_word_embeddings"):
            part.tie_word_embeddings = False
    # transformers 5 keeps what it tied on the model too, and leaves those out when saving.
    tied = getattr(model, "all_tied_weights_keys", None)
    if isinstance(tied, dict):
        name, _ = output_head(model)
        tied.pop(f"{name}.weight", None)
    return True
