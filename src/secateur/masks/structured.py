"""What is gone of a model's structure: one bool a unit, numbered as in the original model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from secateur.errors import UsageError
from secateur.files import write_json
from secateur.tensorfile import opened, save_tensors

if TYPE_CHECKING:
    from secateur.models.units import Group

_ATTRIBUTE = "pruned_structure"
_MOST_UNITS = 1 << 24
"""More units than any group has: a damaged file must not ask for memory without end."""


@dataclass(eq=False)
class StructuredMask:
    """Units that are gone, by group.

    Attributes:
        gone: group key -> (total,) bool over the finest units (query heads, FFN channels,
            residual channels, layers) of the original model, True where gone.
        duplicated: keys of attentions whose key-value heads were copied, one for each
            surviving query head.
    """

    gone: dict[str, Tensor] = field(default_factory=dict)
    duplicated: set[str] = field(default_factory=set)

    def remove(self, group: Group, units: Tensor) -> None:
        """Mark ``units`` (bool (n_units,), the group's present numbering) as gone."""
        if units.shape != (group.n_units,):
            raise ValueError(f"'{group.key}' has {group.n_units} units, not {tuple(units.shape)}")
        now = self.gone.get(group.key, torch.zeros(group.total, dtype=torch.bool))
        self.gone[group.key] = now | group.gone(units)

    def of(self, group: Group) -> Tensor:
        """Which of the group's present units are gone: bool (n_units,)."""
        gone = self.gone.get(group.key)
        if gone is None:
            return torch.zeros(group.n_units, dtype=torch.bool)
        return gone[group.original].all(1)

    def union(self, other: StructuredMask) -> StructuredMask:
        """Both together; groups must have the same size in both."""
        both = {k: v.clone() for k, v in self.gone.items()}
        for key, gone in other.gone.items():
            if key in both and both[key].shape != gone.shape:
                raise UsageError(
                    f"one mask has {len(both[key])} units, the other {len(gone)}",
                    field="group",
                    value=key,
                )
            both[key] = both[key] | gone if key in both else gone.clone()
        return StructuredMask(both, self.duplicated | other.duplicated)

    def kept(self, key: str) -> list[int]:
        """Original numbers of the survivors."""
        return [int(i) for i in torch.nonzero(~self.gone[key]).reshape(-1)]

    def counts(self) -> dict[str, tuple[int, int]]:
        """Group key -> (gone, total)."""
        return {k: (int(v.sum()), len(v)) for k, v in self.gone.items()}

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, StructuredMask) or self.gone.keys() != other.gone.keys():
            return False
        same = all(torch.equal(v, other.gone[k]) for k, v in self.gone.items())
        return same and self.duplicated == other.duplicated

    # -- on disk -------------------------------------------------------------------------------

    def record(self) -> dict[str, Any]:
        """For JSON: what is kept of how many, which a person can read."""
        return {
            "groups": {
                key: {"of": len(gone), "kept": self.kept(key)}
                for key, gone in sorted(self.gone.items())
            },
            "duplicated": sorted(self.duplicated),
        }

    @classmethod
    def parse(cls, record: Mapping[str, Any], origin: str = "mask") -> StructuredMask:
        """The inverse of ``record``.

        Raises:
            UsageError: not such a record, or a number outside its group.
        """
        gone = {}
        try:
            for key, entry in record["groups"].items():
                if not 1 <= int(entry["of"]) <= _MOST_UNITS:
                    raise ValueError(f"'{key}' cannot have had {entry['of']} units")
                mask = torch.ones(int(entry["of"]), dtype=torch.bool)
                for unit in entry["kept"]:
                    if not 0 <= unit < len(mask):
                        raise UsageError(
                            f"'{key}' has {len(mask)} units, so there is no unit {unit}",
                            field="manifest",
                            value=origin,
                        )
                    mask[int(unit)] = False
                gone[str(key)] = mask
            return cls(gone, set(record.get("duplicated", ())))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UsageError(
                f"not a structured mask ({type(error).__name__}: {error})",
                field="manifest",
                value=origin,
            ) from None

    def save(self, path: Path) -> None:
        """Write as ``.json`` or ``.safetensors``, by the file's ending."""
        if path.suffix == ".json":
            write_json(path, self.record())
        else:
            tensors = {key: gone.to(torch.uint8) for key, gone in self.gone.items()}
            save_tensors(path, tensors, {"duplicated": json.dumps(sorted(self.duplicated))})

    @classmethod
    def load(cls, path: Path) -> StructuredMask:
        """Read what ``save`` wrote."""
        if path.suffix == ".json":
            try:
                return cls.parse(json.loads(path.read_text("utf-8")), str(path))
            except (OSError, ValueError) as error:
                raise UsageError(
                    f"cannot be read: {error}", field="mask", value=str(path)
                ) from None
        with opened(path) as file:
            names = list(file.keys())
            gone = {name: file.get_tensor(name).bool() for name in names}
            words = (file.metadata() or {}).get("duplicated", "[]")
        return cls(gone, set(json.loads(words)))


def structure_of(model: nn.Module) -> StructuredMask | None:
    """What was cut from ``model`` already (by ``surgery.shrink`` or as it was loaded)."""
    found = model.__dict__.get(_ATTRIBUTE)
    return found if isinstance(found, StructuredMask) else None


def remember(model: nn.Module, mask: StructuredMask) -> None:
    """Note on the model what is gone from it, in original numbers."""
    model.__dict__[_ATTRIBUTE] = mask
