"""Runs on vision networks, end to end on scikit-learn's digits."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import secateur
from secateur.cli import main
from secateur.errors import SecateurError, UsageError, VerificationError
from secateur.methods import methods
from secateur.methods.vision_base import VisionJob, VisionMethod, VisionOutcome
from secateur.models.vision.loading import load_vision
from secateur.run.verifying import verify_run
from secateur.training import images as training_images
from secateur.training.hooks import Hook, Training

pytest.importorskip("sklearn")
pytest.importorskip("accelerate")

SMALL: dict[str, Any] = {
    "model_options": {"width": 6, "blocks": 1},
    "pretraining": {"steps": 40, "lr": 0.1, "batch": 32},
    "evaluation": {"speed": False},
    "recalibrate": 5,
}


def prune(out: Path | None = None, **changes: Any) -> Any:
    settings = {**SMALL, "method": "channel-l2", "target": 0.4, **changes}
    model = settings.pop("model", "resnet")
    images = settings.pop("images", "digits")
    return secateur.prune_vision(model, images, out=out, **settings)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: Any) -> Path:
    """A trained network's folder, from which the others are pruned."""
    folder = tmp_path_factory.mktemp("vision") / "dense"
    prune(folder, target=0.0, pretraining={"steps": 120, "lr": 0.1, "batch": 32}, recalibrate=0)
    return folder


def quick(dense: Path, out: Path | None = None, **changes: Any) -> Any:
    return prune(out, model=str(dense), model_options={}, pretraining=None, **changes)


def test_nothing_goes_at_zero(dense: Path) -> None:
    report = json.loads((dense / "report.json").read_text())
    assert report["totals"]["delivered"] == 0
    assert report["quality"]["agreement"] == 1.0
    assert report["quality"]["pruned"]["accuracy"] > 0.85


def test_a_run_delivers_what_was_asked_and_proves_it(dense: Path, tmp_path: Path) -> None:
    out = tmp_path / "half"
    result = quick(dense, out, target="40%", training={"steps": 30, "lr": 0.02, "batch": 32})
    report = result.report
    assert 0.4 <= report["totals"]["delivered"] < 0.5
    assert report["flops"]["after"] <= 0.6 * report["flops"]["before"]
    quality = report["quality"]
    assert quality["pruned"]["accuracy"] > quality["cut"]["accuracy"]
    assert quality["pruned"]["accuracy"] > 0.8
    assert quality["dense"]["images"] == 359
    sizes = {row["name"]: (row["before"], row["after"]) for row in report["groups"]}
    assert sizes["fc"] == (10, 10)
    page = (out / "report.html").read_text()
    assert "stages.1.0.conv1" in page
    assert "<svg" in page
    assert "batch norms measured anew" in (out / "report.md").read_text()
    found = verify_run(out)
    assert found["verified"]
    again = load_vision(out)
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(again.model(x), result.model(x))
    assert sum(p.numel() for p in again.model.parameters()) == report["parameters"]["after"]


@pytest.mark.parametrize("method", ["channel-l1", "channel-fpgm", "channel-random"])
@pytest.mark.parametrize("kind", ["parameters", "channels"])
def test_every_baseline_reaches_every_kind_of_target(dense: Path, method: str, kind: str) -> None:
    report = quick(dense, method=method, target_kind=kind, target=0.3).report
    assert 0.3 <= report["totals"]["delivered"] < 0.45
    assert report["totals"]["kind"] == kind
    assert {row["name"] for row in report["layers"]} >= {"conv1", "stages.2.0.conv2"}


def test_protected_groups_and_a_global_ranking(dense: Path) -> None:
    report = quick(
        dense, structure={"protect": ["stages.0.*"], "ranking": "global", "at_least": 2}
    ).report
    rows = {row["name"]: row for row in report["groups"]}
    assert rows["stages.0.0.conv1"]["before"] == rows["stages.0.0.conv1"]["after"]
    assert rows["stages.0.0.conv1"]["reason"] == "is protected"
    left = [row["after"] / row["before"] for row in report["groups"] if row["prunable"]]
    assert max(left) - min(left) > 0.05  # not the same share everywhere
    assert min(row["after"] for row in report["groups"]) >= 2


def test_a_transformer_loses_heads_and_channels(tmp_path: Path) -> None:
    report = prune(
        tmp_path / "vit",
        model="vit",
        model_options={"patch": 4, "width": 16, "depth": 2},
        pretraining={"steps": 5, "optimizer": "adamw", "lr": 1e-3, "batch": 16},
        target=0.3,
    ).report
    gone = {row["kind"] for row in report["groups"] if row["after"] < row["before"]}
    assert gone == {"channel", "head"}
    assert verify_run(tmp_path / "vit")["verified"]


