"""Retraining after a structured cut: in the same run, from its folder, and killed in between."""

import json

import pytest

import secateur
from secateur.cli import main
from secateur.errors import UsageError
from secateur.models.tiny import tiny_model, tiny_tokenizer

RECOVERY = {"steps": 4, "batch": 2, "length": 32, "train": ["lora"], "rank": 4}
CUT = ["--method", "unit-magnitude", "--sparsity", "0.3", "--no-speed", "--samples", "2"]
TRAIN = ["-R", "steps=2", "-R", "batch=2", "-R", "length=32"]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_cut_model_is_trained_before_it_is_saved(family, tmp_path):
    result = secateur.prune(
        tiny_model(family),
        tiny_tokenizer(),
        method="unit-magnitude",
        sparsity=0.3,
        evaluation={"windows": 2, "length": 32, "speed": False},
        recovery=RECOVERY,
        out=tmp_path / "run",
    )
    recovery = result.report["recovery"]
    assert recovery["steps"] == 4
    assert (
        recovery["before"]["pruned"]["perplexity"]
        != (result.report["quality"]["pruned"]["perplexity"])
    )
    again = secateur.load_pruned(tmp_path / "run")
    ours, theirs = result.model.state_dict(), again.state_dict()
    assert all((ours[name] == theirs[name]).all() for name in ours)


def test_a_structured_folder_is_recovered_with_its_widths(tmp_path, capsys):
    assert main(["prune", "tiny", *CUT, "--out", str(tmp_path / "cut"), "--no-eval"]) == 0
    code = main([
        "recover", str(tmp_path / "cut"), "--train", "lora,norms", *TRAIN, "--no-eval",
        "--out", str(tmp_path / "back"),
    ])  # fmt: skip
    assert code == 0, capsys.readouterr().err
    record = json.loads((tmp_path / "back" / "secateur" / "result.json").read_text())
    # Settings given by name count beside those given by -R.
    assert record["recovery"]["train"] == ["lora", "norms"]
    assert record["recovery"]["steps"] == 2
    assert main(["verify", str(tmp_path / "back")]) == 0
    cut, back = (secateur.load_pruned(tmp_path / name) for name in ("cut", "back"))
    shapes = [{n: t.shape for n, t in m.state_dict().items()} for m in (cut, back)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"method": "imp"}, "recovery.method"),
        ({"method": "perp", "add_biases": True, "train": ["biases"]}, "recovery.add_biases"),
    ],
)
def test_what_has_no_meaning_after_surgery_is_refused(change, field, tmp_path):
    with pytest.raises(UsageError) as caught:
        secateur.prune(
            "tiny",
            method="unit-magnitude",
            sparsity=0.3,
            recovery=RECOVERY | {"train": None} | change,
            out=tmp_path / "run",
        )
    assert caught.value.field == field
    assert not (tmp_path / "run").exists()
