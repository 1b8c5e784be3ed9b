"""Recovery inside runs and by itself: resumed, verified, compared, refused when it makes no sense."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

import secateur
from secateur.cli import main
from secateur.errors import UsageError
from secateur.export.loading import load_pruned
from secateur.masks.store import load_masks
from secateur.models.tiny import tiny_model, tiny_tokenizer
from secateur.recipe import Recipe
from secateur.run.verifying import verify_run

COMMON = {"samples": 4, "length": 48}
EVALUATION = {"text": "pydoc:test", "length": 48, "windows": 2, "speed": False}
RECOVERY = {"steps": 6, "batch": 2, "length": 48, "lr": 5e-3, "checkpoint_every": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_folder):
    """A pruned run without recovery."""
    out = tmp_path_factory.mktemp("runs") / "cut"
    secateur.prune(
        str(tiny_folder("opt")), method="magnitude", evaluation=EVALUATION, out=out, **COMMON
    )
    return out


def state(path):
    return {n: p.detach().clone() for n, p in load_pruned(path).named_parameters()}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


@pytest.mark.parametrize(
    "change",
    [{}, {"train": ["head", "norms"]}, {"method": "mask-lora", "rank": 4}, {"method": "full"}],
    ids=lambda c: "-".join(map(str, c.values())) or "default",
)
def test_a_run_recovers_saves_and_verifies(tmp_path, tiny_folder, change):
    result = secateur.prune(
        str(tiny_folder("opt")), method="magnitude", evaluation=EVALUATION, out=tmp_path / "run",
        recovery=RECOVERY | change, **COMMON,
    )  # fmt: skip
    report = result.report
    recovery, quality = report["recovery"], report["quality"]
    assert recovery["last_loss"] < recovery["first_loss"]
    assert recovery["zeros"] == report["totals"]["zeros"]
    assert report["totals"]["delivered"] == report["totals"]["asked"]
    # The dense figure is the dense model's, though its head and norms were trained since.
    assert recovery["before"]["dense"] == quality["dense"]
    assert quality["pruned"] != recovery["before"]["pruned"]
    assert verify_run(tmp_path / "run")["verified"]
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Recovery" in page
    assert not list((tmp_path / "run").glob("model-block-*"))
    again = secateur.prune(  # a finished run is taken as it is
        str(tiny_folder("opt")), method="magnitude", evaluation=EVALUATION, out=tmp_path / "run",
        recovery=RECOVERY | change, **COMMON,
    )  # fmt: skip
    assert again.report["quality"]["pruned"] == quality["pruned"]
    with pytest.raises(UsageError, match="recovery"):  # other settings need another folder
        secateur.prune(
            str(tiny_folder("opt")), method="magnitude", evaluation=EVALUATION,
            out=tmp_path / "run", recovery=RECOVERY | change | {"steps": 7}, **COMMON,
        )  # fmt: skip


RUN = """
import sys, time, torch
torch.set_num_threads(1)
import secateur
from secateur.training import loop
plain = loop._Run.step
def slow(self):
    time.sleep(0.15)
    return plain(self)
