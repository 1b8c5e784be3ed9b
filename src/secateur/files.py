"""Writing files so that a reader never meets half of one."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from secateur.errors import SecateurError


@contextmanager
def told_plainly(path: Path) -> Iterator[None]:
    """Turn the operating system's refusal to write into a message with a fix."""
    try:
        yield
    except OSError as error:
        fixes = {
            errno.ENOSPC: "free some space or choose another --out",
            errno.EFBIG: "the file-size limit of this process is too low (ulimit -f)",
            errno.EROFS: "the file system is read-only: choose another --out",
            errno.EACCES: "no permission to write there: choose another --out",
            errno.EPERM: "no permission to write there: choose another --out",
            errno.ENOTDIR: "a part of that path is a file: choose another --out",
            errno.EEXIST: "a file of that name is in the way: choose another --out",
        }
        raise SecateurError(
            f"cannot write: {error.strerror or error}",
            field="file",
            value=str(path),
            fix=fixes.get(error.errno or 0),
        ) from error


def cache_folder() -> Path:
    """What may be thrown away: ``$SECATEUR_CACHE``, or ``secateur`` in the user's cache folder."""
    if chosen := os.environ.get("SECATEUR_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "secateur"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it is flushed to disk and renamed.

    On any failure the temporary file is removed and ``path`` is as it was.
    """
    with told_plainly(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            os.chmod(temporary, 0o666 & ~_umask())
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise


def write_text(path: Path, text: str) -> None:
    """Replace ``path`` by ``text`` (UTF-8), all or nothing."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, record: Any) -> None:
    """Replace ``path`` by ``record`` as JSON, all or nothing. NaN becomes null."""
    write_text(path, json.dumps(finite(record), indent=1, ensure_ascii=False) + "\n")


def finite(value: Any) -> Any:
    """``value`` with NaN and infinities as None: JSON has neither."""
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    if isinstance(value, dict):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return value


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