def test_the_same_command_again_changes_nothing(dense: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"training": {"steps": 4, "batch": 16}}
    quick(dense, tmp_path / "a", **settings)
    first = (tmp_path / "a" / "model.safetensors").read_bytes()
    quick(dense, tmp_path / "a", **settings)
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == first
    with pytest.raises(UsageError, match="holds a run with"):
        quick(dense, tmp_path / "a", target=0.3, **settings)


class Killed(Exception):
    """What a signal would do."""


@pytest.mark.parametrize("when", ["pretraining", "cut", "training"])
def test_a_killed_run_goes_on(when: str, tmp_path: Path, monkeypatch: Any) -> None:
    settings: dict[str, Any] = {
        "pretraining": {"steps": 8, "batch": 16, "checkpoint_every": 2},
        "training": {"steps": 8, "batch": 16, "checkpoint_every": 2, "distil": 0.5},
    }
    prune(tmp_path / "whole", **settings)
    with monkeypatch.context() as patched:
        if when == "cut":
            from secateur.run import vision

            def die(*_: Any, **__: Any) -> None:
                raise Killed

            patched.setattr(vision, "recalibrate_images", die)
        else:
            fit = training_images.fit

            class Die(Hook):
                def after_step(self, at: Training) -> None:
                    if at.step == 5:
                        raise Killed

            def dying(*args: Any, hooks: Any, label: str, **words: Any) -> Any:
                late = (when == "training") == (label == "tuning")
                return fit(*args, hooks=[*hooks, Die()] if late else hooks, label=label, **words)

            patched.setattr(training_images, "fit", dying)
        with pytest.raises(Killed):
            prune(tmp_path / "cut", **settings)
    assert not (tmp_path / "cut" / "vision.json").exists()
    prune(tmp_path / "cut", **settings)
    whole, again = (tmp_path / name / "model.safetensors" for name in ("whole", "cut"))
    assert whole.read_bytes() == again.read_bytes()
    events = (tmp_path / "cut" / "secateur" / "events.jsonl").read_text()
    assert ('"stage": "cut"' in events) == (when != "pretraining")


# -- methods of other kinds ------------------------------------------------------------------------


@dataclass(frozen=True)
class HalfZero(VisionMethod):
    """Zeroes the smaller half of every 3 x 3 kernel's weights."""

    name = "half-zero"
    summary = "for tests"
    targets = ("weights",)

    def prune(self, job: VisionJob) -> VisionOutcome:
        masks = {}
        for name, weight in job.model.named_parameters():
            if weight.dim() == 4 and weight.shape[-1] == 3:
                count = round(job.target.share * weight.numel())
                gone = torch.zeros(weight.numel(), dtype=torch.bool)
                gone[weight.detach().abs().flatten().argsort()[:count]] = True
                masks[name] = gone.view(weight.shape)
                weight.data[masks[name]] = 0
        return VisionOutcome(masks=masks, record={"kernels": len(masks)})


@pytest.fixture
def half_zero(monkeypatch: Any) -> str:
    monkeypatch.setattr(methods, "_table", dict(methods._table) | {"half-zero": HalfZero})
    return "half-zero"


def test_single_weights_stay_zero_through_training_and_on_disk(
    dense: Path, half_zero: str, tmp_path: Path
) -> None:
    training = {"steps": 6, "batch": 16, "lr": 0.1, "weight_decay": 0.1}
    result = quick(dense, tmp_path / "m", method=half_zero, target=0.5, training=training)
    assert result.report["totals"]["delivered"] == pytest.approx(0.5, abs=0.01)
    weights = dict(load_vision(tmp_path / "m").model.named_parameters())
    for name, mask in result.masks.items():
        assert bool((weights[name][mask] == 0).all())
        assert bool((weights[name][~mask] != 0).any())
    assert "kernels" in (tmp_path / "m" / "report.md").read_text()
    checks = verify_run(tmp_path / "m")["checks"]
    assert any("exactly zero" in line for line in checks)
    with pytest.raises(UsageError, match="single weights"):
        quick(tmp_path / "m")
    with pytest.raises(UsageError, match="count its target"):
        quick(dense, method=half_zero, target_kind="flops")


