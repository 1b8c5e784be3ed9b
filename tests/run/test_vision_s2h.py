"""S2HPruner in a run: from a name to a report, killed and taken up again, refused before any work."""

import json

import pytest
import torch
from torch import nn

import secateur
from secateur.errors import UsageError
from secateur.report.widths import pictures
from secateur.training import s2hpruner

pytest.importorskip("sklearn")
pytest.importorskip("accelerate")


def prune(out=None, **changes):
    settings = {
        "method": "s2hpruner", "target": 0.5, "model_options": {"width": 6, "blocks": 1},
        "training": {"steps": 30, "lr": 0.1, "batch": 32, "checkpoint_every": 5},
        "evaluation": {"speed": False}, **changes,
    }  # fmt: skip
    return secateur.prune_vision(settings.pop("model", "resnet"), "digits", out=out, **settings)


def test_a_run_delivers_its_flops_and_says_how_the_widths_went(tmp_path, monkeypatch):
    real = s2hpruner.LearnedWidths.after_step

    def killed(self, at):
        real(self, at)
        if at.step == 17:
            raise KeyboardInterrupt

    monkeypatch.setattr(s2hpruner.LearnedWidths, "after_step", killed)
    with pytest.raises(KeyboardInterrupt):
        prune(tmp_path / "again")
    monkeypatch.undo()
    again, whole = prune(tmp_path / "again"), prune(tmp_path / "whole")
    state = whole.model.state_dict()
    assert all(torch.equal(again.model.state_dict()[name], value) for name, value in state.items())
    report = json.loads((tmp_path / "again" / "report.json").read_text())
    assert report["reopened"]["loaded"]
    assert abs(report["totals"]["delivered"] - 0.5) <= 0.011
    assert report["training"] is None  # nothing is tuned after the cut
    record = report["method"]
    assert record["within"]
    assert record["gap"]["images"] == 1024
    learned = {row["name"]: row["after"] for row in report["layers"]}
    counted = {row["name"]: row["after"] for row in report["groups"]}
    assert all(counted[name] == width for name, width in learned.items())
    drawn = pictures(report)
    assert [heading for heading, _, _ in drawn] == [
        "Widths over the training", "Soft and hard network", "FLOPs against the target",
    ]  # fmt: skip
    assert "cut" not in report["quality"]  # it is what was delivered
    assert not report["model"]["trained"]
    page = (tmp_path / "again" / "report.html").read_text()
    # Accuracy of random weights is nobody's dense accuracy.
    assert "before training, random weights" in page
    assert "Both networks give the same answer" not in page
    assert "Training of weights and widths" in page
    assert all(heading in page for heading, _, _ in drawn)


def test_a_training_too_short_for_its_widths_is_told():
    report = prune(training={"steps": 6, "batch": 32}, target=0.6).report
    assert report["method"]["frozen_from"] > 0.6
    assert any("without a look at images" in note for note in report["notes"])


def test_plain_mask_training_has_no_gap_to_draw():
    report = prune(options={"distillation": "none"}).report
    assert [heading for heading, _, _ in pictures(report)] == [
        "Widths over the training", "FLOPs against the target",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("training", {"training": None}),
        ("training.distil", {"training": {"steps": 2, "distil": 0.5}}),
        ("structure.ranking", {"structure": {"ranking": "global"}}),
        ("flops", {"target": 0.999}),
        ("freeze", {"options": {"freeze": 0.97}}),
        ("distillation", {"options": {"distillation": "t7"}}),
        ("tua", {"options": {"tua": 1.0}}),
        # ... also before the dense network is trained.
        ("init_share", {"options": {"init": "min-norm", "init_share": 0.01},
                        "pretraining": {"steps": 10**6}}),
        ("resolutions", {"options": {"resolutions": [0.5, 1.0]}, "pretraining": {"steps": 10**6},
                         "model": "vit", "model_options": {"patch": 4}}),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_any_work(tmp_path, field, changes):
    with pytest.raises(UsageError) as error:
        prune(tmp_path / "out", **changes)
    assert error.value.field == field
    assert error.value.fix
    assert not (tmp_path / "out").exists()


class Remembers(nn.Module):
    """Keeps what it saw last, as networks do to be looked into."""

    def __init__(self):
        super().__init__()
        self.conv, self.last = nn.Conv2d(1, 8, 3), nn.Linear(8, 10)
        self.seen, self.all = None, []

    def forward(self, x):
        self.seen = torch.relu(self.conv(x))
        self.all.append(self.seen)
        return self.last(self.seen.mean((2, 3)))


@pytest.mark.parametrize("method", ["s2hpruner", "channel-l2"])
def test_a_network_may_remember_its_activations(method):
    quick = {"steps": 3, "batch": 8}
    result = secateur.prune_vision(
        Remembers(), "digits", method=method, target=0.4, pretraining=quick, training=quick,
        evaluation={"speed": False},
    )  # fmt: skip
    assert result.report["totals"]["delivered"] > 0.3
