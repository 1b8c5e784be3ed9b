"""What several tests share: small models on disk, real data when it is there."""

import os
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    """No test may depend on a hub."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")


@pytest.fixture(scope="session")
def data_folder():
    """The folder with real models and texts, or a skip that says what is missing."""
    folder = Path(os.environ.get("SECATEUR_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"real data folder {folder} is not here (set SECATEUR_DATA)")
    return folder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """Writes ``tiny_model(family)`` with its tokenizer to a folder, once a session."""
    from secateur.models.saving import save_config_and_tokenizer, save_weights
    from secateur.models.tiny import tiny_model, tiny_tokenizer

    made = {}

    def make(family="llama", **changes):
        key = (family, tuple(sorted(changes.items())))
        if key not in made:
            folder = tmp_path_factory.mktemp(family)
            model = tiny_model(family, **changes)
            save_weights(model, folder)
            save_config_and_tokenizer(model, tiny_tokenizer(), folder)
            made[key] = folder
        return made[key]

    return make
