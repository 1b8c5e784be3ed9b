"""Adapters of PEFT by command: one merged into a pruned model, one kept beside what was merged."""

import json

import pytest
import torch

import secateur
from secateur.cli import main
from secateur.models.anatomy import ModelView
from secateur.models.tiny import tiny_model
from secateur.training.adapters import AdapterOptions, Adapters
from secateur.training.peft_format import export_peft

EVALUATION = ["--eval-length", "48", "--eval-windows", "2"]
TRAIN = ["--steps", "2", "--batch", "2", "--length", "48", "-R", "rank=4"]


@pytest.fixture(scope="module")
def places(tmp_path_factory, tiny_folder):
    """A pruned run, a run whose units were cut out, and an adapter that was trained elsewhere."""
    root = tmp_path_factory.mktemp("peft")
    source = str(tiny_folder("llama"))
    words = {"evaluation": None, "samples": 2, "length": 32}
    secateur.prune(source, method="magnitude", out=root / "cut", **words)
    secateur.prune(source, method="unit-magnitude", sparsity=0.25, out=root / "small", **words)
    adapters = Adapters.attach(
        ModelView.of(tiny_model("llama")), {}, AdapterOptions("lora", rank=4)
    )
    for parameter in adapters.parameters().values():
        parameter.data.normal_(0, 0.05, generator=torch.Generator().manual_seed(1))
    export_peft(adapters, root / "adapter")
    return root


def test_an_adapter_from_elsewhere_is_merged_and_fills_no_zero(places, tmp_path, capsys):
    words = ["recover", str(places / "cut"), "--adapter", str(places / "adapter"), *EVALUATION]
    assert main([*words, "--out", str(tmp_path / "out")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "of its update lay on zeros" in said
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    recovery = report["recovery"]
    assert recovery["zeros"] == report["totals"]["zeros"]
    assert 0.3 < recovery["lost_on_zeros"] < 0.9  # half of the weights are gone
    assert "loss" not in (tmp_path / "out" / "report.md").read_text().split("Recovery")[-1][:40]
    assert main(["verify", str(tmp_path / "out")]) == 0
    before, after = (
        secateur.load_pruned(p).state_dict() for p in (places / "cut", tmp_path / "out")
    )
    name = "model.layers.0.self_attn.q_proj.weight"
    gone = before[name] == 0
    assert not torch.equal(before[name], after[name])
    assert (after[name][gone] == 0).all()
    # The same command takes up what lies there: it is merged once.
    assert main([*words, "--out", str(tmp_path / "out")]) == 0
    again = secateur.load_pruned(tmp_path / "out").state_dict()
    assert torch.equal(again[name], after[name])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--adapter", "ADAPTER", "--steps", "4"], "nothing is trained"),
        (["--adapter", "nowhere"], "adapter_config.json"),
        (["--train", "norms", "-R", "keep_adapter=true"], "keep_adapter"),
        (["--train", "mask-lora", "-R", "keep_adapter=true"], "keep_adapter"),
        (["--train", "lora-prune,norms", "-R", "keep_adapter=true"], "keep_adapter"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    places, tmp_path, capsys, words, told
):
    words = [w.replace("ADAPTER", str(places / "adapter")) for w in words]
    code = main(["recover", str(places / "cut"), "--out", str(tmp_path / "out"), *words])
    assert code == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_other_widths_is_refused(places, tmp_path, capsys):
    words = ["--adapter", str(places / "adapter"), "--out", str(tmp_path / "out")]
    assert main(["recover", str(places / "small"), *words]) == 2
    assert "matrix of" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("source", "kind"), [("small", "lora"), ("cut", "lora-prune")])
def test_the_adapter_is_kept_beside_what_was_merged(places, tmp_path, source, kind):
    out = tmp_path / "out"
    words = ["recover", str(places / source), "--train", kind, *TRAIN, "-R", "keep_adapter=true"]
    assert main([*words, "--no-eval", "--out", str(out)]) == 0
    # Merged again from its own folder it gives the same weights.
    words = ["recover", str(places / source), "--adapter", str(out / "adapter"), "--no-eval"]
    assert main([*words, "--out", str(tmp_path / "again")]) == 0
    one, other = (secateur.load_pruned(p).state_dict() for p in (out, tmp_path / "again"))
    assert all(torch.equal(one[n], other[n]) for n in one)
    base = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert base["base_model_name_or_path"] == str(places / source)


def test_in_a_run_there_is_nothing_to_carry_it(tmp_path):
    with pytest.raises(secateur.UsageError, match="not kept") as caught:
        secateur.prune(
            "tiny", method="unit-magnitude", sparsity=0.3, out=tmp_path / "out",
            recovery={"train": ["lora"], "keep_adapter": True},
        )  # fmt: skip
    assert caught.value.field == "recovery.keep_adapter"
    assert not (tmp_path / "out").exists()
