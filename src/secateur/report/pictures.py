"""A mask as a picture: where more than the asked share is gone, and where less.

The density map of a run's record (255 = all pruned) becomes a small PNG whose colour says
more (rust) or less (green) than the matrix's own mean and whose opacity says how much, so
one picture suits light and dark pages. Whole rows or columns that a method favours or gives
up appear as stripes; the two profiles beside the picture show the same as curves.
"""

from __future__ import annotations

import base64
import struct
import zlib
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
from markupsafe import Markup

from secateur.report.words import percent

_MORE, _LESS = (198, 88, 38), (34, 128, 98)
_SMALLEST_SPAN = 0.04
"""Below this deviation a picture stays pale, so that noise does not look like structure."""


@dataclass(frozen=True)
class Density:
    """The pruned share of each cell of a mask, (rows, cols) in [0, 1]."""

    share: np.ndarray[Any, np.dtype[np.float64]]

    @classmethod
    def read(cls, picture: dict[str, Any]) -> Density:
        """From a record's ``picture``.

        Raises:
            ValueError: the data do not fill rows times cols.
        """
        data = np.frombuffer(base64.b64decode(picture["density"]), dtype=np.uint8)
        return cls(data.reshape(picture["rows"], picture["cols"]).astype(np.float64) / 255)

    @property
    def mean(self) -> float:
        """Pruned share of the whole matrix."""
        return float(self.share.mean())

    @property
    def span(self) -> float:
        """Deviation from the mean drawn at full colour (the 99th percentile of all cells)."""
        return max(_SMALLEST_SPAN, float(np.quantile(np.abs(self.share - self.mean), 0.99)))

    def png(self) -> bytes:
        """The picture, one pixel a cell."""
        levels = np.arange(256) / 255 - self.mean
        alpha = np.clip(np.abs(levels) / self.span, 0, 1) * 255
        palette = b"".join(bytes(_MORE if level > 0 else _LESS) for level in levels)
        rows, columns = self.share.shape
        pixels = np.round(self.share * 255).astype(np.uint8)
        lines = b"".join(b"\0" + line.tobytes() for line in pixels)
        return (
            b"\x89PNG\r\n\x1a\n"
            + _chunk(b"IHDR", struct.pack(">IIBBBBB", columns, rows, 8, 3, 0, 0, 0))
            + _chunk(b"PLTE", palette)
            + _chunk(b"tRNS", np.round(alpha).astype(np.uint8).tobytes())
            + _chunk(b"IDAT", zlib.compress(lines, 9))
            + _chunk(b"IEND", b"")
        )


def draw(picture: dict[str, Any], name: str) -> Markup:
    """The picture with the profile of its columns above and of its rows at the right, as SVG."""
    density = Density.read(picture)
    mean, span, side, strip = density.mean, density.span, 320.0, 44.0
    data = base64.b64encode(density.png()).decode("ascii")
    top, left = strip + 6, 0.0
    title = f"Mask of {name}: {percent(mean)} pruned"
    columns = _profile(density.share.mean(0), mean, span, side, strip)
    rows = _profile(density.share.mean(1), mean, span, side, strip)
    width = side + 6 + strip
    return Markup(
        f'<svg class="chart mask" role="img" aria-label="{escape(title)}" '
        f'viewBox="0 0 {width:g} {side + top:g}" xmlns="http://www.w3.org/2000/svg">'
        f"<title>{escape(title)}</title>"
        f"<desc>Rust: more than the mean is pruned; green: less. Curves: mean of each column "
        f"(above) and of each row (right).</desc>"
        f'<g transform="translate({left:g} 0)">{columns}</g>'
        f'<g transform="translate({side + 6:g} {top:g}) matrix(0 1 -1 0 {strip:g} 0)">{rows}</g>'
        f'<rect x="{left:g}" y="{top:g}" width="{side:g}" height="{side:g}" class="c-frame"/>'
        f'<image x="{left:g}" y="{top:g}" width="{side:g}" height="{side:g}" '
        f'preserveAspectRatio="none" href="data:image/png;base64,{data}"/></svg>'
    )


def _profile(
    means: np.ndarray[Any, np.dtype[np.float64]],
    mean: float,
    span: float,
    length: float,
    height: float,
) -> str:
    """Deviation of each column (or row) from the mean as a filled step curve."""
    middle, pitch = height / 2, length / len(means)
    levels = np.clip((means - mean) / span, -1, 1) * (middle - 2)
    paths = ""
    for kind, part in (("more", levels.clip(min=0)), ("less", levels.clip(max=0))):
        steps = "".join(f"V{middle - v:.1f}h{pitch:.2f}" for v in part)
        paths += f'<path d="M0 {middle:g}{steps}V{middle:g}Z" class="c-{kind}"/>'
    return f'{paths}<line x1="0" y1="{middle:g}" x2="{length:g}" y2="{middle:g}" class="c-grid"/>'


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
