"""A Hugging Face folder read a tensor at a time, with the masks that belong to it."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.errors import SecateurError, UsageError
from secateur.files import told_plainly
from secateur.masks.store import FILE_NAME as MASK_FILE
from secateur.masks.store import MaskStore, check_mask, load_masks
from secateur.models.structured_saving import read_manifest
from secateur.tensorfile import TensorFiles

_SIDE_FILES = (
    "config.json",
    "generation_config.json",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.*",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "*.model",
    "*preprocessor_config.json",
    "LICENSE*",
    "NOTICE*",
)
_EXPERT = re.compile(r"^(?P<stem>.+)\.experts\.(?P<part>gate_up_proj|down_proj)\.(?P<expert>\d+)$")
_SPLIT_NAMES = {"gate": ("gate_proj", "w1"), "up": ("up_proj", "w3"), "down": ("down_proj", "w2")}


class ModelFolder:
    """Config, tensors and masks of a folder as ``save_pretrained`` lays it out.

    Args:
        path: the folder.
        masks: its masks; by default ``masks.safetensors`` inside it, and none if there is none.

    Raises:
        UsageError: no folder, no config.json, or no safetensors weights in it.
    """

    def __init__(self, path: Path | str, masks: Mapping[str, Tensor] | None = None) -> None:
        self.path = Path(path)
        self.config = read_config(self.path)
        self.tensors = TensorFiles(weight_files(self.path))
        if masks is None and (self.path / MASK_FILE).is_file():
            masks = load_masks(self.path)
        self.masks: Mapping[str, Tensor] = {} if masks is None else masks
        self._sources = _locate(self.masks, set(self.tensors.names()))

    def require_stock(self) -> None:
        """Refuse a folder whose config does not say its shapes.

        Raises:
            UsageError: naming what stands in the way.
        """
        manifest = read_manifest(self.path)
        if manifest is not None and not manifest["stock"]:
            raise UsageError(
                f"its shapes are no stock model's ({manifest.get('why') or 'see its manifest'})",
                field="folder",
                value=str(self.path),
                fix="prune with structure: {uniform: true}, or use --format onnx",
            )

    def mask(self, tensor: str) -> Tensor | None:
        """The mask of a stored tensor, in the tensor's own shape; None if it was not pruned."""
        sources = self._sources.get(tensor)
        if sources is None:
            return None
        if isinstance(sources, dict):  # the experts of one 3-D parameter
            shape = self.tensors.spec(tensor).shape
            whole = torch.zeros(shape, dtype=torch.bool)
            for expert, name in sources.items():
                mask = self._oriented(name)
                whole[expert] = mask.T if mask.shape != shape[1:] else mask
            return whole
        name, half = sources
        mask = self._oriented(name)
        if half is not None:  # gate and up are one matrix in memory, two on disk
            mask = mask.chunk(2)[half].contiguous()
        return mask

    def check_masks(self) -> int:
        """Prove, one tensor at a time, that every pruned weight is zero; returns their number."""
        pruned = 0
        for name in self.tensors.names():
            mask = self.mask(name)
            if mask is not None:
                check_mask(name, mask, self.tensors.get(name))
                pruned += int(mask.sum())
        return pruned

    def _oriented(self, name: str) -> Tensor:
        return self.masks.stored(name) if isinstance(self.masks, MaskStore) else self.masks[name]


def read_config(path: Path) -> dict[str, Any]:
    """The folder's config.json."""
    if not path.is_dir():
        raise UsageError("there is no such folder", field="folder", value=str(path))
    file = path / "config.json"
    if not file.is_file():
        raise UsageError(
            "the folder holds no config.json, so it is no Hugging Face model",
            field="folder",
            value=str(path),
        )
    try:
        config: dict[str, Any] = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise SecateurError(f"'{file}' is not JSON ({error})") from error
    return config


def weight_files(path: Path) -> list[Path]:
    """The safetensors files that hold the model's weights."""
    index = path / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
        files = [path / name for name in names]
    else:
        files = [path / "model.safetensors"]
    for file in files:
        if not file.is_file():
            raise UsageError(
                f"'{file.name}' is missing",
                field="folder",
                value=str(path),
                fix="point to a folder with model.safetensors (pickled weights are not opened)",
            )
    return files


def copy_side_files(source: Path, target: Path) -> list[str]:
    """Copy config, tokenizer and licence files; returns their names."""
    names = sorted({f.name for p in _SIDE_FILES for f in source.glob(p) if f.is_file()})
    for name in names:
        shutil.copyfile(source / name, target / name)
    return names


@contextmanager
def new_folder(out: Path | str) -> Iterator[Path]:
    """A temporary folder that becomes ``out`` when the block ends well, and vanishes otherwise."""
    given, out = out, Path(out).absolute()  # "." has no name to put a temporary folder beside
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(
            "exists already and is not an empty folder",
            field="out",
            value=str(given),
            fix="choose another folder, or remove this one",
        )
    temporary = out.with_name(f".{out.name}.{os.getpid()}.part")
    with told_plainly(out):
        try:
            temporary.mkdir(parents=True)
            yield temporary
            if out.exists():
                out.rmdir()
            os.replace(temporary, out)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


Source = tuple[str, int | None] | dict[int, str]


def _locate(masks: Mapping[str, Tensor], tensors: set[str]) -> dict[str, Source]:
    """Which stored tensor each mask is about.

    Masks are named after the model in memory; a checkpoint may leave out the base model's
    prefix (``transformer.h.0`` is ``h.0`` in GPT-2's), and keeps the experts of a mixture
    apart that transformers 5 stacks into one 3-D parameter.
    """
    found: dict[str, Source] = {}
    lost = []
    for name in masks:
        candidates = [name, f"{name}.weight"]
        bare = name.partition(".")[2]
        candidates += [bare, f"{bare}.weight"]
        where = next((c for c in candidates if c in tensors), None)
        if where is not None:
            found[where] = (name, None)
        elif not _locate_expert(name, tensors, found):
            lost.append(name)
    if lost:
        raise SecateurError(
            f"{len(lost)} masks name weights that the folder does not hold: {', '.join(lost[:3])}",
            field="masks",
            fix="take the masks and the weights of the same run",
        )
    return found


def _locate_expert(name: str, tensors: set[str], found: dict[str, Source]) -> bool:
    match = _EXPERT.match(name)
    if match is None:
        return False
    stem, part, expert = match["stem"], match["part"], int(match["expert"])
    stacked = f"{stem}.experts.{part}"
    if stacked in tensors:
        slices = found.setdefault(stacked, {})
        assert isinstance(slices, dict)
        slices[expert] = name
        return True
    parent = stem.rpartition(".")[0]
    stems = [stem, f"{parent}.block_sparse_moe", f"{parent}.mlp"]
    roles = ("gate", "up") if part == "gate_up_proj" else ("down",)
    for half, role in enumerate(roles):
        options = [f"{s}.experts.{expert}.{n}.weight" for s in stems for n in _SPLIT_NAMES[role]]
        where = next((o for o in options if o in tensors), None)
        if where is None:
            return False
        found[where] = (name, half if len(roles) == 2 else None)
    return True