loop._Run.step = slow
secateur.prune(sys.argv[1], method="magnitude", out=sys.argv[2], recovery={settings}, **{common})
"""


def test_killed_in_recovery_the_run_goes_on(tmp_path, tiny_folder):
    source, settings = str(tiny_folder("opt")), RECOVERY | {"steps": 20}
    whole = tmp_path / "whole"
    secateur.prune(source, method="magnitude", out=whole, recovery=settings, **COMMON)
    out = tmp_path / "killed"
    script = RUN.replace("{settings}", repr(settings)).replace("{common}", repr(COMMON))
    process = subprocess.Popen([sys.executable, "-c", script, source, str(out)])
    metrics = out / "secateur" / "recovery" / "last" / "metrics.jsonl"
    limit = time.monotonic() + 180
    while not (metrics.exists() and metrics.read_text().count("\n") >= 5):
        assert process.poll() is None
        assert time.monotonic() < limit
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (out / "model.safetensors.index.json").exists()
    result = secateur.prune(source, method="magnitude", out=out, recovery=settings, **COMMON)
    assert equal(state(whole), state(out))
    events = [json.loads(x)["event"] for x in (out / "secateur" / "events.jsonl").open()]
    assert "resumed" in events
    losses = [
        [json.loads(x)["loss"] for x in (f / "secateur/recovery/last/metrics.jsonl").open()]
        for f in (whole, out)
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 20
    assert result.report["recovery"]["steps"] == 20


def test_killed_while_writing_what_was_recovered(tmp_path, tiny_folder, monkeypatch):
    from secateur.run import recovered

    source = str(tiny_folder("opt"))
    settings = RECOVERY | {"method": "mask-lora", "rank": 2}
    whole = tmp_path / "whole"
    secateur.prune(source, method="magnitude", out=whole, recovery=settings, **COMMON)
    plain, written = recovered.write_shard, []

    def breaking(path, tensors):
        if written:
            raise KeyboardInterrupt
        written.append(path)
        plain(path, tensors)

    with monkeypatch.context() as patch:
        patch.setattr(recovered, "write_shard", breaking)
        with pytest.raises(KeyboardInterrupt):
            secateur.prune(
                source, method="magnitude", out=tmp_path / "cut", recovery=settings, **COMMON
            )
    secateur.prune(source, method="magnitude", out=tmp_path / "cut", recovery=settings, **COMMON)
    assert equal(state(whole), state(tmp_path / "cut"))  # the adapter was merged once


def test_iterative_pruning_ends_exactly_at_the_target(tmp_path, tiny_folder):
    result = secateur.prune(
        str(tiny_folder("llama")), method="magnitude", sparsity=0.6, evaluation=None,
        out=tmp_path / "imp", recovery=RECOVERY | {"method": "imp", "cycles": 2}, **COMMON,
    )  # fmt: skip
    assert result.report["totals"]["delivered"] == pytest.approx(0.6, abs=1e-3)
    assert result.report["recovery"]["method"] == "imp"
    assert verify_run(tmp_path / "imp")["verified"]


def test_a_folder_is_recovered_by_command(folder, tmp_path, capsys):
    out = tmp_path / "mended"
    words = ["recover", str(folder), "--out", str(out), "--train", "biases,norms", "--json"]
    words += ["--steps", "6", "--length", "48", "-R", "batch=2", "--lr", "0.005"]
    words += ["--eval-length", "48", "--eval-windows", "2"]
    assert main(words) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["recovery"]["share"] == pytest.approx(1152 / 56928)
    before = report["recovery"]["before"]
    cut = json.loads((folder / "report.json").read_text())["quality"]
    assert before["pruned"]["perplexity"] == pytest.approx(cut["pruned"]["perplexity"], rel=1e-4)
    assert before["dense"]["perplexity"] == pytest.approx(cut["dense"]["perplexity"], rel=1e-4)
    assert report["quality"]["pruned"]["perplexity"] < before["pruned"]["perplexity"]
    assert main(["verify", str(out), "--json"]) == 0
    old, new = load_masks(folder), load_masks(out)
    assert all(torch.equal(old[n], new[n]) for n in old)
    assert main(words) == 0  # done already
    assert main(["recover", str(out), "--out", str(tmp_path / "twice"), "--steps", "2",
                 "--length", "48", "--no-eval", "--json"]) == 0  # fmt: skip


def test_a_finished_recovery_keeps_no_checkpoint(folder, tmp_path):
    words = {"train": ["all"], "steps": 2, "batch": 1, "length": 48, "out": tmp_path / "mended"}
    secateur.recover(folder, **words)
    inner = tmp_path / "mended" / "secateur" / "recovery"
    assert [p.name for p in inner.iterdir()] == ["metrics.jsonl"]
    before = state(tmp_path / "mended")
    secateur.recover(folder, **words)
    assert equal(before, state(tmp_path / "mended"))


def test_a_model_in_memory_is_recovered_in_place():
    model = tiny_model("gpt2")
    ids = torch.randint(4, 260, (8, 32), generator=torch.Generator().manual_seed(0))
    cut = secateur.prune(model, tiny_tokenizer(), method="magnitude", samples=2, length=32)
    mended = secateur.recover(
        model, masks=cut.masks, text=ids, method="mask-lora", rank=2, steps=3, length=32
    )
    assert mended.model is model
    assert mended.report["recovery"]["zeros"] == cut.report["totals"]["zeros"]


def test_reports_of_a_run_without_recovery_do_not_speak_of_it(folder):
    assert "Recovery" not in (folder / "report.html").read_text()


# -- bad input -----------------------------------------------------------------------------------


def test_a_model_without_masks_is_refused(tiny_folder, tmp_path, capsys):
    source = str(tiny_folder("opt"))
    assert main(["recover", source, "--out", str(tmp_path / "x")]) == 2
    said = capsys.readouterr().err
    assert "--mask-from-zeros" in said
    assert "--no-mask" in said
    assert not (tmp_path / "x").exists()
    assert main(["recover", source, "--mask-from-zeros", "--out", str(tmp_path / "x")]) == 2
    assert "no sparse model" in capsys.readouterr().err
    settings = ["--steps", "2", "--length", "48", "--no-eval", "--json"]
    assert main(["recover", source, "--no-mask", "--out", str(tmp_path / "y"), *settings]) == 0


def test_rounds_of_pruning_are_no_recovery_of_a_finished_cut(folder, tmp_path, capsys):
    assert main(["recover", str(folder), "--with", "imp", "--out", str(tmp_path / "x")]) == 2
    assert "secateur prune" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_masks_of_another_model_are_refused(folder, tiny_folder, tmp_path, capsys):
    words = ["recover", str(tiny_folder("llama")), "--masks", str(folder / "masks.safetensors")]
    assert main([*words, "--out", str(tmp_path / "x")]) == 2
    assert "no matrix of that name" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_mask_from_zeros_keeps_them(folder, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare)
    shutil.rmtree(bare / "secateur")
    (bare / "masks.safetensors").unlink()
    result = secateur.recover(
        bare, mask_from_zeros=True, steps=2, length=48, train=["norms"], out=tmp_path / "out"
    )
    assert result.report["recovery"]["zeros"] >= json.loads(
        (folder / "report.json").read_text()
    )["totals"]["zeros"]  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"train": []}, "train"),
        ({"train": ["biases"]}, "train"),
        ({"train": ["everything"]}, "train"),
        ({"method": "prep"}, "recovery"),
        ({"steps": 0}, "recovery.steps"),
        ({"length": 100_000}, "recovery.length"),
        ({"method": "full", "train": ["norms"]}, "recovery.train"),
        ({"method": "lora"}, "train"),
        ({"method": "mask-lora", "targets": ["zz"]}, "targets"),
        ({"method": "reconstruct", "train": ["head"]}, "train"),
        ({"method": "reconstruct", "unit": "matrix"}, "train"),
        ({"method": "reconstruct", "distil": 0.5}, "recovery.distil"),
        ({"method": "reconstruct", "patience": 2}, "recovery.patience"),
        ({"shard": True, "patience": 2}, "recovery.shard"),
        ({"precision": "fp16"}, "recovery.precision"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_anything_is_cut(
    tiny_folder, tmp_path, settings, field
):
    out = tmp_path / "out"
    with pytest.raises(UsageError) as caught:
        secateur.prune(
            str(tiny_folder("llama")), method="magnitude", out=out, recovery=RECOVERY | settings,
            **COMMON,
        )  # fmt: skip
    assert caught.value.field == field
    assert not out.exists()


def test_a_batch_that_cannot_be_sharded_is_refused_before_anything_is_cut(
    tiny_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr("secateur.training.sharding.processes", lambda: 2)
    with pytest.raises(UsageError, match="a multiple of 2") as caught:
        secateur.prune(
            str(tiny_folder("llama")), method="magnitude", out=tmp_path / "out",
            recovery=RECOVERY | {"shard": True, "batch": 3}, **COMMON,
        )  # fmt: skip
    assert caught.value.field == "recovery.batch"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--with", "imp"], "begin with the dense model"),
        (["-R", "cycles=2"], "begin with the dense model"),
        (["--train", ""], "nothing is to be trained"),
        (["--with", "lora"], "fill the zeros"),
        (["--with", "reconstruct", "--train", "head"], "lies in no block"),
        (["--dense", "nowhere-at-all"], "nowhere-at-all"),
        (["--with", "reconstruct", "--dense", "nowhere-at-all", "--no-eval"], "nowhere-at-all"),
    ],
)
def test_by_command_too_nothing_is_written_then(folder, tmp_path, capsys, words, told):
    code = main(["recover", str(folder), "--out", str(tmp_path / "out"), *words])
    assert code == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_reconstruction_without_the_dense_model_is_refused_at_once(tmp_path, capsys):
    out = tmp_path / "out"
    code = main(["recover", "tiny", "--no-mask", "--with", "reconstruct", "--out", str(out)])
    assert code == 2
    assert "--dense MODEL" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    "change",
    [{"train": ["head"]}, {"train": ["biases"], "add_biases": True}],
    ids=["head", "biases"],
)
def test_what_the_model_lacked_is_there_from_the_first_cycle_on(change, tmp_path):
    words = {
        "method": "magnitude", "evaluation": EVALUATION, "out": tmp_path / "run",
        "recovery": RECOVERY | {"cycles": 2} | change,
    }  # fmt: skip
    first = secateur.prune("tiny", **words, **COMMON)
    structure = json.loads((tmp_path / "run/secateur/recovered.json").read_text())["structure"]
    assert structure == {
        "added_biases": "add_biases" in change, "untied": "head" in change["train"]
    }  # fmt: skip
    again = secateur.prune("tiny", **words, **COMMON)  # takes up what lies there
    assert again.report["quality"]["pruned"] == first.report["quality"]["pruned"]
    assert equal(state(tmp_path / "run"), dict(again.model.named_parameters()))


def test_passes_of_reconstruction_are_those_over_its_own_windows(tmp_path):
    result = secateur.prune(
        "tiny", method="magnitude", evaluation=None, **COMMON,
        recovery=RECOVERY | {"method": "reconstruct", "samples": 4},
    )  # fmt: skip
    assert result.report["recovery"]["windows"] == 4
    assert result.report["recovery"]["passes"] == 3.0  # 6 steps of 2 windows


def test_a_text_shorter_than_a_window_is_refused(tiny_folder, tmp_path):
    text = tmp_path / "short.txt"
    text.write_text("a few words")
    with pytest.raises(UsageError, match="tokens"):
        secateur.prune(
            str(tiny_folder("opt")), method="magnitude", out=tmp_path / "out",
            recovery=RECOVERY | {"text": str(text)}, **COMMON,
        )  # fmt: skip


def test_contradictions_in_a_recipe_are_refused():
    for change, field in (
        ({"stream": True}, "recovery"),
        ({"sparsity": "2:4", "recovery": {"method": "imp"}}, "recovery.cycles"),
    ):
        with pytest.raises(UsageError) as caught:
            Recipe.build({"model": "tiny", "recovery": {}} | change)
        assert caught.value.field == field


def test_after_a_structured_cut_the_small_dense_model_is_trained(tmp_path, tiny_folder):
    """LoRA after LLM-Pruner's cut, merged: the folder opens with plain transformers."""
    words = {
        "method": "unit-magnitude", "sparsity": 0.25, "structure": {"kinds": ["ffn"]},
        "evaluation": EVALUATION, "out": tmp_path / "small",
        "recovery": RECOVERY | {"method": "lora", "rank": 2, "train": ["norms"]},
    }  # fmt: skip
    result = secateur.prune(str(tiny_folder("llama")), **words)
    recovery, quality = result.report["recovery"], result.report["quality"]
    assert recovery["adapter"]["kind"] == "lora"
    assert recovery["last_loss"] < recovery["first_loss"]
    assert recovery["before"]["dense"] == quality["dense"]
    assert quality["pruned"] != recovery["before"]["pruned"]
    trained = state(tmp_path / "small")
    assert {n: p.shape for n, p in trained.items()} == {
        n: p.shape for n, p in result.model.named_parameters()
    }
    again = secateur.prune(str(tiny_folder("llama")), **words)
    assert again.report["quality"]["pruned"] == quality["pruned"]
    assert equal(trained, state(tmp_path / "small"))
    later = secateur.recover(
        tmp_path / "small",
        no_mask=True,
        method="lora",
        rank=2,
        steps=2,
        length=48,
        out=tmp_path / "more",
    )
    assert later.report["recovery"]["zeros"] == 0
