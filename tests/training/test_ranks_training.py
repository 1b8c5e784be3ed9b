"""Two gloo processes walk through the same global batches as one."""

import json
import os
import subprocess
import sys

import pytest

SCRIPT = """
import json, sys
sys.path.insert(0, sys.argv[2])
import torch
torch.set_num_threads(1)
from pathlib import Path
from secateur.models.anatomy import ModelView
from secateur.run.ranks import Ranks
from secateur.training.loop import Hook
from secateur.training.perp import perp
from secateur.training.settings import TrainSettings
from test_perp import pruned, windows
ranks = Ranks.from_environment("cpu")
view, masks = pruned("opt")
settings = TrainSettings(
    steps=8, lr=0.05, batch=6, micro_batch=2, weight_decay=0.1, optimizer="sgd",
    shard=sys.argv[4] == "shard", checkpoint_every=3,
)
class Killed(Hook):
    def after_step(self, at):
        if at.step == 5 and sys.argv[4] == "shard":
            raise ZeroDivisionError
try:
    perp(view, masks, windows(12), settings, train=json.loads(sys.argv[3]), hooks=[Killed()],
         adapter={"rank": 2} if "lora" in sys.argv[3] else {}, folder=Path(sys.argv[1]) / "folder")
except ZeroDivisionError:
    view, masks = pruned("opt")  # from step 3 on again
record = perp(
    view, masks, windows(12), settings, train=json.loads(sys.argv[3]),
    adapter={"rank": 2} if "lora" in sys.argv[3] else {}, folder=Path(sys.argv[1]) / "folder",
)
weights = torch.cat([p.detach().flatten() for p in view.model.parameters()]).double()
torch.save(weights, Path(sys.argv[1]) / f"weights-{ranks.rank}.pt")
if ranks.leads:
    (Path(sys.argv[1]) / "record.json").write_text(json.dumps(record))
"""


@pytest.mark.parametrize(
    ("train", "how"),
    [(["norms", "mask-lora"], "copy"), (["all"], "shard"),
     pytest.param(["all"], "copy", marks=pytest.mark.slow),
     pytest.param(["norms", "mask-lora"], "shard", marks=pytest.mark.slow)],
)  # fmt: skip
def test_two_processes_give_what_one_gives(tmp_path, train, how):
    """Replicated, and sharded by FSDP2 (there also killed once and taken up again)."""
    import torch

    here = os.path.dirname(__file__)
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    made = {}
    for world in (1, 2):
        out = tmp_path / str(world)
        out.mkdir()
        launch = [sys.executable]
        if world > 1:
            launch += ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0",
                       "--standalone"]  # fmt: skip
        done = subprocess.run(
            [*launch, str(script), str(out), here, json.dumps(train), how],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": _path()},
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        made[world] = [torch.load(out / f"weights-{r}.pt") for r in range(world)]
        rows = [json.loads(x) for x in (out / "folder" / "metrics.jsonl").open()]
        made[world].append([row["loss"] for row in rows])
    assert torch.equal(made[2][0], made[2][1])  # both ranks hold the same model
    assert made[2][2] == pytest.approx(made[1][1], rel=1e-4)
    # Plain SGD: AdamW divides by the root of tiny second moments, which enlarges a rounding.
    assert torch.allclose(made[2][0], made[1][0], atol=1e-5)


LEARNING = """
import sys
sys.path.insert(0, sys.argv[2])
import torch
torch.set_num_threads(1)
from pathlib import Path
from secateur.run.ranks import Ranks
from secateur.training.loop import Hook, fit
from test_maskllm import IDS, Windows, attached, magnitude_masks, settings
from secateur.models.anatomy import ModelView
from secateur.models.tiny import tiny_model
ranks = Ranks.from_environment("cpu")
model = tiny_model("llama")
masks = attached(model, prior=magnitude_masks(ModelView.of(model)))
class Noted(Hook):
    keys = []
    def before_forward(self, at):
        self.keys.extend(m.draw.key for m in masks.modules.values())
how = settings(steps=3, micro_batch=1, lr=2e-2)
fit(model, Windows(IDS), how, loss=masks.loss(), hooks=[masks, Noted()], folder=Path(sys.argv[1]) / "run")
logits = [m.mask_logits.detach() for m in masks.modules.values()]
changed = masks.moved[-1][1]
torch.save((logits, masks.detach(), Noted.keys, changed), f"{sys.argv[1]}/{ranks.rank}.pt")
"""


def test_two_processes_learn_one_mask_from_different_draws(tmp_path):
    import torch

    script = tmp_path / "script.py"
    script.write_text(LEARNING)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone",
         "--master-port", "0", str(script), str(tmp_path), os.path.dirname(__file__)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": _path()},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = (torch.load(tmp_path / f"{r}.pt") for r in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one[0], two[0], strict=True))
    assert all(torch.equal(mask, two[1][name]) for name, mask in one[1].items())
    assert one[3] > 0.01  # the masks have moved
    # 3 steps of 2 forwards in each: no draw is made twice, in one process or in both.
    assert len(one[2]) == len(two[2]) == 3 * 2 * len(one[0])
    assert len({*one[2], *two[2]}) == 2 * len(one[2])


def _path():
    return os.pathsep.join(p for p in sys.path if p)
