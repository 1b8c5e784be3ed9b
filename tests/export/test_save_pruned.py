"""Pruned encoders, decoders and encoder-decoders written, read back, and refused when damaged."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

import secateur
from secateur.errors import SecateurError, UsageError, VerificationError
from secateur.export import pruned
from secateur.methods.head_selection import HeadRules
from secateur.models.tiny import randomise, tiny_model

transformers = pytest.importorskip("transformers")
IDS = torch.randint(4, 200, (4, 10), generator=torch.Generator().manual_seed(5))


def bert() -> Any:
    config = transformers.BertConfig(
        hidden_size=48, num_attention_heads=4, num_hidden_layers=3, intermediate_size=64,
        vocab_size=264, num_labels=3,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config).eval()
    randomise(model)
    return model


def bart() -> Any:
    config = transformers.BartConfig(
        d_model=48, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, vocab_size=264,
    )  # fmt: skip
    model = transformers.BartForConditionalGeneration(config).eval()
    randomise(model)
    return model


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "bert": (bert, {"labels": torch.tensor([0, 1, 2, 1])}),
    "bart": (bart, {"labels": IDS[:, :6]}),
    "gpt2": (lambda: tiny_model("gpt2"), {}),
    "llama": (lambda: tiny_model("llama", num_hidden_layers=4), {}),
}


def outputs(model: Any, labels: dict[str, Any]) -> torch.Tensor:
    fed = {"decoder_input_ids": labels["labels"]} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS, **fed).logits
    return found


@pytest.mark.parametrize("name", list(CASES))
@pytest.mark.parametrize("uniform", [False, True])
def test_what_is_read_back_is_the_pruned_model(name: str, uniform: bool, tmp_path: Any) -> None:
    make, labels = CASES[name]
    model = make()
    batch = {"input_ids": IDS, **labels}
    share = 0.5 if uniform else 0.3
    secateur.prune_heads(model, [batch], share=share, rules=HeadRules(uniform=uniform))
    record = secateur.save_pruned(model, tmp_path / "out")
    again = secateur.load_pruned(tmp_path / "out")
    assert type(again).__name__ == type(model).__name__ or record["why"]
    assert torch.equal(outputs(again, labels), outputs(model, labels))
    assert not [p for p in tmp_path.iterdir() if p.name != "out"]
    # pruning goes on in the original's numbers
    more = secateur.prune_heads(again, [batch], share=0.2)
    direct = secateur.prune_heads(model, [batch], share=0.2)
    assert more.mask == direct.mask


def test_a_folder_in_use_is_left_alone(tmp_path: Any) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="not empty"):
        secateur.save_pruned(bert(), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]
    with pytest.raises(UsageError, match="transformers"):
        secateur.save_pruned(torch.nn.Linear(2, 2), tmp_path / "new")


def test_nothing_is_left_of_a_folder_that_does_not_hold(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pruned, "load_pruned", lambda place: bert().float().apply(_shift))
    with pytest.raises(VerificationError, match="differ"):
        secateur.save_pruned(bert(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def _shift(module: torch.nn.Module) -> None:
    for parameter in module.parameters(recurse=False):
        parameter.data.add_(1)


def test_a_manifest_of_another_model_is_refused(tmp_path: Any) -> None:
    model = bert()
    secateur.prune_heads(model, [{"input_ids": IDS, **CASES["bert"][1]}], share=0.3)
    secateur.save_pruned(model, tmp_path / "out")
    path = tmp_path / "out" / "pruning_manifest.json"
    record = json.loads(path.read_text())
    key = next(iter(record["groups"]))
    record["groups"][key]["kept"] = [0]
    path.write_text(json.dumps(record))
    with pytest.raises(SecateurError):
        secateur.load_pruned(tmp_path / "out")
