"""Vision runs on two gloo processes: what one gives, the same masks on both, one writer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import secateur
from secateur.errors import UsageError
from secateur.models.vision.loading import load_vision

pytest.importorskip("sklearn")
pytest.importorskip("accelerate")

SETTINGS: dict[str, dict[str, Any]] = {
    "s2hpruner": {
        "method": "s2hpruner", "target": 0.5, "training": {"steps": 12, "lr": 0.05, "batch": 32},
    },
    "channel-l2": {
        "method": "channel-l2", "target": 0.3, "pretraining": {"steps": 6, "batch": 32},
        "training": {"steps": 4, "batch": 32, "distil": 0.5},
    },
}  # fmt: skip
PROGRAM = """
import json, os, sys, torch
torch.set_num_threads(1)
import secateur
result = secateur.prune_vision("vit", "digits", out=sys.argv[1], **json.loads(sys.argv[2]))
rank = os.environ["RANK"]
state = {n: t.contiguous() for n, t in result.model.state_dict().items()}
torch.save((state, result.structure.record(), bool(result.report)), f"{sys.argv[1]}-{rank}.pt")
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


def settings_of(method: str) -> dict[str, Any]:
    # Without batch norms two halves of a batch are the batch.
    return {
        "model_options": {"patch": 4, "width": 16, "depth": 1, "heads": 4},
        "evaluation": {"speed": False}, **SETTINGS[method],
    }  # fmt: skip


@pytest.mark.parametrize("method", list(SETTINGS))
def test_two_processes_give_what_one_gives_and_one_writes(tmp_path: Path, method: str) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    settings = settings_of(method)
    for _ in range(2):  # a busy machine can lose a connection of gloo's
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone",
             str(tmp_path / "program.py"), str(tmp_path / "two"), json.dumps(settings)],
            env={**os.environ, "OMP_NUM_THREADS": "1",
                 "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        if done.returncode == 0:
            break
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"two-{rank}.pt") for rank in (0, 1))
    assert first[0].keys() == second[0].keys()
    assert all(torch.equal(second[0][name], value) for name, value in first[0].items())
    assert json.dumps(first[1]) == json.dumps(second[1])  # the masks
    assert (first[2], second[2]) == (True, False)
    one = secateur.prune_vision("vit", "digits", **settings)
    report = json.loads((tmp_path / "two" / "report.json").read_text())
    assert report["groups"] == one.report["groups"]
    assert report["reopened"]["loaded"]
    saved = load_vision(tmp_path / "two").model.state_dict()
    for name, value in one.model.state_dict().items():
        assert torch.allclose(saved[name], value, atol=2e-3), name


def test_several_processes_need_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    from secateur.run import vision
    from secateur.run.ranks import Ranks

    monkeypatch.setattr(vision.Ranks, "from_environment", lambda device: Ranks(0, 2))
    with pytest.raises(UsageError, match="in a folder"):
        secateur.prune_vision("vit", "digits", **settings_of("s2hpruner"))
