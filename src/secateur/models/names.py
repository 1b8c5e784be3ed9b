"""From the names in a checkpoint to the names in the model.

They differ more often than one would think: GPT-2's hub files lack the prefix
``transformer.``, and transformers 5 fuses experts that files keep one by one. transformers
knows all of this; here its rules are applied to any few tensors instead of the whole file.
"""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.models.shards import SafetensorsFolder, Shard


@dataclass
class _Recipe:
    """How to make one or several entries of the model out of tensors of the checkpoint."""

    target: str
    sources: list[tuple[str, str | None]] = field(default_factory=list)
    converter: Any = None


class CheckpointMap:
    """Reads entries of the model's state dict from a folder whose names may differ.

    Args:
        model: with its final names; parameters may be on meta.
        tensors: the checkpoint.
    """

    def __init__(self, model: nn.Module, tensors: SafetensorsFolder | Shard) -> None:
        self.model = model
        self.tensors = tensors
        self.recipes: dict[str, _Recipe] = {}
        wanted = model.state_dict()
        rules = _rules(model)
        for source in sorted(tensors.names(), key=_natural):
            target, pattern, converter = rules(source, wanted)
            if target not in wanted:
                continue
            recipe = self.recipes.setdefault(target, _Recipe(target, [], converter))
            recipe.sources.append((source, pattern))
            others = converter.target_patterns[1:] if converter is not None else ()
            for other in others:  # one file tensor that becomes several entries
                self.recipes[target.replace(converter.target_patterns[0], other)] = recipe

    def __contains__(self, name: object) -> bool:
        return name in self.recipes

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The entries ``names``, in the types the checkpoint stores.

        Raises:
            SecateurError: the checkpoint has nothing for a name, or tensors of other shapes.
        """
        out: dict[str, Tensor] = {}
        for name in names:
            if name not in out:
                out.update(self._make(name))
        return out

    def _make(self, name: str) -> dict[str, Tensor]:
        recipe = self.recipes.get(name)
        if recipe is None:
            raise SecateurError(
                f"'{self.tensors.path}' has nothing for the model's '{name}'",
                fix="check that config.json and the weights belong together; if the file keeps "
                "another layout, load and save it once with transformers, or leave --stream out",
            )
        if recipe.converter is None:
            return {name: self.tensors.read(recipe.sources[-1][0])}
        converter = deepcopy(recipe.converter)
        for source, pattern in recipe.sources:
            converter.add_tensor(recipe.target, source, pattern, self.tensors.read(source))
        config = getattr(self.model, "config", None)
        made = converter.convert(recipe.target, model=self.model, config=config)
        return {key: v[0] if isinstance(v, list) else v for key, v in made.items()}


def _natural(name: str) -> list[tuple[int, int | str]]:
    """Sort key under which expert 2 comes before expert 10."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in name.split(".")]


def _rules(model: Any) -> Any:
    """A function (source, wanted) -> (target, pattern, converter) for this model."""
    prefix = getattr(model, "base_model_prefix", "") or ""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            rename_source_key,
        )
    except ImportError:  # transformers 4 keeps the names of the file, but for the prefix
        return lambda source, wanted: (_with_prefix(source, prefix, wanted), None, None)
    mapping = get_model_conversion_mapping(model) if hasattr(model, "config") else []
    renamings = [rule for rule in mapping if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in mapping if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}

    def apply(source: str, wanted: dict[str, Tensor]) -> tuple[str, str | None, Any]:
        target, pattern = rename_source_key(source, renamings, converters, prefix, wanted)
        if target not in wanted:  # already as the model has it, or only the prefix differs
            plain = _with_prefix(source, prefix, wanted)
            if plain in wanted:
                return plain, None, None
        return target, pattern, by_pattern[pattern] if pattern is not None else None

    return apply


def _with_prefix(source: str, prefix: str, wanted: dict[str, Tensor]) -> str:
    for candidate in (source, f"{prefix}.{source}", source.removeprefix(f"{prefix}.")):
        if candidate in wanted:
            return candidate
    return source
