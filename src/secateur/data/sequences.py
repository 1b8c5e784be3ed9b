"""Token ids that the caller has already: tensors, lists, or batches of a data loader."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from secateur.errors import UsageError

_FIX = "give text, token ids, or mappings with input_ids (and maybe attention_mask)"


def single_stream(source: Any) -> Tensor | None:
    """``source`` as (T,) int64 when it is one sequence of token ids, else None."""
    if isinstance(source, list | tuple) and source and isinstance(source[0], int):
        return torch.tensor(source, dtype=torch.int64)
    if not isinstance(source, Tensor) or source.dim() != 1:
        return None
    return _rows(source)[0][0]


def sequences(source: Any, at_most: int | None) -> tuple[Tensor, Tensor | None]:
    """Many sequences as (N, L) ids and mask, shorter ones padded on the right.

    Args:
        source: ids (N, L), or an iterable (it may be endless) of ids or of mappings with
            ``input_ids`` and maybe ``attention_mask``, each one sequence or a batch.
        at_most: how many sequences are taken; None: all.

    Returns:
        ids int64 and mask bool, or None where nothing is padded.

    Raises:
        UsageError: nothing in it, or not token ids.
    """
    if isinstance(source, Tensor) and source.dim() != 2:
        raise _not_ids(source, f"token ids are whole numbers (N, L), not {tuple(source.shape)}")
    rows: list[tuple[Tensor, Tensor]] = []
    try:
        items = iter(source)
    except TypeError:
        raise _not_ids(source, "not a sequence of anything") from None
    for item in islice(items, at_most):
        rows += _rows(item)
        if at_most is not None and len(rows) >= at_most:
            break
    rows = rows[:at_most]
    length = max((len(ids) for ids, _ in rows), default=0)
    if length == 0:
        raise UsageError(
            "there is nothing in it", field="calibration", value=type(source).__name__, fix=_FIX
        )
    ids = torch.zeros(len(rows), length, dtype=torch.int64)
    mask = torch.zeros(len(rows), length, dtype=torch.bool)
    for i, (row, keep) in enumerate(rows):
        ids[i, : len(row)] = row
        mask[i, : len(row)] = keep
    return ids, None if bool(mask.all()) else mask


def _rows(item: Any) -> list[tuple[Tensor, Tensor]]:
    """(ids, mask) of each sequence in one element of a data set."""
    mapping = item if isinstance(item, Mapping) else {"input_ids": item}
    if "input_ids" not in mapping:
        raise _not_ids(item, f"a sample has no 'input_ids', but {', '.join(map(str, mapping))}")
    try:
        ids = torch.atleast_2d(torch.as_tensor(mapping["input_ids"]).cpu())
    except (TypeError, ValueError, RuntimeError) as error:
        raise _not_ids(item, f"a sample is no sequence of token ids ({error})") from None
    if ids.dim() != 2 or ids.is_floating_point() or ids.is_complex():
        kind = f"{ids.dtype} in {ids.dim()} dimensions"
        raise _not_ids(item, f"token ids are whole numbers in one or two dimensions, not {kind}")
    mask = mapping.get("attention_mask")
    keep = torch.ones_like(ids) if mask is None else torch.atleast_2d(torch.as_tensor(mask).cpu())
    if keep.shape != ids.shape:
        shapes = f"{tuple(keep.shape)}, the ids {tuple(ids.shape)}"
        raise _not_ids(item, f"the attention mask has the shape {shapes}")
    return list(zip(ids.long(), keep.bool(), strict=True))


def _not_ids(item: Any, why: str) -> UsageError:
    return UsageError(why, field="calibration", value=type(item).__name__, fix=_FIX)
