"""Mask files: exact round trips, small, and never put on the wrong weights."""

import pytest
import torch

import secateur
from secateur.errors import SecateurError, UsageError
from secateur.masks.selection import select
from secateur.masks.target import Cut, Scope, Target
from secateur.models.anatomy import ModelView
from secateur.models.mask_file import MaskFile, apply_mask, save_mask
from secateur.models.tiny import tiny_model

TARGET = Target.parse("2:4")


def masks_of(view, score=lambda w: w.abs()):
    return {
        m.name: select(score(m.tensor().float()), Cut.of(m.shape, TARGET, Scope("row")))
        for m in view.matrices()
    }


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_a_mask_goes_on_as_it_was_made(family, tmp_path):
    model = tiny_model(family)
    view = ModelView.of(model)
    masks = masks_of(view)
    size = save_mask(tmp_path / "a.mask", view, masks, TARGET, {"learned": "here"})
    weights = sum(m.numel() for m in masks.values())
    file = MaskFile(tmp_path / "a.mask")
    assert file.metadata == {"learned": "here"}
    assert all(torch.equal(file[name], mask) for name, mask in masks.items())
    assert size < weights * 0.66 / 8 + 400 * len(masks) + 1000  # the header is a fixed cost
    other = apply_mask(tiny_model(family), tmp_path / "a.mask")
    for matrix in ModelView.of(other).matrices():
        kept = view[matrix.name].tensor().masked_fill(masks[matrix.name], 0)
        assert torch.equal(matrix.tensor(), kept)


def test_two_masks_of_one_model(tmp_path):
    view = ModelView.of(tiny_model("llama"))
    save_mask(tmp_path / "large.mask", view, masks_of(view), TARGET)
    save_mask(tmp_path / "small.mask", view, masks_of(view, lambda w: -w.abs()), TARGET)
    large = secateur.apply_mask(tiny_model("llama"), tmp_path / "large.mask")
    small = secateur.apply_mask(tiny_model("llama"), tmp_path / "small.mask")
    for a, b, w in zip(
        ModelView.of(large).matrices(),
        ModelView.of(small).matrices(),
        view.matrices(),
        strict=True,
    ):
        assert torch.equal(a.tensor() + b.tensor(), w.tensor())


@pytest.mark.parametrize("pattern", ["12:24", "1:16", "5:8"])
def test_any_pattern_and_another_for_each_matrix(pattern, tmp_path):
    view = ModelView.of(tiny_model("llama"))
    targets = {m.name: TARGET for m in view.matrices()}
    first = view.matrices()[0]
    targets[first.name] = Target.parse(pattern)
    masks = {
        m.name: select(m.tensor().abs(), Cut.of(m.shape, targets[m.name], Scope("row")))
        for m in view.matrices()
    }
    save_mask(tmp_path / "a.mask", view, masks, targets)
    file = MaskFile(tmp_path / "a.mask")
    assert str(file.patterns[first.name]) == pattern
    assert all(torch.equal(file[name], mask) for name, mask in masks.items())


def test_patterns_too_many_to_number_are_bits(tmp_path):
    from torch import nn

    from secateur.models.anatomy import Matrix

    layer = Matrix("w", nn.Linear(256, 6, bias=False))
    target = Target.parse("64:128")
    masks = {"w": select(layer.tensor().abs(), Cut.of(layer.shape, target, Scope("row")))}
    save_mask(tmp_path / "a.mask", {"w": layer}, masks, target)
    assert torch.equal(MaskFile(tmp_path / "a.mask")["w"], masks["w"])
    masks["w"][0, 0] = ~masks["w"][0, 0]
    with pytest.raises(SecateurError, match="does not keep 64 of every 128"):
        save_mask(tmp_path / "b.mask", {"w": layer}, masks, target)
    assert not (tmp_path / "b.mask").exists()


def test_other_weights_are_refused_and_left_alone(tmp_path):
    view = ModelView.of(tiny_model("llama"))
    save_mask(tmp_path / "a.mask", view, masks_of(view), TARGET)
    other = tiny_model("llama")
    last = ModelView.of(other).matrices()[-1]
    with torch.no_grad():
        last.tensor()[0, 0] += 1
    before = {k: v.clone() for k, v in other.state_dict().items()}
    with pytest.raises(UsageError, match="holds other weights"):
        apply_mask(other, tmp_path / "a.mask")
    assert all(torch.equal(before[k], v) for k, v in other.state_dict().items())
    apply_mask(other, tmp_path / "a.mask", check=False)
    with pytest.raises(UsageError, match="holds other weights"):
        apply_mask(other, tmp_path / "a.mask")  # a masked model is not dense any more


def test_another_model_and_other_files_are_refused(tmp_path):
    view = ModelView.of(tiny_model("llama"))
    save_mask(tmp_path / "a.mask", view, masks_of(view), TARGET)
    with pytest.raises(UsageError, match="is not in this model"):
        apply_mask(tiny_model("gpt2"), tmp_path / "a.mask")
    with pytest.raises(UsageError, match="no such file"):
        MaskFile(tmp_path / "b.mask")
    (tmp_path / "c.mask").write_text("hello")
    with pytest.raises(SecateurError, match="damaged"):
        MaskFile(tmp_path / "c.mask")
    with pytest.raises(UsageError, match="only an N:M mask"):
        save_mask(tmp_path / "d.mask", view, masks_of(view), Target.parse(0.5))
    assert not (tmp_path / "d.mask").exists()


def test_bfloat16_weights_of_the_same_values_are_the_same(tmp_path):
    model = tiny_model("llama").to(torch.bfloat16)
    view = ModelView.of(model)
    masks = masks_of(view)
    save_mask(tmp_path / "a.mask", view, masks, TARGET)
    apply_mask(tiny_model("llama").to(torch.bfloat16).float(), tmp_path / "a.mask")


def test_a_damaged_byte_is_told_before_anything_is_zeroed(tmp_path):
    view = ModelView.of(tiny_model("llama"))
    size = save_mask(tmp_path / "a.mask", view, masks_of(view), TARGET)
    data = bytearray((tmp_path / "a.mask").read_bytes())
    assert len(data) == size
    data[-50] ^= 1  # of another mask, which is a legal one
    (tmp_path / "a.mask").write_bytes(data)
    model = tiny_model("llama")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(SecateurError, match="not those that were written"):
        apply_mask(model, tmp_path / "a.mask")
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
