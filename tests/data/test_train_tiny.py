"""The script behind secateur-tiny, on a handful of texts: the folder it writes is a whole model."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from secateur.data.corpora import joined
from secateur.data.texts import load_text

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_tiny", ROOT / "tools" / "train_tiny.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_tiny"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_it_writes_a_model_that_loads_and_has_learnt(script: ModuleType, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    documents = load_text("pydoc").documents[:12]
    for name in script.REPEATS:
        (tmp_path / f"{name}.txt").write_text(joined(documents), encoding="utf-8")
    settings = script.Settings(tokens=2500, length=32, batch=8, evaluations=1)
    script.train(tmp_path, tmp_path / "out", settings, "cpu", False)

    card = json.loads((tmp_path / "out" / "MODEL_CARD.json").read_text())
    assert card["tokens_seen"] >= 2500
    first, last = card["history"][0]["held_out_loss"], card["history"][-1]["held_out_loss"]
    assert last < first - 0.3
    assert all(c["held_out_perplexity"] < 2048 for c in card["corpora"].values())

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    assert 2e6 < sum(p.numel() for p in model.parameters()) == card["parameters"] < 4e6
    assert (tmp_path / "out" / "model.safetensors").stat().st_size <= 6e6
    sentence = 'Naïve "text" — 1984\n    indented'
    ids = tokenizer(sentence)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id == model.config.bos_token_id
    assert tokenizer.decode(ids[1:]) == sentence
    assert max(ids) < model.config.vocab_size
