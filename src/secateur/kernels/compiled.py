"""C of this package, compiled on the user's machine for its processor, once.

A wheel would have to choose one instruction set for everybody. The compiler that is there
(``$CC``, or ``cc``) makes a shared library with ``-O3 -march=native`` instead; it lies in the
cache folder under a name made of the source, the flags, the compiler and the processor, and
appears there by renaming, so two processes may race for it. Without a compiler ``library`` says
None and the caller has another way.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from secateur.errors import SecateurError
from secateur.evaluation.speed import processor
from secateur.files import cache_folder, replacing

FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
_TIMEOUT = 120.0


@cache
def library(name: str) -> ctypes.CDLL | None:
    """The library made of ``kernels/NAME.c``; None where it cannot be made (``why_not`` says why)."""
    made = _made(name)
    return made if isinstance(made, ctypes.CDLL) else None


def why_not(name: str) -> str | None:
    """The reason why ``library(name)`` is None."""
    made = _made(name)
    return made if isinstance(made, str) else None


@cache
def _made(name: str) -> ctypes.CDLL | str:
    compiler = shlex.split(os.environ.get("CC", "")) or ["cc"]
    if shutil.which(compiler[0]) is None:
        return f"there is no C compiler ('{compiler[0]}')"
    source = Path(__file__).with_name(f"{name}.c")
    text = source.read_bytes()
    try:
        version = subprocess.run(
            [*compiler, "--version"], capture_output=True, timeout=_TIMEOUT, check=True
        ).stdout
        facts = (text, " ".join(FLAGS).encode(), version, _features(), " ".join(compiler).encode())
        digest = hashlib.sha256(b"\0".join(facts)).hexdigest()[:20]
        target = cache_folder() / "kernels" / f"{name}-{digest}.so"
        if not target.is_file():
            _compile(compiler, source, target)
        return ctypes.CDLL(str(target))
    except subprocess.CalledProcessError as error:
        return f"'{compiler[0]}' failed: {(error.stderr or b'').decode(errors='replace')[-400:]}"
    except (OSError, subprocess.TimeoutExpired, SecateurError) as error:
        return f"{type(error).__name__}: {error}"


def _compile(compiler: list[str], source: Path, target: Path) -> None:
    """Build in a folder of its own, with threads where the compiler knows OpenMP, then rename."""
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / target.name
        command = [*compiler, *FLAGS, "-o", str(made), str(source)]
        first = subprocess.run([*command, "-fopenmp"], capture_output=True, timeout=_TIMEOUT)
        if first.returncode:
            subprocess.run(command, capture_output=True, timeout=_TIMEOUT, check=True)
        ctypes.CDLL(str(made))  # what cannot be loaded is not kept
        with replacing(target) as temporary:
            shutil.copyfile(made, temporary)


def _features() -> bytes:
    """What ``-march=native`` depends on: a cache folder may be shared by different machines."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            flags = next((x for x in lines if x.startswith(("flags", "Features"))), "")
    except OSError:
        flags = ""
    return f"{platform.system()} {platform.machine()} {processor()} {flags}".encode()
