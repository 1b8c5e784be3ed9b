"""The training loop: exact resume, processes, schedules, early stop, NaN; masks that stay."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from secateur.data.batches import Shuffled
from secateur.data.windows import Windows, training_windows
from secateur.errors import NumericsError, UsageError
from secateur.models.anatomy import ModelView
from secateur.models.tiny import tiny_model, tiny_tokenizer
from secateur.training import checkpoint, loop, precision
from secateur.training.loop import Hook, fit, next_token_loss
from secateur.training.masked import KeepZeros, check_masks, masks_from_zeros, prove_zeros
from secateur.training.settings import TrainSettings


def windows(count=24, length=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Windows(torch.randint(4, 260, (count, length), generator=generator))


def vectors(model):
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.dim() == 1)
    return model


def states_equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.values(), other.values(), strict=True))


# -- settings and data ---------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_rate_rises_then_falls_and_is_never_zero(schedule):
    settings = TrainSettings(steps=40, lr=2.0, warmup=0.25, schedule=schedule)
    rates = [settings.rate(s) for s in range(40)]
    assert min(rates) > 0
    assert rates[9] == max(rates) == 2.0
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)


@pytest.mark.parametrize(
    "change",
    [{"steps": 0}, {"lr": -1.0}, {"batch": 0}, {"warmup": 1.5}, {"clip": -1.0},
     {"schedule": "wave"}, {"precision": "fp8"}, {"lr": math.nan}, {"optimizer": "adam"}],
)  # fmt: skip
def test_settings_name_what_is_wrong(change):
    with pytest.raises(UsageError) as caught:
        TrainSettings(**change)
    assert caught.value.field == next(iter(change))


def test_every_pass_is_another_permutation():
    order = Shuffled(windows(7), seed=3)
    passes = [order.rows(7 * turn, 7) for turn in range(4)]
    assert all(sorted(p) == list(range(7)) for p in passes)
    assert len({tuple(p) for p in passes}) > 1
    assert order.rows(5, 6) == (passes[0] + passes[1])[5:11]


def test_text_shorter_than_a_window_is_refused():
    with pytest.raises(UsageError, match="tokens"):
        training_windows(["too short"], tiny_tokenizer(), 100, 64)


# -- the loop ------------------------------------------------------------------------------------


def test_it_learns_and_restores_what_is_not_its_own():
    model = vectors(tiny_model("opt"))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    fitted = fit(model, windows(4), TrainSettings(steps=30, lr=1e-2))
    assert torch.equal(torch.rand(3), expected)
    assert fitted.losses[-1] < fitted.losses[0] - 0.1
    assert fitted.trained == sum(p.numel() for p in model.parameters() if p.dim() == 1)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert not torch.equal(parameter, before[name]), name
        else:
            assert parameter.grad is None
            assert torch.equal(parameter, before[name]), name


def test_optimizer_holds_state_of_the_trained_only():
    seen = {}

    class Look(Hook):
        def end(self, at):
            state = at.optimizer.state
            seen["bytes"] = sum(
                t.nbytes for s in state.values() for k, t in s.items() if k != "step"
            )

    fitted = fit(vectors(tiny_model("opt")), windows(), TrainSettings(steps=2), hooks=[Look()])
    assert seen["bytes"] == 8 * fitted.trained  # two float32 moments


def test_accumulation_changes_nothing():
    whole, parts = vectors(tiny_model("gpt2")), vectors(tiny_model("gpt2"))
    one = fit(whole, windows(), TrainSettings(steps=6, batch=6))
    two = fit(parts, windows(), TrainSettings(steps=6, batch=6, micro_batch=2))
    assert one.losses == pytest.approx(two.losses, rel=1e-5)


def test_padding_does_not_count_whatever_the_split():
    data = windows(8)
    mask = torch.ones_like(data.ids, dtype=torch.bool)
    mask[::2, 5:] = False
    padded = Windows(data.ids, mask)
    losses = [
        fit(
            vectors(tiny_model("llama")), padded, TrainSettings(steps=3, batch=4, micro_batch=m)
        ).losses
        for m in (4, 1)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0] != pytest.approx(
        fit(vectors(tiny_model("llama")), data, TrainSettings(steps=3, batch=4)).losses, rel=1e-5
    )


class Noisy(Hook):
    """Draws at random in every step and keeps a count, as MaskLLM will."""

    def __init__(self):
        self.count = torch.zeros(1)

    def before_forward(self, at):
        self.noise = torch.rand(())

    def after_step(self, at):
        self.count += self.noise

    def state(self):
        return {"count": self.count}

    def restore(self, state, at):
        self.count = state["count"]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_resume_is_exact(tmp_path, optimizer):
    settings = TrainSettings(
        steps=12, optimizer=optimizer, checkpoint_every=4, weight_decay=0.1, validate_every=3,
        patience=9,
    )  # fmt: skip

    def run(folder, stop_at=None, hook=None):
        model = vectors(tiny_model("opt"))

        class Stop(Hook):
            def after_step(self, at):
                if at.step == stop_at:
                    raise RuntimeError("killed")

        hook = hook or Noisy()

        def validate():
            with torch.no_grad():
                return float(next_token_loss(model, batch))

        from secateur.training.loop import Batch

        batch = Batch(windows(2, seed=9).ids)
        fitted = fit(
            model, windows(), settings, hooks=[hook, Stop()], folder=folder, validate=validate
        )
        return model, fitted, hook

    whole, expected, counted = run(tmp_path / "whole")
    with pytest.raises(RuntimeError):
        run(tmp_path / "killed", stop_at=10)
    resumed, fitted, recounted = run(tmp_path / "killed")
    assert fitted.resumed == 8
    assert fitted.losses == expected.losses
    assert fitted.validations == expected.validations
    assert states_equal(resumed.state_dict(), whole.state_dict())
    assert torch.equal(counted.count, recounted.count)
    rows = [json.loads(x) for x in (tmp_path / "killed" / checkpoint.METRICS).open()]
    assert [r["step"] for r in rows if "loss" in r] == list(range(1, 13))
    again, fitted, _ = run(tmp_path / "killed")  # a finished one is taken as it is
    assert fitted.losses == expected.losses
    assert states_equal(again.state_dict(), whole.state_dict())


SCRIPT = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import torch
torch.set_num_threads(1)
from test_loop import vectors, windows
from secateur.models.tiny import tiny_model
from secateur.training.loop import Hook, fit
from secateur.training.settings import TrainSettings
class Slow(Hook):
    def after_step(self, at):
        time.sleep(0.05)
model = vectors(tiny_model("opt"))
fit(model, windows(), TrainSettings(steps=30, checkpoint_every=3), folder=Path(sys.argv[1]), hooks=[Slow()])
"""


