"""Masks on two gloo processes: those of one process, the same on both, and refused when they part."""

import os
import subprocess
import sys

import torch
from test_s2hpruner import settings, some_images
from torch import nn

from secateur.errors import SecateurError
from secateur.models.channel_graph import channel_groups
from secateur.training.hooks import Hook
from secateur.training.loop import fit
from secateur.training.s2h_options import Learning
from secateur.training.s2hpruner import LearnedWidths

SCRIPT = """
import sys
sys.path.insert(0, sys.argv[2])
import torch
torch.set_num_threads(1)
from secateur.run.ranks import Ranks
from test_s2h_ranks import trained
ranks = Ranks.from_environment("cpu")
out = trained(ranks.rank) | {"error": trained(ranks.rank, parted=True)}
torch.save(out, f"{sys.argv[1]}/made-{ranks.rank}.pt")
ranks.barrier()  # a process that leaves early resets what the other still reads
torch.distributed.destroy_process_group()
"""


def trained(rank, parted=False):
    """Masks, weights and widths after a few steps; the error's text if there was one."""
    torch.manual_seed(rank)  # another start on each: the first one's masks hold for all
    images = some_images()

    class Parted(Hook):
        def before_forward(self, at):
            if parted and rank == 1 and at.step == 6:
                widths.logits["1"].data[0] += 0.5

    # No batch norm: its statistics are those of each process's own images.
    net = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4)
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    options = Learning(flops=0.5, lr=0.02, momentum=0.5, init="normal", seed=rank)
    widths = LearnedWidths(net, channel_groups(net, images.example), options)
    try:
        fit(net, images, settings(micro_batch=3), loss=widths.loss(), hooks=[widths, Parted()])
    except SecateurError as error:
        return str(error)
    return {
        "masks": torch.cat(list(widths.logits.values())).detach(),
        "weights": torch.cat([p.detach().flatten() for p in net.parameters()]),
        "widths": list(widths.chosen().values()),
    }


def test_two_processes_learn_the_widths_of_one_and_refuse_masks_that_part(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    for _ in range(
        2
    ):  # a busy machine can lose a connection of gloo's; what is learnt is judged below
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone",
             str(script), str(tmp_path), os.path.dirname(__file__)],
            env={**os.environ, "OMP_NUM_THREADS": "1",
                 "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        if done.returncode == 0:
            break
    assert done.returncode == 0, done.stderr[-2000:]
    alone = trained(0)
    first, second = (torch.load(tmp_path / f"made-{rank}.pt") for rank in (0, 1))
    assert torch.equal(first["masks"], second["masks"])
    assert torch.equal(first["weights"], second["weights"])
    assert first["widths"] == alone["widths"]
    assert torch.allclose(first["masks"], alone["masks"], atol=1e-3)
    assert torch.allclose(first["weights"], alone["weights"], atol=1e-4)
    for made in (first, second):
        assert "not the same on every process" in made["error"]
