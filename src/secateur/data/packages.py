"""Files out of packages, fetched by each registry's ordinary client.

Only a package's name and version are given; where it comes from is the client's own
configuration. Nothing that is fetched is installed or imported.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from secateur.errors import SecateurError

Registry = Literal["npm", "pypi", "debian"]
_SECONDS = 600


@dataclass(frozen=True)
class Package:
    """A package by registry, name and version (a Debian package has the release's version)."""

    registry: Registry
    name: str
    version: str | None = None

    def __str__(self) -> str:
        kind = {"npm": "npm", "pypi": "PyPI", "debian": "Debian"}[self.registry]
        return f"{kind} package {self.name}" + (f" {self.version}" if self.version else "")


@contextmanager
def unpacked(package: Package) -> Iterator[Path]:
    """The package's files in a temporary folder, removed on leaving.

    Raises:
        SecateurError: the client is missing, or could not fetch the package.
    """
    with tempfile.TemporaryDirectory(prefix="secateur-") as name:
        folder = Path(name)
        _FETCHERS[package.registry](package, folder)
        yield folder


def _npm(package: Package, folder: Path) -> None:
    spec = f"{package.name}@{package.version}"
    _run("npm", ["npm", "pack", "--silent", "--ignore-scripts", spec], package, folder)
    _untar(_only(folder, "*.tgz", package), folder)


def _pypi(package: Package, folder: Path) -> None:
    spec = f"{package.name}=={package.version}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--disable-pip-version-check", "--no-binary", package.name, spec]
    _run("pip", command, package, folder)
    _untar(_only(folder, "*.tar.gz", package), folder)


def _debian(package: Package, folder: Path) -> None:
    _run("apt-get", ["apt-get", "download", "-qq", package.name], package, folder)
    archive = _only(folder, "*.deb", package)
    _run("dpkg-deb", ["dpkg-deb", "-x", str(archive), str(folder)], package, folder)


_FETCHERS: dict[str, Callable[[Package, Path], None]] = {
    "npm": _npm,
    "pypi": _pypi,
    "debian": _debian,
}


def _run(client: str, command: list[str], package: Package, folder: Path) -> None:
    if shutil.which(command[0]) is None:
        raise SecateurError(
            f"fetching the {package} needs the program '{client}', which is not installed",
            fix=f"install {client}, or give a text file of your own, or the corpus 'pydoc'",
        )
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise _unfetched(client, package, f"no answer within {_SECONDS} s") from None
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise _unfetched(client, package, lines[-1] if lines else f"exit code {done.returncode}")


def _unfetched(client: str, package: Package, why: str) -> SecateurError:
    return SecateurError(
        f"{client} could not fetch the {package}: {why}",
        fix="check the network and the client's set-up, "
        "or give a text file of your own, or the corpus 'pydoc' (no download)",
    )


def _only(folder: Path, pattern: str, package: Package) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise SecateurError(f"the {package} came as {len(found)} archives {pattern}, not one")
    return found[0]


def _untar(archive: Path, folder: Path) -> None:
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
