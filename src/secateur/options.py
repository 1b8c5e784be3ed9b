"""A part's options from a recipe's words: checked once, refused in one way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from secateur.errors import UsageError

T = TypeVar("T")


def build(
    kind: type[T], options: Mapping[str, Any], what: str, /, *, fix: str = "", **given: Any
) -> T:
    """A dataclass whose fields are options, from what the user wrote.

    Args:
        kind: the dataclass.
        options: names to values, of the user's.
        what: how a message speaks of it, such as ``method 'wanda'``.
        fix: what helps with a value of the wrong type; default: the list of options.
        **given: fields that are no options of the user's.

    Raises:
        UsageError: an unknown option, with the known ones named; or one of the wrong type.
    """
    known = [f.name for f in fields(kind) if f.name not in given]  # type: ignore[arg-type]
    listed = f"options: {', '.join(known) or 'none'}"
    for name in options:
        if name not in known:
            raise UsageError(
                f"{what} has no such option", field=name, value=options[name], fix=listed
            )
    try:
        return TypeAdapter(kind).validate_python({**given, **options})
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else "options"
        raise UsageError(
            f"{what}: {first['msg']}",
            field=name,
            value={**given, **options}.get(name),
            fix=fix or listed,
        ) from None
