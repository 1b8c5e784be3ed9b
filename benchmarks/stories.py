"""Text for stories260k (260,032 parameters, a real small model), which has no corpus of its own.

Its text is what it writes: documents sampled at temperature 1, cached beside the results folder's
parent as ``.cache/`` (ignored by git). Calibration, search and held-out text come from different
seeds. The model lies in a data folder that not every machine has (``SECATEUR_DATA``).
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from secateur.models.loading import load
from secateur.tensorfile import save_tensors

ROOT = Path(__file__).parents[1]
CACHE = ROOT / "benchmarks" / ".cache"
LENGTH = 256


def stories_folder() -> Path:
    """Where stories260k lies.

    Raises:
        SystemExit: it is not on this machine.
    """
    folder = Path(os.environ.get("SECATEUR_DATA", ROOT.parent / "shared" / "data")) / "stories260k"
    if not folder.is_dir():
        raise SystemExit(f"stories260k is not in {folder.parent} (set SECATEUR_DATA)")
    return folder


@torch.no_grad()
def sampled_windows(windows: int, seed: int, length: int = LENGTH) -> Tensor:
    """(windows, length) token ids the model wrote itself, the same for the same arguments."""
    path = CACHE / f"stories-{windows}x{length}-{seed}.safetensors"
    if path.exists():
        return load_file(path)["ids"]
    model = load(str(stories_folder())).model
    parts = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for start in range(0, windows, 256):
            first = torch.full((min(256, windows - start), 1), int(model.config.bos_token_id))
            parts.append(
                model.generate(
                    first,
                    attention_mask=torch.ones_like(first),
                    max_new_tokens=length - 1,
                    min_new_tokens=length - 1,
                    do_sample=True,
                    top_k=0,
                    pad_token_id=0,
                )
            )
    ids = torch.cat(parts)
    save_tensors(path, {"ids": ids})
    return ids
