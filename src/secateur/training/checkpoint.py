"""A training's state in one safetensors file: parameters, optimizer, position; no pickle.

One file, replaced as a whole, so there is always exactly one good checkpoint. Everything
drawn at random in a step is seeded by the step's number, so no generator has to be kept.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import SecateurError, UsageError
from secateur.tensorfile import opened, save_tensors
from secateur.training.sharding import alike, wholes

FILE = "training.safetensors"
METRICS = "metrics.jsonl"
_FORMAT = "secateur.training.1"

Named = dict[str, nn.Parameter]


def optimizer_tensors(optimizer: torch.optim.Optimizer, named: Named) -> dict[str, Tensor]:
    """The optimizer's state under ``NAME#KEY``; numbers become float64 tensors."""
    out: dict[str, Tensor] = {}
    for name, parameter in named.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if value is not None:
                kept = value if isinstance(value, Tensor) else torch.tensor(value).double()
                out[f"{name}#{key}"] = kept.detach()
    return out


def restore_optimizer(
    optimizer: torch.optim.Optimizer, named: Named, tensors: Mapping[str, Tensor]
) -> None:
    """Put back what ``optimizer_tensors`` gave."""
    for full, value in tensors.items():
        name, _, key = full.rpartition("#")
        if name in named:
            parameter = named[name]
            if value.ndim == 0:
                # AdamW counts its steps in a float32 tensor on the CPU; float64 was a number.
                number = value.dtype is torch.float64
                optimizer.state[parameter][key] = int(value) if number else value.clone()
            else:  # moments lie beside the parameter
                optimizer.state[parameter][key] = alike(value, parameter).clone()


def save(
    folder: Path,
    named: Named,
    optimizer: torch.optim.Optimizer,
    best: Mapping[str, Tensor],
    hooks: Mapping[str, Tensor],
    record: dict[str, Any],
    *,
    leads: bool = True,
) -> None:
    """Write the checkpoint, replacing the last one; only the process that ``leads`` does.

    Every process must call it: what is sharded has to be gathered.
    """
    tensors = {f"parameter/{n}": p.detach() for n, p in named.items()}
    tensors |= {f"optimizer/{n}": t for n, t in optimizer_tensors(optimizer, named).items()}
    tensors |= {f"best/{n}": t for n, t in best.items()}
    tensors |= {f"hook/{n}": t for n, t in hooks.items()}
    words = {"format": _FORMAT, "record": json.dumps(record)}
    gathered = {n: t.contiguous() for n, t in wholes(tensors).items()}
    if leads:
        save_tensors(folder / FILE, gathered, words)


def load(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]] | None:
    """(tensors by kind, record) of the last checkpoint, or None."""
    path = folder / FILE
    if not path.exists():
        return None
    kinds: dict[str, dict[str, Tensor]] = {
        k: {} for k in ("parameter", "optimizer", "best", "hook")
    }
    with opened(path) as file:
        header = file.metadata() or {}
        if header.get("format") != _FORMAT:
            raise SecateurError("not a training checkpoint", field="file", value=str(path))
        for full in file.keys():  # noqa: SIM118 - safe_open is no mapping
            kind, _, name = full.partition("/")
            kinds[kind][name] = file.get_tensor(full)
    return kinds, json.loads(header["record"])


def refuse_other(found: dict[str, Any], wanted: dict[str, Any], folder: Path) -> None:
    """A training goes on only under the settings it began with.

    Raises:
        UsageError: naming the first setting that differs.
    """
    wanted = json.loads(json.dumps(wanted))
    for key, value in wanted.items():
        if found.get(key) != value:
            raise UsageError(
                f"'{folder.name}' holds a training with {key}={_short(found.get(key))}",
                field=key,
                value=_short(value),
                fix="give the settings it began with, choose another --out, or --fresh",
            )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) < 60 else text[:57] + "..."


def trim_metrics(folder: Path, step: int) -> list[dict[str, Any]]:
    """Drop the lines a killed training wrote after its last checkpoint; returns the others."""
    path = folder / METRICS
    kept = []
    if path.exists():
        for line in path.read_text("utf-8").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if row["step"] <= step:
                kept.append(row)
        path.write_text("".join(json.dumps(row) + "\n" for row in kept), "utf-8")
    return kept
