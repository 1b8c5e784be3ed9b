"""From what the user names (a hub id, a folder, a GGUF file, ``demo``) to a local folder."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass, field
from pathlib import Path

from secateur.errors import MissingExtra, SecateurError, UsageError
from secateur.models.gguf import demo_file, dequantised, display_name, is_gguf
from secateur.models.shards import SafetensorsFolder
from secateur.progress import SILENT, Progress

TINY = Path(__file__).parent / "assets" / "tiny"
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")
_REASONS = {
    "RepositoryNotFoundError": "the hub has no such model, or it is private",
    "GatedRepoError": "the hub wants its licence accepted first",
    "OfflineModeIsEnabled": "it is not in the local cache, and the hub is switched off",
    "LocalEntryNotFoundError": "it is not in the local cache, and the hub cannot be reached",
}
_PATTERNS = ("*.json", "model*.safetensors", "*.model", "*.txt", "*.jinja")


@dataclass(frozen=True)
class Source:
    """A model on this machine: where it lies and what to call it."""

    folder: Path
    name: str
    notes: list[str] = field(default_factory=list)


def resolve(spec: str, *, code: bool = False, progress: Progress = SILENT) -> Source:
    """Find ``spec``: ``demo``, ``tiny``, a GGUF file, a folder or a hub id.

    Args:
        code: also fetch a hub model's Python files (it will be asked to run them).

    Raises:
        UsageError: nothing of that name here or on the hub.
    """
    if spec == "demo":
        file = demo_file()
        note = f"weights de-quantised from {file.name}: values lie on a 4-bit grid, ties are common"
        return Source(dequantised(file, progress), display_name(file), [note])
    if spec == "tiny":
        if not (TINY / "config.json").is_file():
            raise UsageError("this build carries no tiny model", field="model", value=spec)
        return Source(TINY, "secateur-tiny")
    path = Path(spec).expanduser()
    if path.is_dir():
        return Source(path, path.resolve().name)
    if is_gguf(path):
        note = f"weights de-quantised from {path.name}"
        return Source(dequantised(path, progress), display_name(path), [note])
    if path.exists():
        raise UsageError(
            "a file, but not a GGUF file",
            field="model",
            value=spec,
            fix="give the folder that holds config.json, or a .gguf file",
        )
    if not _HUB_ID.match(spec) or spec.lower().endswith((".gguf", ".safetensors")):
        raise UsageError(
            "there is no such file or folder",
            field="model",
            value=spec,
            fix="a folder, a GGUF file, a hub id such as org/name, or 'demo'",
        )
    return Source(_from_hub(spec, code), spec)


def _cached(repo: str, patterns: list[str]) -> Path | None:
    """The snapshot in the local cache, if it is complete."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(repo, allow_patterns=patterns, local_files_only=True))
        SafetensorsFolder(folder)
    except (LocalEntryNotFoundError, SecateurError):
        return None
    return folder if (folder / "config.json").is_file() else None


def _from_hub(repo: str, code: bool) -> Path:
    if importlib.util.find_spec("huggingface_hub") is None:
        raise MissingExtra("huggingface_hub", "hf", "loading a model by its hub id")
    from huggingface_hub import snapshot_download

    patterns = [*_PATTERNS, "*.py"] if code else list(_PATTERNS)
    cached = _cached(repo, patterns)
    if cached is not None:
        return cached
    try:
        return Path(snapshot_download(repo, allow_patterns=patterns))
    except Exception as error:  # the client raises its own kinds, the network's, and the disk's
        reason = _REASONS.get(type(error).__name__)
        if reason is None:
            first = (str(error).splitlines() or [""])[0]
            raise SecateurError(
                f"'{repo}' could not be fetched from the hub ({type(error).__name__}: {first})",
                fix="try again, or download it elsewhere and give the folder",
            ) from error
        raise UsageError(
            f"no such folder here; {reason}",
            field="model",
            value=repo,
            fix="check the spelling, log in (hf auth login), or give a local folder",
        ) from error