def test_tampering_is_found(dense: Path, half_zero: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    out = tmp_path / "t"
    quick(dense, out, method=half_zero, target=0.5)
    state = load_file(out / "model.safetensors")
    name = next(n for n, t in state.items() if t.dim() == 4)
    changed = {n: t.clone() for n, t in state.items()}
    changed[name][changed[name] == 0] = 1e-3
    save_file(changed, out / "model.safetensors")
    with pytest.raises(VerificationError, match="should be gone"):
        verify_run(out)
    changed = {n: t + (0.1 if n == "fc.bias" else 0) for n, t in state.items()}
    changed["fc.bias"][0] += 5
    save_file(changed, out / "model.safetensors")
    with pytest.raises(VerificationError, match="differs"):
        verify_run(out)


# -- networks and images in memory, and what is refused --------------------------------------------


def tiny() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 3)
    )


def pairs(count: int = 12, classes: int = 3, side: int = 8) -> list[tuple[torch.Tensor, int]]:
    return [(torch.rand(1, side, side), n % classes) for n in range(count)]


def test_a_network_in_memory_is_pruned_in_place(tmp_path: Path) -> None:
    model = tiny()
    result = secateur.prune_vision(
        model, pairs(), target=0.5, out=tmp_path / "m", evaluation={"speed": False}
    )
    assert result.model is model
    assert model[0].out_channels < 8
    assert result.report["reopened"]["loaded"] is False
    assert any("trained on" in note for note in result.report["notes"])
    from secateur.models.vision.loading import fill

    x = torch.rand(2, 1, 8, 8)
    assert torch.equal(fill(tiny(), tmp_path / "m")(x), model(x))
    assert verify_run(tmp_path / "m")["verified"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "resnt"}, "did you mean 'resnet'"),
        ({"images": "digtis"}, "did you mean 'digits'"),
        ({"target": 1.0}, "in \\[0, 1\\)"),
        ({"target": "half"}, "in \\[0, 1\\)"),
        ({"target": 0.999}, "at most"),
        ({"pretraining": None}, "random weights"),
        ({"method": "wanda"}, "language models"),
        ({"method": "chanel-l1"}, "did you mean 'channel-l1'"),
        ({"structure": {"protect": ["nothing*"]}}, "names no group"),
        ({"structure": {"protekt": []}}, "did you mean 'protect'"),
        ({"structure": {"kinds": ["head"]}}, "no group of channels can lose"),
        ({"training": {"epochs": 1, "steps": 2}}, "two lengths"),
        ({"options": {"norm": 3}}, "no such option"),
        ({"preprocess": {"mena": [1]}}, "mena"),
        ({"evaluation": {"images": "nowhere"}}, "neither a folder nor"),
        ({"model_options": {"channels": 3}}, "does not run on its example"),
        ({"model_options": {"classes": 4}}, "knows 4 classes, the images have 10"),
    ],
)
def test_bad_requests_are_refused_before_anything_is_written(
    changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(SecateurError, match=words):
        prune(tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


def test_networks_of_transformers_are_pruned_in_memory() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(
        num_channels=1, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=3
    )
    model = transformers.ResNetForImageClassification(config)
    training = {"steps": 2, "batch": 4, "distil": 0.5}
    report = secateur.prune_vision(model, pairs(side=32), target=0.4, training=training).report
    assert report["totals"]["delivered"] >= 0.4


def test_a_network_that_gives_no_classes_is_refused() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 3, 3)

        def forward(self, x: torch.Tensor) -> Any:
            return self.conv(x), 1

    with pytest.raises(UsageError, match="no logits in it"):
        secateur.prune_vision(Pair(), pairs(), target=0.5)
    with pytest.raises(UsageError, match="a classifier"):
        secateur.prune_vision(nn.Conv2d(1, 3, 3), pairs(), target=0.5)


def test_the_command_line_speaks_of_accuracy(dense: Path, tmp_path: Path, capsys: Any) -> None:
    out = str(tmp_path / "cli")
    words = ["prune", str(dense), "--images", "digits", "--target", "30%", "--no-speed", "-o", out]
    assert main(words) == 0
    assert "accuracy" in capsys.readouterr().out
    for rest in (["verify", out], ["report", out], ["eval", out, "--images", "digits"]):
        assert main(rest) == 0, capsys.readouterr().err
    assert main(["eval", out, "--images", "digits", "--dense", str(dense), "--json"]) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert 0 <= record["agreement"] <= 1
    assert main(["why", "stages.1.0.conv1", "--run", out]) == 0
    assert "ranked by channel-l2" in capsys.readouterr().out
    assert main(["why", "stages", "--run", out]) == 0
    assert main(["why", "nothing", "--run", out]) == 2
    target = str(tmp_path / "weights.safetensors")
    assert main(["export", out, "--format", "state-dict", "-o", target]) == 0
    for wrong, field in (
        (["prune", str(dense), "-o", out], "images"),
        (["prune", str(dense), "--images", "digits", "--quality", "best", "-o", out], "quality"),
        (["prune", "tiny", "--target", "30%", "-o", out], "target"),
        (["export", out, "--format", "gguf", "-o", target], "format"),
        (["export", out, "--format", "state-dict", "-o", str(tmp_path / "w.pt")], "out"),
        (["eval", "resnet", "--images", "digits"], "model"),
        (["eval", out], "model"),
        (["recover", out, "-o", str(tmp_path / "no")], "model"),
        (["plan", "mobilenet", "-s", "0.5"], "model"),
        (["eval", out, "--images", "digits", "--speed"], "dense"),
    ):
        assert main([*wrong, "--json"]) == 2
        error = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert error["field"] == field
        assert "the hub" not in error["error"]


def test_a_recipe_with_images_is_a_vision_run(tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "model: mobilenet\nmodel_options: {width: 4}\nimages: digits\ntarget: 30%\n"
        "pretraining: {steps: 4}\nevaluation: {speed: false, limit: 50}\n"
    )
    assert main(["run", str(path), "--out", str(tmp_path / "out"), "--json"]) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record["totals"]["delivered"] >= 0.3
    assert record["quality"]["pruned"]["images"] == 50
    path.write_text("model: mobilenet\nimages: digits\nsparsity: 0.5\n")
    assert main(["run", str(path), "--out", str(tmp_path / "no"), "--json"]) == 2
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["field"] == "sparsity"


def test_a_folder_of_pictures_from_the_command_line(tmp_path: Path, capsys: Any) -> None:
    image = pytest.importorskip("PIL.Image")
    for name, shade in (("dark", 40), ("light", 200)):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for number in range(15):
            array = torch.full((12, 16, 3), shade + number, dtype=torch.uint8).numpy()
            image.fromarray(array).save(tmp_path / "pictures" / name / f"{number}.png")
    words = ["prune", "resnet", "--images", str(tmp_path / "pictures"), "--target", "30%"]
    words += ["--preprocess", "resize=10", "--preprocess", "crop=8", "--model-option", "width=4"]
    words += ["--pretrain", "steps=20", "--pretrain", "batch=8", "--no-speed", "--json"]
    assert main([*words, "-o", str(tmp_path / "out")]) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record["images"]["train"]["shape"] == [3, 8, 8]
    assert record["quality"]["dense"]["accuracy"] > 0.6
    assert main(["eval", str(tmp_path / "out"), "--images", str(tmp_path / "pictures")]) == 0
    assert main([*words[:6], "-o", str(tmp_path / "no"), "--preprocess", "filter=odd"]) == 2


def test_methods_are_compared_from_one_dense_network(tmp_path: Path, capsys: Any) -> None:
    words = ["compare", "resnet", "--images", "digits", "--model-option", "width=6"]
    words += ["--model-option", "blocks=1", "--pretrain", "steps=30", "--no-speed", "--json"]
    words += ["-m", "channel-l2,channel-random", "-s", "20%,40%", "-o", str(tmp_path / "table")]
    assert main(words) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    for cells in record["cells"].values():
        assert 0.2 <= cells["20%"]["delivered"] < 0.3
        assert 0.4 <= cells["40%"]["delivered"] < 0.5
    before = (tmp_path / "table" / "channel-l2-40" / "report.json").stat().st_mtime_ns
    assert main([*words[:-3], "20%,40%", *words[-2:]]) == 0  # finished cells are only read
    assert (tmp_path / "table" / "channel-l2-40" / "report.json").stat().st_mtime_ns == before
    assert "channel-random" in (tmp_path / "table" / "report.md").read_text()
    assert main([*words[:-5], "wanda", *words[-4:-1], str(tmp_path / "other")]) == 2


def test_onnx_computes_the_same(dense: Path, tmp_path: Path) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    from secateur.run.exporting import export

    record = export(dense, "onnx", tmp_path / "net.onnx")
    assert record["verified"]
    assert record["relative"] < 1e-4


def test_a_folder_of_one_class_is_refused_and_an_empty_class_is_told(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    folder = tmp_path / "set"
    for number in range(10):
        (folder / "a").mkdir(parents=True, exist_ok=True)
        image.new("L", (8, 8), 20 * number).save(folder / "a" / f"{number}.png")
    scale = {"preprocess": {"resize": 8, "crop": 8}, "images": str(folder)}
    with pytest.raises(UsageError, match="one class, 'a'"):
        prune(**scale)
    (folder / "b").mkdir()
    notes = prune(**scale, pretraining={"steps": 1, "batch": 4}).report["notes"]
    assert "no training image shows b" in notes