@pytest.mark.parametrize(
    "how", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_killed_process_goes_on_with_identical_losses(tmp_path, how):
    folder = tmp_path / "killed"
    command = [sys.executable, "-c", SCRIPT, str(folder), os.path.dirname(__file__)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    metrics = folder / checkpoint.METRICS
    limit = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") >= 8):
        assert time.monotonic() < limit
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(how)
    process.wait(60)
    assert process.returncode != 0
    settings = TrainSettings(steps=30, checkpoint_every=3)
    resumed, whole = vectors(tiny_model("opt")), vectors(tiny_model("opt"))
    again = fit(resumed, windows(), settings, folder=folder)
    assert 0 < again.resumed < 30
    assert again.losses == fit(whole, windows(), settings).losses
    assert states_equal(resumed.state_dict(), whole.state_dict())


def test_resume_with_other_settings_is_refused(tmp_path):
    fit(vectors(tiny_model("opt")), windows(), TrainSettings(steps=2), folder=tmp_path)
    for change, field in (({"lr": 1e-5}, "lr"), ({"steps": 3}, "steps")):
        with pytest.raises(UsageError) as caught:
            fit(
                vectors(tiny_model("opt")), windows(), TrainSettings(**{"steps": 2, **change}),
                folder=tmp_path,
            )  # fmt: skip
        assert caught.value.field == field
    with pytest.raises(UsageError, match="data"):
        fit(vectors(tiny_model("opt")), windows(seed=1), TrainSettings(steps=2), folder=tmp_path)
    fitted = fit(
        vectors(tiny_model("opt")), windows(), TrainSettings(steps=3), folder=tmp_path, fresh=True
    )
    assert fitted.steps == 3


def test_nothing_to_train_is_refused():
    model = tiny_model("opt").requires_grad_(False)
    with pytest.raises(UsageError, match="no parameter"):
        fit(model, windows(), TrainSettings(steps=1))


@pytest.mark.parametrize("kept", [True, False])
def test_nan_stops_and_leaves_the_last_good_state(tmp_path, kept):
    model = vectors(tiny_model("opt"))
    steps = 0

    def breaking(model, batch):
        nonlocal steps
        steps += 1
        loss = next_token_loss(model, batch)
        return loss * math.nan if steps == 7 else loss

    folder = tmp_path if kept else None
    settings = TrainSettings(steps=20, checkpoint_every=4)
    with pytest.raises(NumericsError, match="step 7") as caught:
        fit(model, windows(), settings, loss=breaking, folder=folder)
    assert caught.value.field == "lr"
    good = vectors(tiny_model("opt"))
    four = []

    class Copy(Hook):
        def after_step(self, at):
            if at.step == 4:
                four.append({n: p.detach().clone() for n, p in at.named.items()})

    fit(good, windows(), settings, hooks=[Copy()])
    now = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert states_equal(now, four[0])
    if kept:
        assert checkpoint.load(tmp_path)[1]["step"] == 4


def test_early_stop_puts_the_best_state_back():
    model = vectors(tiny_model("opt"))
    figures = iter([3.0, 2.0, 5.0, 6.0, 7.0, 8.0])
    best = []

    def validate():
        value = next(figures)
        if value == 2.0:
            best.append({n: p.detach().clone() for n, p in model.named_parameters()})
        return value

    settings = TrainSettings(steps=60, validate_every=2, patience=2)
    fitted = fit(model, windows(), settings, validate=validate)
    assert (fitted.stopped, fitted.steps) == ("early", 8)
    assert states_equal(dict(model.named_parameters()), best[0])


def test_surgery_in_the_middle_keeps_the_optimizer_state():
    """A hook narrows a parameter; moments of what stays go with it."""

    class Toy(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(6))

    class Cut(Hook):
        def after_step(self, at):
            if at.step == 3:
                before = at.optimizer.state[at.model.w]["exp_avg"].clone()
                at.model.w = nn.Parameter(at.model.w.detach()[:4].clone())
                at.refresh(lambda name, key, value: value[:4])
                assert torch.equal(at.optimizer.state[at.model.w]["exp_avg"], before[:4])
                assert at.optimizer.state[at.model.w]["step"] == 3

    model = Toy()
    loss = lambda m, b: (m.w**2).sum()  # noqa: E731
    fitted = fit(model, windows(), TrainSettings(steps=6), loss=loss, hooks=[Cut()])
    assert fitted.steps == 6
    assert model.w.shape == (4,)


# -- masks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_masked_weights_stay_zero_under_decay_and_momentum(family, optimizer):
    model = tiny_model(family)
    view = ModelView.of(model)
    generator = torch.Generator().manual_seed(0)
    masks = {}
    for matrix in view.matrices():
        masks[matrix.name] = torch.rand(matrix.shape, generator=generator) < 0.5
        matrix.tensor().masked_fill_(masks[matrix.name], 0)
    gone = check_masks(view, masks)
    model.requires_grad_(True)
    settings = TrainSettings(
        steps=6, lr=1e-2, optimizer=optimizer, weight_decay=0.3, clip=0.1, momentum=0.9
    )
    seen = []

    class Look(Hook):
        def end(self, at):
            for matrix in view.matrices():
                state = at.optimizer.state[matrix.stored]
                for key in ("exp_avg", "exp_avg_sq", "momentum_buffer"):
                    if key in state:
                        from secateur.training.masked import _seen

                        moment = _seen(matrix, state[key])
                        seen.append(float(moment[masks[matrix.name]].abs().max()))

    before = {m.name: m.tensor().clone() for m in view.matrices()}
    fit(model, windows(), settings, hooks=[KeepZeros(view, masks), Look()])
    assert prove_zeros(view, masks, gone) == gone
    assert seen
    assert max(seen) == 0.0
    assert all(not torch.equal(m.tensor(), before[m.name]) for m in view.matrices())


def test_without_the_hook_the_mask_is_lost_and_it_is_noticed():
    from secateur.errors import VerificationError

    model = tiny_model("llama")
    view = ModelView.of(model)
    masks = {m.name: m.tensor().abs() < 0.05 for m in view.matrices()}
    for matrix in view.matrices():
        matrix.tensor().masked_fill_(masks[matrix.name], 0)
    gone = check_masks(view, masks)
    fit(model.requires_grad_(True), windows(), TrainSettings(steps=1))
    with pytest.raises(VerificationError, match="lost the mask"):
        prove_zeros(view, masks, gone)


def test_masks_that_do_not_fit_are_refused():
    view = ModelView.of(tiny_model("llama"))
    first = view.matrices()[0]
    for masks, words in (
        ({"nobody": torch.ones(2, 2, dtype=torch.bool)}, "no matrix"),
        ({first.name: torch.ones(3, 3, dtype=torch.bool)}, "its matrix"),
        ({first.name: torch.ones(first.shape, dtype=torch.bool)}, "not zero"),
    ):
        with pytest.raises(UsageError, match=words):
            check_masks(view, masks)
    with pytest.raises(UsageError, match="no sparse model"):
        masks_from_zeros(view)


# -- float16 -------------------------------------------------------------------------------------


def float16(monkeypatch, scale):
    """The loop as on a GPU that computes in float16, on a CPU (which is slow at it)."""

    def accelerator(model, settings):
        made = plain(model, settings)
        made.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=3)
        made.autocast = lambda: torch.autocast("cpu", torch.float16)
        return made

    plain = loop.accelerator_for
    monkeypatch.setattr(loop, "accelerator_for", accelerator)


def test_a_scaled_loss_trains_as_an_unscaled_one(monkeypatch):
    settings = TrainSettings(steps=5, lr=0.02, batch=4, micro_batch=2)
    plain, half = (vectors(tiny_model("llama")) for _ in range(2))
    wanted = fit(plain, windows(), settings).losses
    float16(monkeypatch, 2.0**12)
    assert fit(half, windows(), settings).losses == pytest.approx(wanted, rel=0.01)


def test_steps_that_overflow_are_left_out_until_the_scale_fits(monkeypatch):
    model = vectors(tiny_model("llama"))
    seen = []

    class Watch(Hook):
        def after_step(self, at):
            weights = torch.cat([p.detach().flatten() for p in at.named.values()])
            seen.append((at.accelerator.scaler.get_scale(), float(weights.sum())))

    before = float(torch.cat([p.detach().flatten() for p in vectors(model).parameters()
                              if p.requires_grad]).sum())  # fmt: skip
    float16(monkeypatch, 2.0**40)
    fit(model, windows(), TrainSettings(steps=40, lr=0.02, batch=2), hooks=[Watch()])
    scales, sums = zip(*seen, strict=True)
    left_out = [s for s, total in seen if total == before]
    assert left_out == sorted(left_out, reverse=True)  # the scale falls and nothing else happens
    assert 10 < len(left_out) < 35
    assert sums[-1] != before
    assert min(scales) > 1


def test_the_scale_is_taken_up_again(monkeypatch, tmp_path):
    float16(monkeypatch, 2.0**20)
    settings = TrainSettings(steps=8, lr=0.02, batch=2, checkpoint_every=2)
    whole = fit(vectors(tiny_model("llama")), windows(), settings, folder=tmp_path / "a")

    class Stop(Hook):
        def after_step(self, at):
            if at.step == 5:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(
            vectors(tiny_model("llama")), windows(), settings, hooks=[Stop()], folder=tmp_path / "b"
        )
    again = fit(vectors(tiny_model("llama")), windows(), settings, folder=tmp_path / "b")
    assert again.losses == whole.losses
    last = [checkpoint.load(tmp_path / name)[1]["scaling"] for name in "ab"]
    assert last[0] == last[1]


def test_float16_is_for_gpus_and_chosen_where_bfloat16_is_not(monkeypatch):
    with pytest.raises(UsageError, match="a CPU does not train in float16"):
        fit(vectors(tiny_model("llama")), windows(), TrainSettings(precision="fp16"))
    model = nn.Linear(2, 2)
    assert precision.chosen(model, "auto") == "no"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    for kind, wanted in ((torch.float32, "no"), (torch.float16, "fp16")):
        weight = SimpleNamespace(device=torch.device("cuda"), dtype=kind)
        held = SimpleNamespace(parameters=lambda weight=weight: iter([weight]))
        assert precision.chosen(held, "auto") == wanted
