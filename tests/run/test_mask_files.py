"""Mask files from runs, and put on models that are saved."""

import json

import pytest
import torch

import secateur
from secateur.cli import main
from secateur.errors import UsageError
from secateur.masks.store import load_masks
from secateur.models.loading import load
from secateur.models.mask_file import MaskFile
from secateur.run.mask_files import apply_to_folder, make_mask

CUT = {"sparsity": "2:4", "samples": 2, "length": 24}


def test_a_runs_mask_travels_alone(tmp_path, capsys):
    run, mask, sparse = tmp_path / "run", tmp_path / "a.mask", tmp_path / "sparse"
    made = secateur.prune("tiny", method="wanda", out=run, **CUT)
    assert main(["mask", "make", str(run), "--out", str(mask)]) == 0
    assert all(torch.equal(MaskFile(mask)[n], made.masks[n]) for n in made.masks)
    assert main(["mask", "apply", "tiny", str(mask), "--out", str(sparse)]) == 0
    # What comes out is the run's own model, with masks that recovery and exports take.
    ours, theirs = (load(str(p), tokenizer=False).model.state_dict() for p in (sparse, run))
    assert all(torch.equal(ours[n], theirs[n]) for n in theirs)
    assert all(torch.equal(load_masks(sparse)[n], made.masks[n]) for n in made.masks)
    capsys.readouterr()
    assert main(["mask", "show", str(mask), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["patterns"] == {"2:4": len(made.masks)}
    assert told["metadata"]["method"] == "wanda"
    with pytest.raises(UsageError, match="not empty"):
        apply_to_folder("tiny", mask, sparse)
    with pytest.raises(UsageError, match="holds other weights"):
        apply_to_folder(str(sparse), mask, tmp_path / "twice")
    assert not (tmp_path / "twice").exists()


def test_the_masks_are_in_the_folder_when_it_gets_its_name(tmp_path, monkeypatch):
    secateur.prune("tiny", method="magnitude", out=tmp_path / "run", **CUT)
    make_mask(tmp_path / "run", tmp_path / "a.mask")

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("secateur.run.mask_files.save_masks", killed)
    with pytest.raises(KeyboardInterrupt):
        apply_to_folder("tiny", tmp_path / "a.mask", tmp_path / "sparse")
    assert not (tmp_path / "sparse").exists()


def test_a_run_without_a_pattern_has_no_mask_file(tmp_path):
    secateur.prune("tiny", method="magnitude", out=tmp_path / "run", **{**CUT, "sparsity": 0.5})
    with pytest.raises(UsageError, match="only an N:M mask"):
        make_mask(tmp_path / "run", tmp_path / "a.mask")
    assert not (tmp_path / "a.mask").exists()


def test_a_mask_is_made_only_for_the_model_it_was_cut_from(tmp_path):
    secateur.prune("tiny", method="magnitude", out=tmp_path / "run", **CUT)
    dense = load("tiny")
    with torch.no_grad():
        for parameter in dense.model.parameters():
            parameter.mul_(1.01)
    dense.model.save_pretrained(tmp_path / "other")  # another revision, of the same shapes
    with pytest.raises(UsageError, match="not the model the run was cut from"):
        make_mask(tmp_path / "run", tmp_path / "a.mask", dense=str(tmp_path / "other"))
    assert not (tmp_path / "a.mask").exists()


def test_a_mask_of_a_model_that_was_in_memory(tmp_path):
    dense = load("tiny")
    dense.model.save_pretrained(tmp_path / "dense")
    made = secateur.prune(
        load("tiny").model, dense.tokenizer, method="magnitude", out=tmp_path / "run", **CUT
    )
    make_mask(tmp_path / "run", tmp_path / "a.mask", dense=str(tmp_path / "dense"))
    assert all(torch.equal(MaskFile(tmp_path / "a.mask")[n], made.masks[n]) for n in made.masks)
