"""Runs in a folder: the same bytes whatever happened on the way."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

import secateur
from secateur.errors import SecateurError, UsageError
from secateur.models.tiny import VOCABULARY

IDS = torch.randint(4, VOCABULARY, (4, 32), generator=torch.Generator().manual_seed(3))


def outcome(folder: Path) -> dict[str, bytes]:
    """The files that must not depend on how often a run was interrupted."""
    keep = (".safetensors", "config.json", "index.json", "tokenizer.json")
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.name.endswith(keep)}


def work(model: str, out: str, boundary_seconds: float, settings: dict) -> None:
    """A run as a process of its own (spawned by a server that has imported everything)."""
    torch.set_num_threads(1)
    from secateur.run import checkpoint

    checkpoint.BOUNDARY_SECONDS = boundary_seconds
    secateur.prune(model, calibration=IDS, out=out, **settings)


@pytest.fixture(scope="module")
def server():
    """A fork server with torch and transformers imported, so that a child starts at once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["transformers", "secateur.api", "secateur.report.write"])
    return context


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("sparsegpt", {"reconstruct": "dense", "update": "exact"}),
        ("gblm", {}),
        ("magnitude", {}),
    ],
)
def test_killed_at_random_moments_it_gives_the_same_bytes(
    server, tiny_folder, tmp_path, method, settings
):
    model = str(tiny_folder("llama", num_hidden_layers=6))
    settings = {"method": method, "sparsity": 0.5, **settings}
    start = time.monotonic()
    work(model, str(tmp_path / "whole"), 0.0, settings)
    whole_run = time.monotonic() - start
    expected = outcome(tmp_path / "whole")
    assert "model.safetensors.index.json" in expected

    chance = random.Random(method)
    kills = 7
    folder = tmp_path / "killed"
    killed = 0
    while killed < kills:
        process = server.Process(target=work, args=(model, str(folder), 0.0, settings))
        process.start()
        process.join(chance.uniform(0.05, 1.5) * whole_run + 0.3)
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
            process.join()
        else:
            assert process.exitcode == 0
            assert outcome(folder) == expected
            shutil.rmtree(folder)
        killed += 1
    work(model, str(folder), 0.0, settings)
    assert outcome(folder) == expected
    assert not list(folder.rglob("*.part")), "a killed writer's leavings are swept up"


def test_running_again_changes_nothing(tiny_folder, tmp_path):
    model = str(tiny_folder("llama"))
    run = {"calibration": IDS, "method": "sparsegpt", "sparsity": 0.5, "out": tmp_path / "run"}
    first = secateur.prune(model, **run)
    before = outcome(tmp_path / "run")
    again = secateur.prune(model, **run)
    assert outcome(tmp_path / "run") == before
    for name, mask in first.masks.items():
        assert torch.equal(mask, again.masks[name])
    for a, b in zip(first.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "bloom"])
def test_a_half_done_run_goes_on(tiny_folder, tmp_path, family, monkeypatch):
    """Stopped by an error after the first block, then run again without it."""
    from secateur.run import checkpoint
    from secateur.run.engine import Engine

    monkeypatch.setattr(checkpoint, "BOUNDARY_SECONDS", 0.0)
    model = str(tiny_folder(family, **{LAYERS.get(family, "num_hidden_layers"): 3}))
    run = {"calibration": IDS, "method": "wanda", "sparsity": 0.5}
    secateur.prune(model, out=tmp_path / "whole", **run)
    whole = Engine.block
    done = []

    def stops(self, block):
        if block.index == 2 and not done:
            done.append(block)
            raise KeyboardInterrupt
        return whole(self, block)

    monkeypatch.setattr(Engine, "block", stops)
    with pytest.raises(KeyboardInterrupt):
        secateur.prune(model, out=tmp_path / "half", **run)
    assert not (tmp_path / "half" / "model.safetensors.index.json").exists()
    result = secateur.prune(model, out=tmp_path / "half", **run)
    assert outcome(tmp_path / "half") == outcome(tmp_path / "whole")
    log = (tmp_path / "half" / "secateur" / "events.jsonl").read_text()
    resumed = [json.loads(x) for x in log.splitlines() if '"resumed"' in x]
    assert resumed[-1]["blocks"] == 2
    assert result.report["totals"]["delivered"] == pytest.approx(0.5)


