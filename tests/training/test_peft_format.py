"""Adapters out to PEFT and in from it: the same logits on both sides."""

import json
import shutil

import pytest
import torch

from secateur.errors import SecateurError, UsageError
from secateur.models.anatomy import ModelView
from secateur.models.tiny import VOCABULARY, tiny_model
from secateur.tensorfile import save_tensors
from secateur.training.adapters import AdapterOptions, Adapters
from secateur.training.low_rank import MASKED
from secateur.training.peft_format import CONFIG, WEIGHTS, export_peft, import_peft, read_peft

IDS = torch.randint(4, VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def trained(family, **options):
    """A tiny model with disturbed adapters on it."""
    model = tiny_model(family)
    adapters = Adapters.attach(ModelView.of(model), {}, AdapterOptions("lora", **options))
    g = torch.Generator().manual_seed(9)
    for parameter in adapters.parameters().values():
        parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=g))
    return model, adapters


def peft_model(family, folder, **config):
    """A tiny model with a disturbed LoRA made and saved by PEFT itself."""
    peft = pytest.importorskip("peft")
    config = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "down_proj"]} | config
    model = peft.get_peft_model(tiny_model(family), peft.LoraConfig(**config))
    g = torch.Generator().manual_seed(9)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=g))
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_ours_opens_in_peft(family, tmp_path):
    peft = pytest.importorskip("peft")
    model, adapters = trained(family, rank=4, alpha=12.0)
    export_peft(adapters, tmp_path / "adapter", base="a/model")
    theirs = peft.PeftModel.from_pretrained(tiny_model(family), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(theirs), logits(model), atol=1e-5, rtol=1e-5)
    adapters.merge()
    merged = theirs.merge_and_unload()
    torch.testing.assert_close(logits(merged), logits(model), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("llama", {}),
        ("llama", {"use_rslora": True}),
        ("llama", {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"1.mlp.down_proj": 5}}),
        ("llama", {"target_modules": ["q_proj", "lm_head"]}),
        ("gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    ],
)
def test_theirs_opens_here(family, config, tmp_path):
    changes = {"tie_word_embeddings": False} if "lm_head" in str(config) else {}
    theirs = peft_model(family, tmp_path, **config)
    model = tiny_model(family)
    if changes:
        from secateur.models.head import untie_head

        untie_head(model)
    adapters = import_peft(ModelView.of(model), {}, tmp_path)
    torch.testing.assert_close(logits(model), logits(theirs), atol=1e-5, rtol=1e-5)
    adapters.merge()
    torch.testing.assert_close(logits(model), logits(theirs), atol=1e-4, rtol=1e-4)


def test_there_and_back_again_is_the_same(tmp_path):
    model, adapters = trained("llama", rank=4)
    export_peft(adapters, tmp_path)
    again = tiny_model("llama")
    import_peft(ModelView.of(again), {}, tmp_path)
    assert torch.equal(logits(again), logits(model))


def test_merged_into_a_pruned_model_it_fills_no_zero(tmp_path):
    """What users ask for: an adapter trained elsewhere, and the sparsity stays."""
    peft_model("llama", tmp_path)
    model = tiny_model("llama")
    view, masks = ModelView.of(model), {}
    for matrix in view.matrices():
        masks[matrix.name] = matrix.tensor().abs() < matrix.tensor().abs().median()
        matrix.tensor().masked_fill_(masks[matrix.name], 0)
    before = {m.name: m.tensor().clone() for m in view.matrices()}
    import_peft(view, masks, tmp_path).merge()
    read = read_peft(tmp_path)
    for matrix in view.matrices():
        wanted = before[matrix.name]
        if matrix.name in read.pairs:
            a, b = read.pairs[matrix.name]
            wanted = wanted + read.scales[matrix.name] * (b @ a) * ~masks[matrix.name]
        torch.testing.assert_close(matrix.tensor(), wanted)
        assert (matrix.tensor()[masks[matrix.name]] == 0).all()


@pytest.mark.parametrize("kind", MASKED)
def test_kinds_peft_does_not_know_leave_as_merged_weights_only(kind, tmp_path):
    model = tiny_model("llama")
    adapters = Adapters.attach(ModelView.of(model), {}, AdapterOptions(kind, rank=4))
    with pytest.raises(UsageError, match="merge it"):
        export_peft(adapters, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    adapters.merge()
    with pytest.raises(UsageError, match="no adapters"):
        export_peft(adapters, tmp_path / "adapter")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"peft_type": "IA3"}, "peft_type"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ],
)
def test_more_than_a_plain_lora_is_refused_by_name(change, word, tmp_path):
    _, adapters = trained("llama", rank=4)
    export_peft(adapters, tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(config | change))
    with pytest.raises(UsageError, match=word):
        read_peft(tmp_path)


def test_bad_folders_are_refused_plainly(tmp_path):
    with pytest.raises(UsageError, match="no adapter"):
        read_peft(tmp_path)
    _, adapters = trained("llama", rank=4)
    export_peft(adapters, tmp_path / "good")
    shutil.copytree(tmp_path / "good", tmp_path / "pickled")
    (tmp_path / "pickled" / WEIGHTS).rename(tmp_path / "pickled" / "adapter_model.bin")
    with pytest.raises(UsageError, match="pickled"):
        read_peft(tmp_path / "pickled")
    (tmp_path / "good" / CONFIG).write_text("{")
    with pytest.raises(SecateurError, match="damaged"):
        read_peft(tmp_path / "good")
    export_peft(adapters, tmp_path / "good")
    (tmp_path / "good" / WEIGHTS).write_bytes(b"\0" * 20)
    with pytest.raises(SecateurError, match="damaged"):
        read_peft(tmp_path / "good")
    lonely = {"base_model.model.model.layers.0.mlp.up_proj.lora_A.weight": torch.zeros(4, 48)}
    save_tensors(tmp_path / "good" / WEIGHTS, lonely)
    with pytest.raises(SecateurError, match="matching"):
        read_peft(tmp_path / "good")
    save_tensors(tmp_path / "good" / WEIGHTS, {"x.lora_magnitude_vector": torch.zeros(4)})
    with pytest.raises(UsageError, match="magnitude"):
        read_peft(tmp_path / "good")


def test_an_adapter_of_another_model_is_refused_and_leaves_nothing(tmp_path):
    _, adapters = trained("llama", rank=4)
    export_peft(adapters, tmp_path)
    for other in (tiny_model("gpt2"), tiny_model("llama", intermediate_size=128)):
        before = logits(other)
        with pytest.raises(UsageError) as error:
            import_peft(ModelView.of(other), {}, tmp_path)
        assert error.value.field == "adapter"
        assert torch.equal(logits(other), before)
        ModelView.of(other)
