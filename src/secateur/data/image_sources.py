"""Where labelled images come from: a name, a folder, or a dataset in memory.

``SPEC`` or ``SPEC:PART`` with PART ``train``, ``test`` or ``all``. Names: ``digits`` (scikit-learn's,
8 x 8) and ``fashion-mnist`` (Debian's package ``dataset-fashion-mnist``). Folders: the four files of
MNIST's format; a folder of classes, or one each under ``train`` and ``test`` (or ``val``); or image
files alone, of which the n-th by name shows class n.
"""

from __future__ import annotations

import difflib
import gzip
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from secateur.data.image_files import FILES, image_files
from secateur.data.images import ImageSet, Preprocess
from secateur.errors import MissingExtra, SecateurError, UsageError

NAMES = ("digits", "fashion-mnist")
PARTS = ("train", "test", "all")
TEST_EVERY = 5
"""Where a set has no parts of its own, every so-manieth image is for testing."""
_FASHION = Path("/usr/share/datasets/fashion-mnist")
_FASHION_CLASSES = (
    *("t-shirt", "trouser", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
)


def read_images(
    spec: str | Path | ImageSet | Any,
    part: str | None = None,
    *,
    preprocess: Preprocess | None = None,
    channels: int | None = None,
) -> ImageSet:
    """Labelled images.

    Args:
        spec: see the module; or an ``ImageSet``, or any sequence of (image, label) pairs.
        part: ``train``, ``test`` or ``all``, unless ``spec`` names one.
        preprocess: how they become input; by default zero mean and unit variance over the training
            part, and files cut to squares of 224.
        channels: 1 or 3, of image files; by default 3.

    Raises:
        UsageError: no such set or part, an empty folder. SecateurError: damaged files.
    """
    if isinstance(spec, ImageSet):
        return spec if preprocess is None else replace(spec, preprocess=preprocess)
    if not isinstance(spec, str | Path):
        return from_pairs(spec, part or "all", preprocess)
    text = str(spec)
    name, colon, own = text.rpartition(":")
    if colon and own in PARTS:
        text, part = name, own
    part = part or "all"
    if part not in PARTS:
        raise UsageError("no such part", field="images", value=part, fix=", ".join(PARTS))
    if text == "digits":
        found = _part(_digits(), part)
    elif text == "fashion-mnist":
        found = _part(_mnist(_fashion_folder(), text, _FASHION_CLASSES), part)
    elif Path(text).is_dir():
        found = _folder(Path(text), part, preprocess, channels or 3)
    else:
        near = difflib.get_close_matches(text, NAMES, n=1)
        hint = f"did you mean '{near[0]}'? " if near else ""
        raise UsageError(
            "neither a folder nor a known set of images",
            field="images",
            value=text,
            fix=f"{hint}a folder of images, or one of {', '.join(NAMES)}",
        )
    return found if preprocess is None else replace(found, preprocess=preprocess)


def _part(both: tuple[ImageSet, ImageSet], part: str) -> ImageSet:
    train, test = both
    if part != "all":
        return train if part == "train" else test
    assert train.pixels is not None
    assert test.pixels is not None
    return replace(
        train,
        pixels=torch.cat([train.pixels, test.pixels]),
        targets=torch.cat([train.targets, test.targets]),
        part="all",
    )


def _parts(
    name: str, pixels: Tensor, targets: Tensor, classes: Sequence[str]
) -> tuple[ImageSet, ImageSet]:
    """Training and test part of a set that has none; scaled by the training part."""
    test = torch.arange(len(targets)) % TEST_EVERY == TEST_EVERY - 1
    scale = Preprocess.of(pixels[~test])
    made = [
        ImageSet(
            name,
            targets[rows],
            tuple(classes),
            pixels[rows],
            (),
            pixels.shape[1],
            scale,
            None,
            part,
        )
        for part, rows in (("train", ~test), ("test", test))
    ]
    return made[0], made[1]


@lru_cache(maxsize=1)
def _digits() -> tuple[ImageSet, ImageSet]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingExtra("scikit-learn", "vision", "the set 'digits'") from error
    bunch: Any = load_digits()
    pixels = torch.from_numpy(np.minimum(bunch.images * 16, 255).astype(np.uint8))[:, None]
    targets = torch.from_numpy(bunch.target.astype(np.int64))
    return _parts("digits", pixels, targets, [str(n) for n in range(10)])


# -- MNIST's format --------------------------------------------------------------------------------


def _fashion_folder() -> Path:
    folder = Path(os.environ.get("SECATEUR_FASHION_MNIST", _FASHION))
    if not _is_mnist(folder):
        raise UsageError(
            f"its files are not in {folder}",
            field="images",
            value="fashion-mnist",
            fix="apt-get install dataset-fashion-mnist, or name a folder with its four files",
        )
    return folder


def _is_mnist(folder: Path) -> bool:
    return any(folder.glob("train-images-idx3-ubyte*"))


@lru_cache(maxsize=2)
def _mnist(
    folder: Path, name: str, classes: tuple[str, ...] | None = None
) -> tuple[ImageSet, ImageSet]:
    made = []
    scale: Preprocess | None = None
    for part, prefix in (("train", "train"), ("test", "t10k")):
        pixels = torch.from_numpy(_idx(folder, f"{prefix}-images-idx3-ubyte", 3))[:, None]
        targets = torch.from_numpy(_idx(folder, f"{prefix}-labels-idx1-ubyte", 1).astype(np.int64))
        if len(pixels) != len(targets):
            raise SecateurError(f"{len(pixels)} images and {len(targets)} labels in '{folder}'")
        scale = scale or Preprocess.of(pixels)
        names = classes or tuple(str(n) for n in range(int(targets.max()) + 1))
        made.append(ImageSet(name, targets, names, pixels, (), 1, scale, None, part))
    return made[0], made[1]


def _idx(folder: Path, name: str, dims: int) -> np.ndarray[Any, Any]:
    """An array in the format of MNIST's files, packed or not."""
    path = next((p for p in (folder / name, folder / f"{name}.gz") if p.exists()), None)
    if path is None:
        raise UsageError("has no such file", field="images", value=str(folder), fix=f"{name}.gz")
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise SecateurError(f"'{path}' cannot be read: {error}") from None
    head = np.frombuffer(data[: 4 + 4 * dims], dtype=">u4")
    if len(head) != dims + 1 or head[0] != 0x800 + dims:
        raise SecateurError(f"'{path}' is no file of MNIST's format with {dims} dimensions")
    shape = tuple(int(n) for n in head[1:])
    body = np.frombuffer(data, dtype=np.uint8, offset=4 + 4 * dims)
    if body.size != int(np.prod(shape)):
        raise SecateurError(f"'{path}' should hold {shape} bytes and holds {body.size}")
    return body.reshape(shape).copy()


# -- folders ---------------------------------------------------------------------------------------


def _folder(folder: Path, part: str, preprocess: Preprocess | None, channels: int) -> ImageSet:
    name = folder.name or str(folder)
    if _is_mnist(folder):
        return _part(_mnist(folder, name), part)
    scale = preprocess or Preprocess((127.5,) * channels, (127.5,) * channels, 256, 224)
    halves = {
        half: found
        for half, names in (("train", ("train",)), ("test", ("test", "val", "validation")))
        if (found := next((folder / n for n in names if (folder / n).is_dir()), None))
    }
    if len(halves) == 1 and any(p.is_dir() for p in next(iter(halves.values())).iterdir()):
        half = next(iter(halves.values()))
        raise UsageError(
            f"has {half.name}/ and no folder of the other part",
            field="images",
            value=str(folder),
            fix=f"train/ and test/ (or val/) side by side, or --images {half} alone",
        )
    if len(halves) == 2:
        classes = _classes(halves["train"])
        wanted = [halves[part]] if part != "all" else list(halves.values())
        files = [pair for half in wanted for pair in _labelled(half, classes)]
    else:
        classes = _classes(folder)
        files = _labelled(folder, classes)
        if part != "all":
            tests = [i % TEST_EVERY == TEST_EVERY - 1 for i in range(len(files))]
            files = [f for f, test in zip(files, tests, strict=True) if test == (part == "test")]
    if not files:
        raise UsageError(
            f"no images for the part '{part}'",
            field="images",
            value=str(folder),
            fix=f"files ending in {', '.join(FILES)}, in a folder for each class",
        )
    paths, labels = zip(*files, strict=True)
    targets = torch.tensor(labels, dtype=torch.int64)
    return ImageSet(name, targets, classes, None, paths, channels, scale, None, part)


def _classes(folder: Path) -> tuple[str, ...]:
    """Names of the sub-folders, or of the files where there are none."""
    inside = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    return tuple(inside) or tuple(p.stem for p in image_files(folder))


def _labelled(folder: Path, classes: tuple[str, ...]) -> list[tuple[Path, int]]:
    if not any(p.is_dir() and not p.name.startswith(".") for p in folder.iterdir()):
        return [(path, number) for number, path in enumerate(image_files(folder))]
    known = {name: number for number, name in enumerate(classes)}
    found = []
    for inside in sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")):
        if inside.name not in known:
            raise UsageError(
                "is no class of the training part",
                field="images",
                value=str(inside),
                fix=f"classes: {', '.join(classes[:5])} ...",
            )
        found += [(path, known[inside.name]) for path in image_files(inside)]
    return found


def from_pairs(pairs: Any, part: str = "all", preprocess: Preprocess | None = None) -> ImageSet:
    """From a sequence of (image, label): a dataset of torchvision's kind, or a list.

    Images are PIL's, arrays (H, W) or (H, W, C) of bytes, or tensors (C, H, W), of one size.

    Raises:
        UsageError: something else.
    """
    try:
        found = [
            (_bytes(image), int(label)) for image, label in (pairs[i] for i in range(len(pairs)))
        ]
        pixels = torch.stack([image for image, _ in found])
    except (TypeError, ValueError, RuntimeError, KeyError) as error:
        raise UsageError(
            f"no sequence of (image, label) pairs of one size ({error})",
            field="images",
            value=type(pairs).__name__,
            fix="PIL images, arrays (H, W, C) or tensors (C, H, W) with whole numbers as labels",
        ) from None
    targets = torch.tensor([label for _, label in found])
    names = getattr(pairs, "classes", None) or [str(n) for n in range(int(targets.max()) + 1)]
    scale = preprocess or Preprocess.of(pixels)
    name = type(pairs).__name__
    return ImageSet(
        name, targets, tuple(map(str, names)), pixels, (), pixels.shape[1], scale, None, part
    )


def _bytes(image: Any) -> Tensor:
    if isinstance(image, Tensor):
        whole = image if image.dtype == torch.uint8 else (image * 255).round()
        return whole.clamp(0, 255).to(torch.uint8)
    array = np.asarray(image)
    if array.dtype != np.uint8 or array.ndim not in (2, 3):
        raise ValueError(f"an image of {array.dtype} with shape {array.shape}")
    tensor = torch.from_numpy(array.copy())
    return tensor[None] if array.ndim == 2 else tensor.permute(2, 0, 1)
