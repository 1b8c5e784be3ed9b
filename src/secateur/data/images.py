"""Labelled images: built-in digits, Fashion-MNIST and its like, folders; one object for all.

An ``ImageSet`` is what the training loop draws from (``data.batches.Data``) and what accuracy is
measured on. Pixels are bytes until a batch is asked for; how they become the model's input is
recorded (``Preprocess``), since another scaling costs more than most pruning does.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.data.batches import ImageBatch, Order, Shuffled
from secateur.errors import UsageError

FILTERS = ("bicubic", "bilinear", "nearest")

Augment = Callable[[Tensor], Tensor]
"""(B, C, H, W) float in [0, 1] to the same, drawing from torch's generator."""


@dataclass(frozen=True)
class Preprocess:
    """How bytes become a model's input.

    Attributes:
        mean, std: a number for each channel, in bytes: the input is (x - mean) / std.
        resize: the shorter side of an image file is made so long; None: left as it is.
        crop: side of the square cut from its centre; None: the whole image.
        filter: ``bicubic``, ``bilinear`` or ``nearest``.
    """

    mean: tuple[float, ...] = (127.5,)
    std: tuple[float, ...] = (127.5,)
    resize: int | None = None
    crop: int | None = None
    filter: str = "bicubic"

    def __post_init__(self) -> None:
        for name, least in (("mean", -math.inf), ("std", 0.0)):
            values = getattr(self, name)
            wrong = not values or any(not isinstance(v, int | float) for v in values)
            if wrong or any(not least < v < math.inf for v in values):
                raise UsageError(
                    f"a list of {'positive ' if name == 'std' else ''}numbers in bytes, one for all "
                    "channels or one for each",
                    field=f"preprocess.{name}",
                    value=values,
                    fix=f"{name}: [127], on the command line --preprocess {name}=[127]",
                )
        for name in ("resize", "crop"):
            side = getattr(self, name)
            if side is not None and (not isinstance(side, int) or side < 1):
                raise UsageError(
                    "a number of pixels, at least 1", field=f"preprocess.{name}", value=side
                )
        if self.crop is not None and self.resize is not None and self.crop > self.resize:
            raise UsageError(
                f"is larger than the images resized to {self.resize}",
                field="preprocess.crop",
                value=self.crop,
            )
        if self.filter not in FILTERS:
            raise UsageError(
                "no such filter", field="preprocess.filter", value=self.filter,
                fix=", ".join(FILTERS),
            )  # fmt: skip

    def check_channels(self, channels: int) -> None:
        """Refuse numbers that are not for images of so many channels.

        Raises:
            UsageError: naming mean or std.
        """
        for name in ("mean", "std"):
            values = getattr(self, name)
            if len(values) not in (1, channels):
                raise UsageError(
                    f"{len(values)} numbers for images of {channels} "
                    f"channel{'s' if channels > 1 else ''}",
                    field=f"preprocess.{name}",
                    value=list(values),
                    fix=f"1 or {channels} of them" if channels > 1 else "one number",
                )

    def __call__(self, pixels: Tensor) -> Tensor:
        """uint8 (B, C, H, W), or the same as floats from 0 to 255, to the model's input."""
        return (pixels.float() - self._line(self.mean)) / self._line(self.std)

    @staticmethod
    def _line(values: tuple[float, ...]) -> Tensor:
        return torch.tensor(values)[:, None, None]

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def parse(cls, record: dict[str, Any]) -> Preprocess:
        """The inverse of ``record``.

        Raises:
            UsageError: not such a record.
        """
        try:
            pairs: dict[str, Any] = {
                k: tuple(v) if isinstance(v := record[k], list | tuple) else (v,)
                for k in ("mean", "std")
                if k in record
            }
            return cls(**(record | pairs))
        except TypeError as error:
            raise UsageError(
                f"{error}", field="preprocess", value=record,
                fix="of mean, std, resize, crop and filter",
            ) from None  # fmt: skip

    @classmethod
    def of(cls, pixels: Tensor) -> Preprocess:
        """Zero mean and unit variance over ``pixels``, uint8 (N, C, H, W)."""
        values = pixels.double().transpose(0, 1).flatten(1)
        mean, std = values.mean(1), values.std(1).clamp(min=1.0)
        return cls(
            tuple(round(v, 2) for v in mean.tolist()), tuple(round(v, 2) for v in std.tolist())
        )


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Labelled images, in memory or as files.

    Attributes:
        name: for people and protocols.
        targets: (N,) int64.
        classes: their names.
        pixels: uint8 (N, C, H, W), or None where ``files`` are read when needed.
        files: one for each image.
        channels: of the images.
        preprocess: how they become input.
        augment: changes a batch before that; only for training.
        part: which part of the set this is.
    """

    name: str
    targets: Tensor
    classes: tuple[str, ...]
    pixels: Tensor | None = None
    files: tuple[Path, ...] = ()
    channels: int = 3
    preprocess: Preprocess = field(default_factory=Preprocess)
    augment: Augment | None = None
    part: str = "all"

    unit = "images"
    length = 1

    def __post_init__(self) -> None:
        if not len(self.targets):
            raise UsageError("holds no images", field="images", value=self.name)
        if int(self.targets.min()) < 0 or int(self.targets.max()) >= len(self.classes):
            raise UsageError(
                f"has labels outside its {len(self.classes)} classes",
                field="images",
                value=self.name,
            )
        wide = self.channels if self.pixels is None else self.pixels.shape[1]
        self.preprocess.check_channels(int(wide))

    def __len__(self) -> int:
        return len(self.targets)

    def order(self, seed: int) -> Order:
        """See ``data.batches.Data``."""
        return Shuffled(self, seed)

    def scored(self, rows: Sequence[int]) -> int:
        """See ``data.batches.Data``."""
        return len(rows)

    def batch(self, rows: Sequence[int]) -> ImageBatch:
        """These images, augmented where that was asked for."""
        chosen = list(rows)
        raw = self.raw(chosen)
        if self.augment is not None:
            raw = self.augment(raw.float() / 255).mul(255)
        return ImageBatch(self.preprocess(raw), self.targets[chosen])

    def raw(self, rows: Sequence[int]) -> Tensor:
        """Bytes, uint8 (B, C, H, W)."""
        if self.pixels is not None:
            return self.pixels[list(rows)]
        from secateur.data.image_files import decode

        return torch.stack(
            [decode(self.files[row], self.channels, self.preprocess) for row in rows]
        )

    def batches(self, size: int = 64, limit: int | None = None) -> Iterator[ImageBatch]:
        """All images in order, or the first ``limit``, never augmented."""
        plain = replace(self, augment=None) if self.augment is not None else self
        count = len(self) if limit is None else min(limit, len(self))
        for start in range(0, count, size):
            yield plain.batch(range(start, min(start + size, count)))

    def sample(self, count: int, size: int = 64) -> Iterator[ImageBatch]:
        """``count`` images drawn as for training, in batches of one size, never augmented.

        For statistics that are averaged over batches: in a folder classes lie one after another, and
        a batch of one class has another variance than the set. What is left over is left out, unless
        it is all there is.
        """
        plain = replace(self, augment=None) if self.augment is not None else self
        rows = self.order(0).rows(0, min(count, len(self)))
        for start in range(0, max(1, len(rows) // size) * size, size):
            yield plain.batch(rows[start : start + size])

    def subset(self, rows: Sequence[int]) -> ImageSet:
        """Only these images."""
        chosen = list(rows)
        return replace(
            self,
            targets=self.targets[chosen],
            pixels=None if self.pixels is None else self.pixels[chosen],
            files=tuple(self.files[row] for row in chosen) if self.files else (),
        )

    def first(self, count: int | None) -> ImageSet:
        """``count`` images spread evenly over the set; all, if None or more than there are."""
        if count is None or count >= len(self):
            return self
        return self.subset([i * len(self) // count for i in range(count)])

    @cached_property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an input."""
        _, c, h, w = self.raw([0]).shape
        return c, h, w

    @property
    def example(self) -> Tensor:
        """One input of zeros, (1, C, H, W)."""
        return torch.zeros(1, *self.shape)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of images and labels; of files, names and sizes stand for their content."""
        digest = hashlib.sha256(self.targets.numpy().tobytes())
        if self.pixels is not None:
            digest.update(str(tuple(self.pixels.shape)).encode())
            digest.update(self.pixels.contiguous().numpy().data)
        for path in self.files:
            digest.update(f"{path.name}:{path.stat().st_size}\n".encode())
        digest.update(repr(self.preprocess).encode())
        return digest.hexdigest()[:16]

    def record(self) -> dict[str, Any]:
        """What a report says of it."""
        return {
            "name": self.name,
            "part": self.part,
            "images": len(self),
            "classes": len(self.classes),
            "shape": list(self.shape),
            "fingerprint": self.fingerprint,
            "preprocess": self.preprocess.record(),
        }
