"""From a package's files to clean documents: one small function per corpus.

Each takes the unpacked folder and returns the documents in a fixed order.
"""

from __future__ import annotations

import html
import re
import struct
import zlib
from pathlib import Path

from secateur.errors import SecateurError


def sotu(folder: Path) -> list[str]:
    """State of the Union addresses, one document each, oldest first."""
    return _texts(sorted(folder.glob("package/sotu/data/*.txt")))


def moby_dick(folder: Path) -> list[str]:
    """Moby Dick, one document per chapter."""
    chapters = (folder / "package/moby-dick/data").glob("chapter_*.txt")
    return _texts(sorted(chapters, key=lambda path: int(path.stem.partition("_")[2])))


def shakespeare(folder: Path) -> list[str]:
    """Plays and poems in modern spelling, one document per work."""
    return _texts(sorted(folder.glob("*/shksprdata/texts/*_gut.txt")))


def brown(folder: Path) -> list[str]:
    """The Brown corpus without its part-of-speech tags, one document per sample."""
    files = sorted((folder / "package").glob("c[a-r][0-9][0-9]"))
    return [_untagged(text) for text in _texts(files)]


def debian_handbook(folder: Path) -> list[str]:
    """The Debian Administrator's Handbook in English, one document per page."""
    return _pages(sorted((folder / "usr/share/doc/debian-handbook/html/en-US").glob("*.html")))


def anarchism(folder: Path) -> list[str]:
    """An Anarchist FAQ, one document per page."""
    return _pages(sorted((folder / "usr/share/doc/anarchism/html").glob("*.html")))


def austen(folder: Path) -> list[str]:
    """Jane Austen's six novels, read from R's lazy-load database without R."""
    database = (folder / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb").read_bytes()
    novels = [lines for block in _r_blocks(database) if (lines := _r_strings(block))]
    return ["\n".join(lines).strip() for lines in sorted(novels, key=lambda lines: lines[0])]


def detokenised_wikitext(text: str) -> str:
    """WikiText's spaced-out tokens put back into ordinary writing (``<unk>`` stays).

    >>> detokenised_wikitext('a co @-@ star , " The Bill " ( 1 @,@ 200 )')
    'a co-star, "The Bill" (1,200)'
    """
    text = re.sub(r" @([-,.])@ ", r"\1", text)
    text = re.sub(r'" ([^"\n]*?) "', r'"\1"', text)
    text = re.sub(r"([(\[{$£€]) ", r"\1", text)
    text = re.sub(r" ([)\]}%.,:;!?])", r"\1", text)
    text = re.sub(r" ('(?:s|t|d|m|re|ve|ll)?\b|n't\b)", r"\1", text)
    return "\n".join(line.strip() for line in text.splitlines()).strip()


def _texts(paths: list[Path]) -> list[str]:
    texts = (path.read_text(encoding="utf-8", errors="strict") for path in paths)
    return [clean for text in texts if (clean := text.replace("\r\n", "\n").strip())]


def _untagged(text: str) -> str:
    """``The/at jury/nn said/vbd ./.`` to ``The jury said.``, a paragraph per sentence."""
    sentences = []
    for line in text.splitlines():
        words = " ".join(token.rpartition("/")[0] for token in line.split())
        words = words.replace("`` ", '"').replace(" ''", '"')
        words = re.sub(r" ([,.:;?!)])", r"\1", words).replace("( ", "(")
        words = re.sub(r"([;:?!])\1+", r"\1", words)  # the corpus doubles some marks
        if words:
            sentences.append(words)
    return "\n".join(sentences)


_DROPPED = re.compile(r"<(script|style|head|nav)\b.*?</\1>", re.S | re.I)
_BREAK = re.compile(r"</?(p|div|h[1-6]|li|ul|ol|dl|dt|dd|tr|pre|blockquote|br|hr)\b[^>]*>", re.I)
_TAG = re.compile(r"<[^>]*>|<!--.*?-->", re.S)


def _pages(paths: list[Path]) -> list[str]:
    documents = []
    for path in paths:
        page = _DROPPED.sub("", path.read_text(encoding="utf-8", errors="replace"))
        page = html.unescape(_TAG.sub("", _BREAK.sub("\n\n", page.replace("\r", ""))))
        lines = (" ".join(line.split()) for line in page.split("\n"))
        text = re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()
        if len(text) > 200:  # navigation pages hold nothing to read
            documents.append(text)
    return documents


def _r_blocks(database: bytes) -> list[bytes]:
    """The objects of an R lazy-load file: each a big-endian length and a zlib stream."""
    blocks, at = [], 0
    while at + 4 <= len(database):
        stream = zlib.decompressobj()
        blocks.append(stream.decompress(database[at + 4 :]))
        at = len(database) - len(stream.unused_data)
    return blocks


def _r_strings(block: bytes) -> list[str]:
    """A character vector in R's XDR serialisation; another object gives an empty list."""
    strsxp, charsxp = 16, 9
    version = struct.unpack(">i", block[2:6])[0]
    at = 14 + (4 + struct.unpack(">i", block[14:18])[0] if version == 3 else 0)
    kind, count = struct.unpack(">ii", block[at : at + 8])
    if block[:2] != b"X\n" or kind & 0xFF != strsxp:
        return []
    at, strings = at + 8, []
    for _ in range(count):
        kind, length = struct.unpack(">ii", block[at : at + 8])
        if kind & 0xFF != charsxp:
            raise SecateurError("a character vector of R holds something else than strings")
        at += 8
        strings.append(block[at : at + max(0, length)].decode("utf-8"))
        at += max(0, length)
    return strings
