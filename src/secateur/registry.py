"""A named table of parts, loaded only when asked for, open to plug-ins."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterator
from importlib.metadata import entry_points
from typing import Generic, TypeVar, cast

from secateur.errors import UsageError

T = TypeVar("T")


class Registry(Generic[T]):
    """Names mapped to ``"package.module:attribute"`` targets or to the objects themselves.

    Lookups import lazily, accept plug-ins announced under the entry-point ``group``,
    and answer an unknown name with the nearest known ones.

    >>> r = Registry[str]("fruit", {"apple": "builtins:str"})
    >>> r["apple"] is str
    True
    """

    def __init__(self, kind: str, table: dict[str, str | T], group: str | None = None) -> None:
        self.kind = kind
        self.group = group
        self._table: dict[str, str | T] = dict(table)
        self._plugins_seen = group is None

    def register(self, name: str, item: T | str) -> None:
        """Add ``item`` under ``name``; a name already taken is an error."""
        if name in self._table and self._table[name] != item:
            raise UsageError(
                f"{self.kind} '{name}' is registered already", field="name", value=name
            )
        self._table[name] = item

    def names(self) -> list[str]:
        """All known names, sorted."""
        self._see_plugins()
        return sorted(self._table)

    def __contains__(self, name: object) -> bool:
        self._see_plugins()
        return name in self._table

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __getitem__(self, name: str) -> T:
        self._see_plugins()
        if name not in self._table:
            near = difflib.get_close_matches(name, self._table, n=1, cutoff=0.5)
            hint = f"did you mean '{near[0]}'? " if near else ""
            raise UsageError(
                f"there is no {self.kind} of that name",
                field=self.kind,
                value=name,
                fix=f"{hint}known: {', '.join(sorted(self._table))}",
            )
        item = self._table[name]
        if isinstance(item, str):
            module, _, attribute = item.partition(":")
            item = cast(T, getattr(importlib.import_module(module), attribute))
            self._table[name] = item
        return item

    def _see_plugins(self) -> None:
        if self._plugins_seen:
            return
        self._plugins_seen = True
        for point in entry_points(group=self.group or ""):
            self._table.setdefault(point.name, f"{point.module}:{point.attr}")
