"""Image files as tensors, through Pillow; and changes of images for training, through Kornia."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from secateur.data.images import Augment, Preprocess
from secateur.errors import MissingExtra, SecateurError, UsageError

FILES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff", ".gif")
"""Endings of what counts as an image."""
AUGMENTS = ("none", "shift", "flip", "crop-flip")
"""``shift``: moved by up to an eighth; ``flip``: mirrored; ``crop-flip``: both."""


def image_files(folder: Path) -> list[Path]:
    """Images directly in ``folder``, sorted by name."""
    return sorted(
        p
        for p in folder.iterdir()
        if p.suffix.lower() in FILES and not p.name.startswith(".") and p.is_file()
    )


def decode(path: Path, channels: int, how: Preprocess) -> Tensor:
    """An image file as uint8 (channels, H, W), resized and cropped.

    Raises:
        SecateurError: it cannot be read, or is smaller than the crop.
    """
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise MissingExtra("pillow", "vision", "reading image files") from error
    method = Image.Resampling[how.filter.upper()]
    try:
        with Image.open(path) as file:
            image = _in_bytes(file).convert("L" if channels == 1 else "RGB")
    except (OSError, UnidentifiedImageError, ValueError) as error:
        raise SecateurError(
            f"'{path}' cannot be read as an image: {error}", fix="replace it, or take it away"
        ) from None
    if how.resize is not None:
        factor = how.resize / min(image.size)
        size = tuple(max(how.resize, round(side * factor)) for side in image.size)
        image = image.resize((size[0], size[1]), method)
    if how.crop is not None:
        left, top = (image.width - how.crop) // 2, (image.height - how.crop) // 2
        if left < 0 or top < 0:
            raise SecateurError(
                f"'{path}' is {image.width} x {image.height}, smaller than the crop of {how.crop}",
                fix="preprocess: {resize: ..., crop: ...}",
            )
        image = image.crop((left, top, left + how.crop, top + how.crop))
    array = np.asarray(image)
    array = array[:, :, None] if array.ndim == 2 else array
    return torch.from_numpy(array.transpose(2, 0, 1).copy())


def _in_bytes(image: Any) -> Any:
    """A grey image of 16 bits made one of 8: Pillow would make all but its darkest pixels white.

    Raises:
        ValueError: floats, or more than 16 bits, whose scale nobody knows.
    """
    if image.mode != "F" and not image.mode.startswith("I"):
        return image
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise ValueError(f"its pixels are of mode {image.mode}, neither bytes nor 16 bits")
    from PIL import Image

    return Image.fromarray((values // 257).astype(np.uint8))


def augmentation(name: str, height: int, width: int) -> Augment | None:
    """Random changes of training images, by name; None for ``none``.

    Args:
        height, width: of the images.

    Raises:
        UsageError: no such name. MissingExtra: Kornia is not installed.
    """
    if name not in AUGMENTS:
        raise UsageError("no such change", field="augment", value=name, fix=", ".join(AUGMENTS))
    if name == "none":
        return None
    try:
        import kornia.augmentation as kornia
    except Exception as error:  # a broken install must not look like a bug of ours
        raise MissingExtra("kornia", "vision", "augmentation of images") from error
    parts: list[Any] = []
    if name in ("shift", "crop-flip"):
        parts.append(kornia.RandomCrop((height, width), padding=max(1, min(height, width) // 8)))
    if name in ("flip", "crop-flip"):
        parts.append(kornia.RandomHorizontalFlip())
    changes: Augment = kornia.AugmentationSequential(*parts, data_keys=["input"])
    return changes
