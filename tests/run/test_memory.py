"""Memory: a streamed run keeps to a limit and does not grow with depth; gradients are folded.

Each figure is that of a fresh process, which never shares its peak with other tests.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from secateur.evidence.statistics import GradientMoments, InputMoments, add_gram
from secateur.masks.store import MaskStore
from secateur.models.tiny import VOCABULARY, synthetic_llama

MIB = 2**20

RUN = """
import json, resource, sys
import torch
import transformers.models.llama.modeling_llama
import secateur, secateur.api, secateur.report.write

def status(field):
    with open("/proc/self/status") as lines:
        return int(next(l for l in lines if l.startswith(field + ":")).split()[1]) * 1024

torch.set_num_threads(1)
folder, out, method, stream, headroom = json.loads(sys.argv[1])
before = status("VmRSS")
if headroom:
    limit = status("VmData") + headroom
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
ids = torch.randint(4, 256, (2, 64), generator=torch.Generator().manual_seed(0))
result = secateur.prune(folder, method=method, calibration=ids, stream=stream, out=out)
print(json.dumps({"grown": status("VmHWM") - before, "totals": result.report["totals"]}))
"""

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="peaks are read from /proc (Linux)"
)


def in_fresh_process(folder, out, method="wanda", stream=True, headroom=0):
    given = json.dumps([str(folder), str(out), method, stream, headroom])
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", RUN, given], capture_output=True, text=True, env=environment
    )


def grown(folder, out, method):
    done = in_fresh_process(folder, out, method)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])["grown"]


@pytest.mark.slow
def test_streamed_memory_does_not_grow_with_depth(tmp_path):
    shallow = synthetic_llama(tmp_path / "shallow", 4, 512)
    deep = synthetic_llama(tmp_path / "deep", 14, 512)
    few, many = (grown(f, tmp_path / f"{f.name}-out", "wanda") for f in (shallow, deep))
    # Ten more blocks are 160 MiB of weights and, as bool, 40 MiB of masks.
    assert many - few < 25 * MIB


@pytest.mark.slow
def test_a_model_larger_than_the_limit_is_pruned_under_it(tmp_path):
    folder = synthetic_llama(tmp_path / "model", 26, 512)
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    headroom = weights // 2
    whole = in_fresh_process(folder, tmp_path / "whole", stream=False, headroom=headroom)
    assert whole.returncode != 0, "the limit did not bite"
    done = in_fresh_process(folder, tmp_path / "streamed", stream=True, headroom=headroom)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1])["totals"]["delivered"] == pytest.approx(0.5)


def test_masks_of_a_streamed_run_stay_on_disk(tiny_folder, tmp_path):
    import secateur
    from secateur.run.checkpoint import Checkpoint

    kept = []
    save = Checkpoint.save

    def watch(self, block, result):
        save(self, block, result)
        kept.append(result.masks)

    ids = torch.randint(4, VOCABULARY, (2, 32), generator=torch.Generator().manual_seed(0))
    settings = {"method": "wanda", "calibration": ids}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoint, "save", watch)
        streamed = secateur.prune(
            str(tiny_folder("llama")), stream=True, out=tmp_path / "a", **settings
        )
    assert len(kept) == 2
    assert all(isinstance(masks, MaskStore) for masks in kept)
    whole = secateur.prune(str(tiny_folder("llama")), out=tmp_path / "b", **settings)
    assert set(streamed.masks) == set(whole.masks)
    for name, mask in whole.masks.items():
        assert torch.equal(mask, streamed.masks[name])


def test_gradients_are_folded_one_matrix_at_a_time(monkeypatch):
    """While backward runs, never more than one matrix has a gradient."""
    from secateur.evidence import gradients
    from secateur.models.anatomy import ModelView
    from secateur.models.tiny import tiny_model

    model = tiny_model("llama", num_hidden_layers=4).requires_grad_(False)
    view = ModelView.of(model)
    alive = []
    update = GradientMoments.update

    def watched(self, gradient, **options):
        alive.append(sum(p.grad is not None for p in model.parameters()))
        update(self, gradient, **options)

    monkeypatch.setattr(GradientMoments, "update", watched)
    ids = torch.randint(4, VOCABULARY, (3, 16), generator=torch.Generator().manual_seed(1))
    sums = gradients.direct_gradients(view, ids, None, ("l1", "l2", "signed"))
    assert alive == [1] * (3 * len(list(view.matrices())))
    assert all(p.grad is None for p in model.parameters())
    assert all(m.samples == 3 for m in sums.values())


@pytest.mark.parametrize("norms", [("l1",), ("l1", "l2", "signed")])
def test_consumed_gradients_give_the_same_sums(norms):
    kept, consumed = GradientMoments(norms), GradientMoments(norms)
    for seed in range(3):
        g = torch.randn(5, 7, generator=torch.Generator().manual_seed(seed))
        before = g.clone()
        kept.update(g)
        assert torch.equal(g, before)
        consumed.update(g, consume=True)
    for norm in norms:
        assert torch.equal(kept.sums[norm], consumed.sums[norm])


@pytest.mark.parametrize("features", [1, 191, 192, 193, 400, 577])
def test_gram_by_strips_is_symmetric_and_right(features):
    x = torch.randn(50, features, generator=torch.Generator().manual_seed(features))
    total = torch.zeros(features, features)
    add_gram(total, x)
    add_gram(total, 2 * x)
    wanted = 5 * (x.double().T @ x.double())
    # The mirrored half is a copy; the halves within a strip are one product's own.
    assert (total - total.T).abs().max() <= 1e-4 * wanted.abs().max()
    torch.testing.assert_close(total.double(), wanted, rtol=1e-4, atol=1e-3)
    moments = InputMoments(features, gram=True)
    moments.update(x)
    torch.testing.assert_close(moments.diagonal, x.square().sum(0), rtol=1e-4, atol=1e-4)
