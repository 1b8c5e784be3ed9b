"""Shared by the tests of models: token ids, saved folders, and the data folder if there is one."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from secateur.models.saving import save_config_and_tokenizer, save_weights
from secateur.models.tiny import tiny_model, tiny_tokenizer


@pytest.fixture
def ids() -> torch.Tensor:
    """(2, 16) token ids of a tiny model's vocabulary."""
    return torch.randint(4, 260, (2, 16), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., tuple[Any, Path]]:
    """Build a tiny model and save it with a tokenizer: ``saved(family) -> (model, folder)``."""

    def save(family: str = "llama", **changes: Any) -> tuple[Any, Path]:
        model, folder = tiny_model(family, **changes), tmp_path / family
        save_config_and_tokenizer(model, tiny_tokenizer(), folder)
        save_weights(model, folder)
        return model, folder

    return save


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of data files outside the repository."""
    beside = Path(__file__).resolve().parents[3] / "shared" / "data"
    folder = Path(os.environ.get("SECATEUR_DATA", beside))
    if not folder.is_dir():
        pytest.skip(f"no data folder at {folder} (set SECATEUR_DATA)")
    return folder
