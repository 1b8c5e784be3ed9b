"""Mask pictures are valid PNGs whose stripes mean what they say."""

from __future__ import annotations

import base64
import struct
import xml.etree.ElementTree as ElementTree
import zlib

import numpy as np
import pytest

from secateur.report.pictures import Density, draw


def picture(share: np.ndarray) -> dict[str, object]:  # type: ignore[type-arg]
    data = np.round(share * 255).astype(np.uint8).tobytes()
    rows, cols = share.shape
    return {"rows": rows, "cols": cols, "density": base64.b64encode(data).decode()}


def decode(png: bytes) -> np.ndarray:  # type: ignore[type-arg]
    """RGBA pixels of a palette PNG, checking every checksum."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, at = {}, 8
    while at < len(png):
        (size,) = struct.unpack(">I", png[at : at + 4])
        kind, data = png[at + 4 : at + 8], png[at + 8 : at + 8 + size]
        assert struct.unpack(">I", png[at + 8 + size : at + 12 + size])[0] == zlib.crc32(
            kind + data
        )
        chunks[kind] = data
        at += 12 + size
    columns, rows = struct.unpack(">II", chunks[b"IHDR"][:8])
    lines = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(rows, columns + 1)
    assert not lines[:, 0].any()
    colours = np.frombuffer(chunks[b"PLTE"], np.uint8).reshape(256, 3)
    alpha = np.frombuffer(chunks[b"tRNS"], np.uint8)[:, None]
    return np.concatenate([colours, alpha], 1)[lines[:, 1:]]


def test_stripes_are_seen() -> None:
    share = np.full((8, 16), 0.5)
    share[:, 3], share[:, 9] = 1.0, 0.0
    pixels = decode(Density.read(picture(share)).png()).astype(int)
    rust, green, plain = pixels[0, 3], pixels[0, 9], pixels[0, 0]
    assert rust[0] > rust[1]
    assert rust[3] > 250
    assert green[1] > green[0]
    assert green[3] > 250
    assert plain[3] < 8
    assert pixels.shape == (8, 16, 4)


def test_noise_stays_pale() -> None:
    share = 0.5 + np.random.default_rng(0).normal(0, 0.004, (32, 32))
    assert Density.read(picture(share)).span == pytest.approx(0.04)
    assert decode(Density.read(picture(share)).png())[..., 3].mean() < 64


def test_drawing_is_described_and_escaped() -> None:
    svg = draw(picture(np.random.default_rng(0).random((5, 7))), '<b>"x"')
    root = ElementTree.fromstring(svg)
    assert "Mask of <b>" in str(root.get("aria-label"))
    assert root.find(".//{http://www.w3.org/2000/svg}image") is not None


def test_wrong_sizes_are_refused() -> None:
    bad = picture(np.zeros((4, 4))) | {"rows": 5}
    with pytest.raises(ValueError, match="reshape"):
        Density.read(bad)
