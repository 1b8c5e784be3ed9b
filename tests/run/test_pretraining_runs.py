"""``secateur pretrain`` as people use it: a folder, a crash, a report, a stock model, plain refusals."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import secateur
from secateur.cli import main
from secateur.errors import NumericsError, UsageError
from secateur.models.tiny import tiny_model, tiny_tokenizer
from secateur.run.verifying import verify_run
from secateur.training.hooks import Hook
from secateur.training.loop import fit

SMALL = {"batch": 4, "length": 32, "tokens": 4 * 32 * 14, "lr": 1e-3, "prune_until": 0.7}
TEXT = ["The quick brown fox jumps over the lazy dog. " * 20, "Of cutting roses. " * 50] * 3


def pretrain(folder, **own):
    return secateur.pretrain(folder, text=TEXT, **SMALL | {"epochs": None} | own)


def words(**own):
    """The same settings for the command line."""
    return [w for k, v in (SMALL | own).items() for w in ("-R", f"{k}={v}")]


@pytest.mark.parametrize(("family", "stock"), [("llama", True), ("gpt2", False), ("gemma2", False)])
def test_what_is_written_opens_and_says_the_same(tmp_path, tiny_folder, family, stock):
    """(G.10) Saved, verified, opened by stock transformers, generating with and without a cache."""
    result = pretrain(
        tiny_folder(family), keep_params=0.7, out=tmp_path / "out", min_width=38, min_ffn=60,
        evaluation={"text": "pydoc:test", "length": 32, "windows": 2}, validate_every=5,
    )  # fmt: skip
    report = result.report
    assert report["structure"]["form"]["stock"] is stock
    assert {e["type"] for e in report["pretraining"]["events"]} >= {"ffn", "stem"}
    assert verify_run(tmp_path / "out")["verified"]
    opened = AutoModelForCausalLM if stock else None
    again = (
        opened.from_pretrained(tmp_path / "out", dtype=torch.float32)
        if opened
        else secateur.load_pruned(tmp_path / "out", dtype=torch.float32)
    )
    ids = torch.arange(4, 20)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, result.model(ids).logits)
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    cached = again.generate(ids, **settings)
    assert torch.equal(cached, again.generate(ids, use_cache=False, **settings))
    assert sum(p.numel() for p in again.parameters()) == report["structure"]["parameters"]["after"]
    assert report["quality"]["dense"]["perplexity"] > 1
    page = (tmp_path / "out" / "report.html").read_text()
    for figure in ("Removed of each type", "Saliency of what went", "Speed against FLOPs", "Loss"):
        assert figure in page
    assert "How the shape was found" in (tmp_path / "out" / "report.md").read_text()


def test_a_width_its_heads_do_not_divide_is_saved_as_mistral(tmp_path, tiny_folder):
    """(D) Llama's config refuses it; Mistral's says the same computation."""
    out = tmp_path / "out"
    result = pretrain(
        tiny_folder("llama", num_key_value_heads=4), keep_params=0.9, kinds=["stem"], out=out
    )
    width = result.model.model.embed_tokens.weight.shape[1]
    assert width % 4
    assert json.loads((out / "config.json").read_text())["architectures"] == ["MistralForCausalLM"]
    assert result.report["reopened"]["loaded"]


class Stop(Hook):
    """Kills a training after a step."""

    def __init__(self, step):
        self.step = step

    def after_step(self, at):
        if at.step == self.step:
            raise RuntimeError("killed")


@pytest.mark.parametrize("kill", [1, 6, 9])
def test_killed_runs_go_on_and_end_the_same(tmp_path, tiny_folder, monkeypatch, kill):
    from secateur.run import pretraining

    folder, own = tiny_folder("llama"), {"keep_params": 0.6, "checkpoint_every": 2}
    whole = pretrain(folder, out=tmp_path / "whole", **own)

    def stopped(*args, hooks, **more):
        return fit(*args, hooks=[*hooks, Stop(kill)], **more)

    monkeypatch.setattr(pretraining, "fit", stopped)
    with pytest.raises(RuntimeError, match="killed"):
        pretrain(folder, out=tmp_path / "cut", **own)
    monkeypatch.undo()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UsageError, match="keep_params") as caught:
        pretrain(folder, out=tmp_path / "cut", **own | {"keep_params": 0.7})
    assert "another --out" in caught.value.fix
    again = pretrain(folder, out=tmp_path / "cut", **own)
    one, two = whole.report["pretraining"], again.report["pretraining"]
    assert two["losses"] == one["losses"]
    assert two["events"] == one["events"]
    for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)
    done = pretrain(folder, out=tmp_path / "cut", **own)  # a finished one is taken as it is
    assert done.report == json.loads(json.dumps(again.report))
    assert not list((tmp_path / "cut").rglob("training.safetensors"))


def test_a_budget_of_everything_is_plain_training(tmp_path, tiny_folder):
    result = pretrain(tiny_folder("llama"), keep_params=1.0, out=tmp_path / "out")
    assert not result.report["pretraining"]["events"]
    assert verify_run(tmp_path / "out")["verified"]
    assert (tmp_path / "out" / "report.html").exists()


def test_in_memory_with_distillation():
    model = tiny_model("opt")
    result = secateur.pretrain(
        model, tiny_tokenizer(), text=TEXT, keep_params=0.8, distil=0.5, checkpointing=True,
        **SMALL | {"epochs": None},
    )  # fmt: skip
    assert result.model is model
    assert not model.training
    budget = result.report["pretraining"]["budget"]
    assert sum(p.numel() for p in model.parameters()) <= budget
    assert result.report["recipe"]["pretraining"]["distil"] == 0.5


def test_a_cut_model_goes_on_being_cut(tmp_path, tiny_folder):
    first = pretrain(tiny_folder("llama"), keep_params=0.8, out=tmp_path / "a")
    second = pretrain(tmp_path / "a", keep_params=0.8, out=tmp_path / "b")
    sizes = [r.report["structure"]["parameters"]["after"] for r in (first, second)]
    assert sizes[1] <= 0.8 * sizes[0]
    again = secateur.load_pruned(tmp_path / "b")
    assert sum(p.numel() for p in again.parameters()) == sizes[1]


# -- words ---------------------------------------------------------------------------------------


def test_command_line_recipe_and_json(tmp_path, tiny_folder, capsys):
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(TEXT))
    model = str(tiny_folder("llama"))
    code = main(
        ["pretrain", model, "--keep-params", "0.7", "-t", str(text), "--no-eval", "--epochs", "90",
         *words(), "-o", str(tmp_path / "out"), "--json"]
    )  # fmt: skip
    record = json.loads(capsys.readouterr().out)
    assert code == 0
    assert record["pretraining"]["events"]
    rows = tmp_path / "rows.jsonl"  # the same document, elsewhere
    rows.write_text(json.dumps({"body": text.read_text()}) + "\n")
    data = {"text": str(rows), "field": "body", "epochs": 90}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        json.dumps(
            {"model": model, "evaluation": None,
             "pretraining": {**SMALL, "keep_params": 0.7, **data}}
        )
    )  # fmt: skip
    assert main(["run", str(recipe), "-o", str(tmp_path / "by-recipe")]) == 0
    said = capsys.readouterr().out
    assert "parameters ->" in said
    assert "opens with  stock transformers" in said
    same = json.loads((tmp_path / "by-recipe" / "report.json").read_text())
    assert same["pretraining"]["losses"] == record["pretraining"]["losses"]


@pytest.mark.parametrize(
    ("own", "field", "said"),
    [
        ({"keep_params": 0.01}, "keep_params", "smallest shape"),
        ({"keep_params": "9M"}, "keep_params", "already"),
        ({"keep_params": "much"}, "keep_params", "k, M or B"),
        ({"tokens": "64"}, "pretraining.tokens", "steps"),
        ({"length": 4096}, "pretraining.length", "128"),
        ({"prune_until": 0.01}, "pretraining.prune_until", "before it begins"),
        ({"kinds": ["layer"]}, "pretraining.kinds.0", "head"),
        ({"epochs": 1, "tokens": "9M"}, "tokens", "tokens"),
        ({"saliencies": "obd"}, "pretraining.saliencies", "did you mean 'saliency'"),
    ],
)  # fmt: skip
def test_refusals_are_plain_and_leave_nothing(tmp_path, tiny_folder, own, field, said):
    with pytest.raises(UsageError) as caught:
        pretrain(tiny_folder("llama"), out=tmp_path / "out", **own)
    assert caught.value.field == field
    assert said in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_data_that_runs_out_leaves_a_training_to_go_on_from(tmp_path, tiny_folder, monkeypatch):
    """Where counting beforehand is not possible."""
    from secateur.data.token_stream import TokenStream

    monkeypatch.setattr(TokenStream, "require", lambda self, tokens, progress: None)
    own = {"keep_params": 0.7, "out": tmp_path / "out", "tokens": 4 * 32 * 60}
    with pytest.raises(UsageError, match="epochs"):
        pretrain(tiny_folder("llama"), epochs=1, **own)
    assert list((tmp_path / "out").rglob("training.safetensors"))
    result = pretrain(tiny_folder("llama"), epochs=None, **own)
    assert result.report["pretraining"]["steps"] == 60


def test_nan_is_told_and_the_folder_can_go_on(tmp_path, tiny_folder):
    with pytest.raises(NumericsError, match="not finite"):
        pretrain(tiny_folder("llama"), keep_params=0.7, lr=1e30, clip=None, out=tmp_path / "out")
    assert not (tmp_path / "out" / "model.safetensors.index.json").exists()


def test_recipes_refuse_other_methods(tmp_path):
    recipe = secateur.Recipe.build(
        {"model": "tiny", "method": "sparsegpt", "pretraining": {"keep_params": 0.5}}
    )
    from secateur.run.runner import execute

    with pytest.raises(UsageError, match="beside 'pretraining'"):
        execute(recipe)


@pytest.mark.slow
def test_two_processes_from_the_command_line(tmp_path, tiny_folder):
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(TEXT))
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "-m", "secateur", "pretrain", str(tiny_folder("llama")), "-k", "0.7", "-t", str(text),
        "--epochs", "90", "--no-eval", *words(), "-o", str(tmp_path / "out"),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=Path.cwd())
    assert done.returncode == 0, done.stderr[-2000:]
    assert verify_run(tmp_path / "out")["verified"]
