"""What is written block by block is a checkpoint stock transformers loads."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from secateur.errors import SecateurError
from secateur.models.anatomy import ModelView
from secateur.models.saving import (
    block_state,
    outside_state,
    save_config_and_tokenizer,
    tied_names,
)
from secateur.models.shards import SafetensorsFolder, write_index, write_shard
from secateur.models.tiny import FAMILIES, tiny_model, tiny_tokenizer


def _save_by_block(view: ModelView, folder: Path) -> None:
    places: dict[str, str] = {}
    parts = {"outside": outside_state(view)}
    parts |= {f"block{b.index}": block_state(view, b) for b in view.blocks}
    for name, state in parts.items():
        write_shard(folder / f"{name}.safetensors", state)
        places |= dict.fromkeys(state, f"{name}.safetensors")
    write_index(folder, places, sum(t.nbytes for s in parts.values() for t in s.values()))


@pytest.mark.parametrize("family", FAMILIES)
def test_block_by_block_equals_save_pretrained(family: str, tmp_path: Path, ids: Tensor) -> None:
    model = tiny_model(family)
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    save_config_and_tokenizer(model, tiny_tokenizer(), ours)
    _save_by_block(ModelView.of(model), ours)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(theirs)
    one, two = SafetensorsFolder(ours), SafetensorsFolder(theirs)
    assert one.names() == two.names()
    assert all(torch.equal(one.read(n), two.read(n)) for n in one.names())
    loaded: Any = AutoModelForCausalLM.from_pretrained(ours, output_loading_info=True)
    back, info = loaded
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.no_grad():
        assert torch.equal(back.eval()(ids).logits, model(ids).logits)


def test_experts_are_written_one_by_one() -> None:
    view = ModelView.of(tiny_model("mixtral"))
    names = block_state(view, view.blocks[1])
    assert "model.layers.1.block_sparse_moe.experts.3.w2.weight" in names
    assert not any("gate_up_proj" in name for name in names)


def test_a_tied_head_is_left_out_and_an_untied_one_is_not() -> None:
    tied, free = tiny_model("gemma"), tiny_model("llama")
    assert tied_names(tied) == {"lm_head.weight"}
    assert tied_names(free) == set()
    assert "lm_head.weight" not in outside_state(ModelView.of(tied))
    assert "lm_head.weight" in outside_state(ModelView.of(free))


def test_a_model_tied_by_hand_is_saved_once() -> None:
    model = tiny_model("llama")
    model.lm_head.weight = model.model.embed_tokens.weight
    assert len(tied_names(model)) == 1


def test_config_names_class_and_type_and_the_tokenizer_comes_along(tmp_path: Path) -> None:
    model = tiny_model("opt").half()
    save_config_and_tokenizer(model, tiny_tokenizer(), tmp_path)
    text = (tmp_path / "config.json").read_text()
    assert '"OPTForCausalLM"' in text
    assert '"float16"' in text
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.decode(tokenizer("Grün, 42!").input_ids) == "Grün, 42!"


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SecateurError, match="cannot write"):
        save_config_and_tokenizer(tiny_model("llama"), None, tmp_path / "file")
