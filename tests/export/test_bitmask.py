"""The bitmask container: exact, small, and loud when damaged."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from secateur.errors import SecateurError, UsageError, VerificationError
from secateur.export import export_bitmask, load_bitmask, load_pruned, reference_logits
from secateur.export.bitmask import FILE_NAME, compress, decompress, load_kept
from secateur.masks.store import save_masks

Make = Callable[..., tuple[Path, Any, dict[str, torch.Tensor]]]
IDS = torch.arange(24).reshape(2, 12)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 13), min_size=2, max_size=3),
    st.floats(0, 1),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.integers(0, 2**31),
)
def test_round_trip(shape: list[int], density: float, dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(shape, generator=generator) < density
    weight = torch.randn(shape, generator=generator).to(dtype).masked_fill(mask, 0)
    parts = compress(weight, mask)
    assert torch.equal(decompress(parts), weight)
    rows = (~mask).reshape(-1, shape[-1]).sum(1)
    assert torch.equal(parts["row_offsets"].long(), rows.cumsum(0) - rows)


def test_layout_is_the_published_one() -> None:
    """Kept values row-major; bits least significant first, 1 = kept; offsets per row."""
    weight = torch.tensor([[0.0, 1, 0, 0, 0, 0, 0, 0, 2], [3.0, 0, 0, 0, 0, 0, 0, 4, 0]])
    parts = compress(weight, weight == 0)
    assert parts["compressed"].tolist() == [1, 2, 3, 4]
    assert parts["bitmask"].tolist() == [[0b10, 1], [0b10000001, 0]]
    assert parts["shape"].tolist() == [2, 9]
    assert parts["row_offsets"].tolist() == [0, 2]
    bits = np.unpackbits(parts["bitmask"].numpy(), axis=-1, count=9, bitorder="little")
    assert np.array_equal(bits.astype(bool), (weight != 0).numpy())


def test_kept_zeros_survive_as_kept() -> None:
    weight, mask = torch.zeros(3, 8), torch.zeros(3, 8, dtype=torch.bool)
    mask[:, :4] = True
    parts = compress(weight, mask)
    assert parts["compressed"].numel() == 12
    assert torch.equal(decompress(parts), weight)


def test_model_round_trip_and_size(make_folder: Make, tmp_path: Path) -> None:
    folder, model, masks = make_folder(dtype=torch.bfloat16, hidden_size=256)
    record = export_bitmask(folder, tmp_path / "out")
    assert record["verified"]
    assert record["pruned"] == sum(int(m.sum()) for m in masks.values())
    assert record["matrices"]["ratio"] <= 0.575  # 1/2 + 1/16 + 4 bytes per row of 176 or more
    assert record["bytes"] == (tmp_path / "out" / FILE_NAME).stat().st_size
    state = load_bitmask(tmp_path / "out")
    saved = load_file(folder / "model.safetensors")
    assert set(state) == set(saved)
    assert all(torch.equal(state[name], saved[name]) for name in saved)
    kept = load_kept(tmp_path / "out")
    assert all(torch.equal(kept[f"{name}.weight"], mask) for name, mask in masks.items())
    loaded = load_pruned(tmp_path / "out")
    assert loaded.dtype is torch.bfloat16
    assert torch.equal(reference_logits(loaded, IDS), reference_logits(model, IDS))


def test_half_pruned_bf16_weights_take_57_percent(tmp_path: Path) -> None:
    """The promise of the format at the width of a 135M model, header and offsets included."""
    torch.manual_seed(0)
    (tmp_path / "in").mkdir()
    weights = {f"m.{i}.weight": torch.randn(512, 576).bfloat16() for i in range(4)}
    masks = {}
    for name, weight in weights.items():
        mask = torch.zeros(512, 576, dtype=torch.bool)
        mask.scatter_(1, weight.abs().float().argsort(1)[:, :288], True)
        weight[mask] = 0
        masks[name] = mask
    save_file(weights, tmp_path / "in" / "model.safetensors")
    (tmp_path / "in" / "config.json").write_text("{}")
    record = export_bitmask(tmp_path / "in", tmp_path / "out", masks=masks)
    assert record["bytes"] <= 0.57 * (tmp_path / "in" / "model.safetensors").stat().st_size


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
def test_families_load_with_plain_words(family: str, make_folder: Make, tmp_path: Path) -> None:
    folder, model, _ = make_folder(family)
    export_bitmask(folder, tmp_path / "out")
    assert torch.equal(
        reference_logits(load_pruned(tmp_path / "out"), IDS), reference_logits(model, IDS)
    )
    assert torch.equal(reference_logits(load_pruned(folder), IDS), reference_logits(model, IDS))


def test_transposed_and_renamed_matrices(tmp_path: Path) -> None:
    """GPT-2 keeps (d_in, d_out), and its checkpoints leave out ``transformer.``."""
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64, n_positions=32)
    model = transformers.GPT2LMHeadModel(config).eval()
    layer = model.transformer.h[0].attn.c_proj
    mask = torch.rand(32, 32) < 0.5  # as (d_out, d_in)
    layer.weight.data[mask.T] = 0
    folder = tmp_path / "gpt2"
    model.save_pretrained(folder)
    name = "transformer.h.0.attn.c_proj"
    save_masks(folder / "masks.safetensors", {name: mask}, {"transposed": [name]})
    assert export_bitmask(folder, tmp_path / "out")["pruned"] == int(mask.sum())
    assert torch.equal(
        reference_logits(load_pruned(tmp_path / "out"), IDS), reference_logits(model, IDS)
    )


def test_stacked_experts_are_found_apart_on_disk(tmp_path: Path) -> None:
    import transformers

    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=64, num_local_experts=3, num_experts_per_tok=2,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config).eval()
    experts = model.model.layers[0].mlp.experts
    masks = {}
    for part in ("gate_up_proj", "down_proj"):
        for i in range(3):
            weight = getattr(experts, part).data[i]
            mask = torch.rand(weight.shape) < 0.5
            weight[mask] = 0
            masks[f"model.layers.0.mlp.experts.{part}.{i}"] = mask
    folder = tmp_path / "mixtral"
    model.save_pretrained(folder)
    save_masks(folder / "masks.safetensors", masks)
    record = export_bitmask(folder, tmp_path / "out")
    assert record["pruned"] == sum(int(m.sum()) for m in masks.values())
    assert torch.equal(
        reference_logits(load_pruned(tmp_path / "out"), IDS), reference_logits(model, IDS)
    )


def test_casting_on_the_way(make_folder: Make, tmp_path: Path) -> None:
    folder, model, _ = make_folder()
    record = export_bitmask(folder, tmp_path / "out", dtype=torch.bfloat16)
    assert record["bytes"] < 0.35 * (folder / "model.safetensors").stat().st_size + 1e5
    state = load_bitmask(tmp_path / "out")
    assert torch.equal(
        state["model.embed_tokens.weight"], model.model.embed_tokens.weight.bfloat16()
    )


def test_side_files_are_carried_and_weights_are_not(make_folder: Make, tmp_path: Path) -> None:
    folder, _, _ = make_folder()
    (folder / "tokenizer.json").write_text("{}")
    (folder / "report.html").write_text("not ours to copy")
    export_bitmask(folder, tmp_path / "out")
    names = {f.name for f in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "generation_config.json", "tokenizer.json", FILE_NAME}
    with pytest.raises(OSError):  # plain transformers must not fill it with random weights
        __import__("transformers").AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_equal_input_gives_equal_bytes(make_folder: Make, tmp_path: Path) -> None:
    folder, _, _ = make_folder()
    export_bitmask(folder, tmp_path / "1")
    export_bitmask(folder, tmp_path / "2")
    assert (tmp_path / "1" / FILE_NAME).read_bytes() == (tmp_path / "2" / FILE_NAME).read_bytes()


def test_published_files_without_our_header_are_read(tmp_path: Path) -> None:
    mask = torch.rand(5, 9) < 0.5
    weight = torch.randn(5, 9).masked_fill(mask, 0)
    parts = compress(weight, mask)
    parts["row_offsets"] = parts["row_offsets"].long()
    file = tmp_path / "model.safetensors"
    save_file({f"layer.q.{part}": t for part, t in parts.items()} | {"norm": torch.ones(3)}, file)
    state = load_bitmask(file)
    assert set(state) == {"layer.q.weight", "norm"}
    assert torch.equal(state["layer.q.weight"], weight)


def test_live_weight_under_a_mask_stops_the_export(make_folder: Make, tmp_path: Path) -> None:
    folder, _, masks = make_folder()
    name = next(iter(masks))
    masks[name] = torch.ones_like(masks[name])
    with pytest.raises(VerificationError, match=name.replace(".", r"\.")):
        export_bitmask(folder, tmp_path / "out", masks=masks)
    assert {f.name for f in tmp_path.iterdir()} == {folder.name}


def test_refusals(make_folder: Make, tmp_path: Path) -> None:
    folder, _, masks = make_folder()
    with pytest.raises(UsageError, match="not an empty folder"):
        export_bitmask(folder, folder)
    with pytest.raises(SecateurError, match="does not hold: nowhere"):
        export_bitmask(folder, tmp_path / "out", masks=masks | {"nowhere": torch.ones(1, 1) > 0})
    (folder / "masks.safetensors").unlink()
    with pytest.raises(UsageError, match="no masks"):
        export_bitmask(folder, tmp_path / "out")
    with pytest.raises(UsageError, match="no such folder"):
        export_bitmask(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(UsageError, match=r"config\.json"):
        load_pruned(tmp_path)


def damage(parts: dict[str, torch.Tensor], how: str) -> dict[str, torch.Tensor]:
    parts = dict(parts)
    if how == "lost value":
        parts["p.compressed"] = parts["p.compressed"][:-1]
    elif how == "flipped bit":
        parts["p.bitmask"] = parts["p.bitmask"] ^ torch.tensor([[1, 0]], dtype=torch.uint8)
    elif how == "other shape":
        parts["p.shape"] = torch.tensor([2, 30])
    elif how == "negative shape":
        parts["p.shape"] = torch.tensor([-2, 9])
    else:
        del parts["p.shape"]
    return parts


@pytest.mark.parametrize(
    "how", ["lost value", "flipped bit", "other shape", "negative shape", "no shape"]
)
def test_damage_is_named(how: str, tmp_path: Path) -> None:
    weight = torch.arange(18.0).reshape(2, 9)
    parts = {f"p.{k}": v for k, v in compress(weight, weight == 0).items()}
    header = {"secateur.bitmask": json.dumps({"matrices": {"p": "p.weight"}})}
    save_file(damage(parts, how), tmp_path / FILE_NAME, metadata=header)
    with pytest.raises(SecateurError, match=r"p\.weight"):
        load_bitmask(tmp_path)


def test_cut_off_and_missing_files(make_folder: Make, tmp_path: Path) -> None:
    folder, _, _ = make_folder()
    export_bitmask(folder, tmp_path / "out")
    file = tmp_path / "out" / FILE_NAME
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(SecateurError, match="damaged"):
        load_pruned(tmp_path / "out")
    with pytest.raises(UsageError, match="no such file"):
        load_bitmask(tmp_path / "nowhere")


def test_missing_weights_are_not_filled_at_random(make_folder: Make, tmp_path: Path) -> None:
    folder, _, _ = make_folder()
    export_bitmask(folder, tmp_path / "out")
    file = tmp_path / "out" / FILE_NAME
    from safetensors import safe_open

    with safe_open(file, "pt") as handle:
        metadata = handle.metadata()
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    save_file(tensors, file, metadata=metadata)
    with pytest.raises(VerificationError, match=r"model\.norm\.weight"):
        load_pruned(tmp_path / "out")


def test_missing_weights_of_a_plain_folder_are_not_filled_either(make_folder: Make) -> None:
    folder, _, _ = make_folder()
    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(VerificationError, match=r"model\.norm\.weight"):
        load_pruned(folder)


def test_where_it_cannot_be_written_is_said(
    make_folder: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _, _ = make_folder()
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SecateurError, match="a part of that path is a file"):
        export_bitmask(folder, tmp_path / "file" / "out")
    export_bitmask(folder, tmp_path / "new" / "parent" / "out")
    assert (tmp_path / "new" / "parent" / "out" / FILE_NAME).is_file()
    monkeypatch.chdir(folder)
    with pytest.raises(UsageError, match="not an empty folder"):
        export_bitmask(folder, ".")
    monkeypatch.setattr("secateur.export.bitmask.copy_side_files", _disk_full)
    with pytest.raises(SecateurError, match="free some space"):
        export_bitmask(folder, tmp_path / "full")
    assert not list(tmp_path.glob("*full*"))


def _disk_full(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")