LAYERS = {"gpt2": "n_layer", "bloom": "n_layer"}


@pytest.mark.parametrize("method", ["sparsegpt", "gblm"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "bloom"])
def test_streaming_gives_the_same_model(tiny_folder, tmp_path, family, method):
    model = str(tiny_folder(family))
    run = {"calibration": IDS, "method": method, "sparsity": "2:4"}
    secateur.prune(model, out=tmp_path / "whole", **run)
    result = secateur.prune(model, out=tmp_path / "streamed", stream=True, **run)
    assert result.model is None
    whole = secateur.load_pruned(tmp_path / "whole")
    streamed = secateur.load_pruned(tmp_path / "streamed")
    for (name, a), b in zip(whole.named_parameters(), streamed.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)


def test_the_folder_loads_with_plain_transformers(tiny_folder, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    result = secateur.prune(
        str(tiny_folder("qwen2")), calibration=IDS, sparsity=0.7, out=tmp_path / "run"
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert AutoTokenizer.from_pretrained(tmp_path / "run")("hello")["input_ids"]
    with torch.no_grad():
        expected = result.model(input_ids=IDS).logits
        torch.testing.assert_close(model(input_ids=IDS).logits, expected)


def test_another_run_in_the_folder_is_refused(tiny_folder, tmp_path):
    model, out = str(tiny_folder("llama")), tmp_path / "run"
    secateur.prune(model, calibration=IDS, sparsity=0.5, out=out)
    with pytest.raises(UsageError, match=r"recipe.sparsity=0.6.*sparsity=0.5"):
        secateur.prune(model, calibration=IDS, sparsity=0.6, out=out)
    with pytest.raises(UsageError, match="calibration"):
        secateur.prune(model, calibration=IDS + 1, sparsity=0.5, out=out)
    secateur.prune(model, calibration=IDS, sparsity=0.6, out=out, fresh=True)


def test_two_runs_at_once_in_one_folder(tiny_folder, tmp_path):
    import fcntl

    model, out = str(tiny_folder("llama")), tmp_path / "run"
    secateur.prune(model, calibration=IDS, out=out)
    with open(out / "secateur" / "lock", "a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UsageError, match="another run"):
            secateur.prune(model, calibration=IDS, out=out)


def test_foreign_files_are_left_alone(tiny_folder, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match=r"thesis.txt"):
        secateur.prune(str(tiny_folder("llama")), calibration=IDS, out=tmp_path, fresh=True)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_corrupt_block_shard_is_found(tiny_folder, tmp_path):
    from secateur.run.verifying import verify_run

    model, out = str(tiny_folder("llama")), tmp_path / "run"
    secateur.prune(model, calibration=IDS, out=out)
    verify_run(out)
    shard = out / "model-block-00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[-2000:] = bytes([63]) * 2000
    shard.write_bytes(data)
    with pytest.raises(SecateurError):
        verify_run(out)


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "wanda"},
        {"method": "gblm"},
        {"method": "wanda", "evaluation": {"length": 32, "windows": 2, "speed": False}},
    ],
)
def test_full_disk(tiny_folder, tmp_path, settings):
    """A limit on file size stands in for a full disk: message, no half file, then it goes on."""
    import resource

    model, out = str(tiny_folder("llama")), tmp_path / "run"
    text = tmp_path / "text.txt"
    text.write_text("The gardener cut the roses, and the roses grew again. " * 200)
    if "evaluation" in settings:
        settings = {**settings, "evaluation": {**settings["evaluation"], "text": str(text)}}
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(SecateurError, match="cannot write"):
            secateur.prune(model, calibration=IDS, out=out, **settings)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(out.rglob("*.part"))
    assert not (out / "model-block-00000.safetensors").exists()
    assert secateur.prune(model, calibration=IDS, out=out, **settings).report["verified"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_place(tiny_folder, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(SecateurError, match="cannot be written"):
        secateur.prune(str(tiny_folder("llama")), calibration=IDS, out=tmp_path / "run")


def test_out_is_a_file(tiny_folder, tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(UsageError, match="file"):
        secateur.prune(str(tiny_folder("llama")), calibration=IDS, out=tmp_path / "run")


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_streamed_run_can_go_on_resident(tiny_folder, tmp_path, family):
    model = str(tiny_folder(family))
    run = {"calibration": IDS, "method": "wanda", "sparsity": 0.5, "out": tmp_path / "run"}
    secateur.prune(model, stream=True, **run)
    result = secateur.prune(model, **run)
    for name, mask in result.masks.items():
        assert int(mask.sum()) > 0, name
    again = secateur.load_pruned(tmp_path / "run")
    for (name, a), b in zip(result.model.named_parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_evaluation_may_change_between_attempts(tiny_folder, tmp_path, monkeypatch):
    """Saved states of the dense model belong to their windows and to no others."""
    from secateur.run.engine import Engine

    model = str(tiny_folder("llama"))
    texts = []
    for n, words in enumerate(("roses and shears ", "Call me Ishmael, some years ago ")):
        texts.append(tmp_path / f"{n}.txt")
        texts[-1].write_text(words * 300)
    run = {"calibration": IDS, "method": "wanda", "out": tmp_path / "run"}

    def evaluation(text):
        return {"text": str(text), "length": 32, "windows": 4, "speed": False}

    with monkeypatch.context() as patch:

        def stops(self, block):
            raise KeyboardInterrupt

        patch.setattr(Engine, "block", stops)
        with pytest.raises(KeyboardInterrupt):
            secateur.prune(model, evaluation=evaluation(texts[0]), **run)
    resumed = secateur.prune(model, evaluation=evaluation(texts[1]), **run)
    run["out"] = tmp_path / "other"
    straight = secateur.prune(model, evaluation=evaluation(texts[1]), **run)
    for which in ("dense", "pruned"):
        a, b = (r.report["quality"][which]["perplexity"] for r in (resumed, straight))
        assert a == pytest.approx(b, rel=1e-6)


def test_fresh_does_not_take_a_folder_that_merely_looks_like_one(tiny_folder, tmp_path):
    """A source tree has a folder called secateur too."""
    (tmp_path / "secateur").mkdir()
    (tmp_path / "secateur" / "code.py").write_text("precious")
    with pytest.raises(UsageError):
        secateur.prune(str(tiny_folder("llama")), calibration=IDS, out=tmp_path, fresh=True)
    assert (tmp_path / "secateur" / "code.py").read_text() == "precious"


def test_a_bfloat16_checkpoint_stays_one(tmp_path):
    """Worked on in float32 on a CPU, written as it came, and measured as written."""
    from secateur.models.shards import SafetensorsFolder

    ids = torch.randint(4, 2048, (4, 32), generator=torch.Generator().manual_seed(3))
    result = secateur.prune(
        "tiny", calibration=ids, method="sparsegpt", out=tmp_path / "run", device="cpu"
    )
    on_disk = SafetensorsFolder(tmp_path / "run")
    assert {on_disk.dtype(name) for name in on_disk.names()} == {torch.bfloat16}
    assert json.loads((tmp_path / "run" / "config.json").read_text())["dtype"] == "bfloat16"
    again = secateur.load_pruned(tmp_path / "run", dtype=torch.float32)
    for (name, a), b in zip(result.model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(a, b[1]), name
    size = result.report["size"]["disk"]
    assert size["pruned"] == pytest.approx(size["dense"], rel=0.02)
    assert size["bitmask"] < size["dense"]
