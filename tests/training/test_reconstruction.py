"""Block-wise reconstruction: what has a closed form is reached, nothing gets worse, zeros stay."""

import copy
import multiprocessing

import pytest
import torch
from torch import nn

from secateur.data.windows import Windows
from secateur.errors import NumericsError, UsageError
from secateur.models.anatomy import ModelView
from secateur.models.loading import load
from secateur.models.tiny import VOCABULARY, tiny_model
from secateur.training.local import Local, fit_local
from secateur.training.reconstruction import Dense, Reconstruction
from secateur.training.settings import TrainSettings

IDS = torch.randint(4, VOCABULARY, (8, 24), generator=torch.Generator().manual_seed(1))
FAST = TrainSettings(steps=12, lr=3e-3, batch=4)


def cut(family="llama", sparsity=0.5, **changes):
    """(pruned model, its view, masks, the dense model)."""
    model = tiny_model(family, **changes)
    dense = copy.deepcopy(model)
    view, masks = ModelView.of(model), {}
    for matrix in view.matrices():
        size = matrix.tensor().abs()
        masks[matrix.name] = size < size.flatten().kthvalue(int(size.numel() * sparsity)).values
        matrix.tensor().masked_fill_(masks[matrix.name], 0)
    return model, view, masks, dense


def repair(view, masks, dense, train=("norms", "mask-lora"), settings=FAST, data=None, **rest):
    adapter = rest.pop("adapter", {"rank": 4, "alpha": 8.0} if "lora" in str(train) else {})
    part = Reconstruction(view, masks, Dense(ModelView.of(dense)), settings, train, adapter, **rest)
    return part.run(data or Windows(IDS))


@torch.no_grad()
def distance(model, dense):
    """||logits - dense logits|| / ||dense logits|| on the windows."""
    ours, theirs = model(IDS).logits, dense(IDS).logits
    return float((ours - theirs).norm() / theirs.norm())


# -- one part by itself -----------------------------------------------------------------------


def linear_case(rows=5, columns=7, tokens=60):
    g = torch.Generator().manual_seed(0)
    layer = nn.Linear(columns, rows)
    nn.init.normal_(layer.weight, generator=g)
    nn.init.zeros_(layer.bias)
    inputs = [torch.randn(2, tokens // 2, columns, generator=g) + 0.5 for _ in range(4)]
    wanted = [torch.randn(2, tokens // 2, rows, generator=g) for _ in range(4)]
    return layer, inputs, wanted


def test_biases_alone_reach_their_closed_form():
    """b* = b + mean(Y - f(X))."""
    layer, inputs, wanted = linear_case()
    with torch.no_grad():
        gap = torch.cat([(y - layer(x)).flatten(0, 1) for x, y in zip(inputs, wanted, strict=True)])
        best = layer.bias + gap.mean(0)
    local = Local("layer", lambda b: layer(inputs[b]), wanted, [None] * 4)
    settings = TrainSettings(steps=250, lr=0.05, batch=4, clip=None)
    fit_local(local, {"bias": layer.bias}, settings, per_step=4)
    torch.testing.assert_close(layer.bias.detach(), best, atol=1e-3, rtol=1e-3)


def test_a_masked_layer_reaches_each_rows_masked_least_squares():
    from secateur.models.matrix import Matrix
    from secateur.training.masked import KeepZeros

    layer, inputs, wanted = linear_case()
    gone = torch.rand(5, 7, generator=torch.Generator().manual_seed(2)) < 0.4
    with torch.no_grad():
        layer.weight.masked_fill_(gone, 0)
        layer.bias.zero_()
    x, y = (torch.cat([t.flatten(0, 1) for t in part]).double() for part in (inputs, wanted))
    best = torch.zeros(5, 7, dtype=torch.float64)
    for row in range(5):
        kept = ~gone[row]
        best[row, kept] = torch.linalg.lstsq(x[:, kept], y[:, row]).solution
    model = nn.Sequential(layer)
    view = ModelView(model, "", [])
    view.matrices = lambda: [Matrix("0", layer)]  # no list of blocks in so small a model
    local = Local("layer", lambda b: layer(inputs[b]), wanted, [None] * 4)
    settings = TrainSettings(steps=500, lr=0.05, batch=4, clip=None)
    fit_local(
        local, {"weight": layer.weight}, settings, per_step=4, hooks=[KeepZeros(view, {"0": gone})]
    )
    torch.testing.assert_close(layer.weight.detach().double(), best, atol=1e-3, rtol=1e-3)
    assert (layer.weight[gone] == 0).all()


def test_padding_does_not_count():
    layer, inputs, wanted = linear_case()
    keep = [torch.ones(2, 30, dtype=torch.bool) for _ in range(4)]
    for mask in keep:
        mask[:, 20:] = False
    spoilt = [y.clone() for y in wanted]
    for y in spoilt:
        y[:, 20:] = 1e6
    short = Local("a", lambda b: layer(inputs[b][:, :20]), [y[:, :20] for y in wanted], [None] * 4)
    padded = Local("a", lambda b: layer(inputs[b]), spoilt, keep)
    assert padded.error() == pytest.approx(short.error(), rel=1e-6)
    assert padded.tokens == short.tokens == 160


def test_accumulated_batches_are_one_step():
    """Four batches in a step, or one of four times the size: the same parameters."""
    results = []
    for joined in (False, True):
        layer, inputs, wanted = linear_case()
        if joined:
            inputs, wanted = [torch.cat(inputs)], [torch.cat(wanted)]
        local = Local("layer", lambda b, x=inputs: layer(x[b]), wanted, [None] * len(wanted))  # noqa: B023
        settings = TrainSettings(steps=5, lr=0.05, batch=4)
        fit_local(local, dict(layer.named_parameters()), settings, per_step=len(wanted))
        results.append(layer.weight.detach().clone())
    torch.testing.assert_close(*results)


def test_nan_stops_and_names_the_part():
    layer, inputs, wanted = linear_case()
    wanted[1][0, 0, 0] = float("nan")
    local = Local("layer.7", lambda b: layer(inputs[b]), wanted, [None] * 4)
    with pytest.raises(NumericsError, match=r"layer\.7"):
        fit_local(local, {"bias": layer.bias}, FAST)


# -- whole models -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("unit", "stream"), [("block", "pruned"), ("block", "dense"), ("matrix", "pruned")]
)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_block_and_the_whole_come_closer_and_zeros_stay(family, unit, stream):
    model, view, masks, dense = cut(family)
    before = distance(model, dense)
    names = list(model.state_dict())
    train = ("mask-lora",) if unit == "matrix" else ("norms", "mask-lora")
    record = repair(view, masks, dense, train, unit=unit, stream=stream)
    assert all(b["kept"] and b["after"] < b["before"] for b in record["blocks"])
    assert distance(model, dense) < before
    assert all((m.tensor()[masks[m.name]] == 0).all() for m in view.matrices())
    assert record["zeros"] == sum(int(m.sum()) for m in masks.values())
    assert list(model.state_dict()) == names
    assert 0 < record["share"] < 0.3


@pytest.mark.parametrize(
    "train", [("norms",), ("biases",), ("all",), ("lora-prune",), ("scale-lora",), ("spp",)]
)
def test_every_part_of_a_block_can_be_trained(train):
    model, view, masks, dense = cut("opt")
    before = distance(model, dense)
    record = repair(view, masks, dense, train)
    assert all(b["after"] <= b["before"] for b in record["blocks"])
    assert distance(model, dense) < before
    assert all((m.tensor()[masks[m.name]] == 0).all() for m in view.matrices())


def test_fused_experts_are_trained_whole():
    _model, view, masks, dense = cut("mixtral")
    record = repair(view, masks, dense, ("all",), TrainSettings(steps=12, lr=1e-3, batch=4))
    assert all(b["kept"] for b in record["blocks"])
    assert all((m.tensor()[masks[m.name]] == 0).all() for m in view.matrices())


def test_a_dense_model_needs_no_repair():
    """Its blocks give their targets already: error 0 before, nothing moves."""
    model = tiny_model("llama")
    before = copy.deepcopy(model.state_dict())
    record = repair(ModelView.of(model), {}, copy.deepcopy(model), ("lora",))
    assert all(b["before"] == 0 for b in record["blocks"])
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize("train", [("norms",), ("norms", "mask-lora"), ("lora-prune",), ("all",)])
def test_a_block_that_came_out_worse_is_put_back(train):
    model, view, masks, dense = cut()
    before = copy.deepcopy(model.state_dict())
    wild = TrainSettings(steps=3, lr=3.0, batch=4, warmup=0.0, schedule="constant")
    record = repair(view, masks, dense, train, wild)
    assert not any(b["kept"] for b in record["blocks"])
    assert all(b["after"] == b["before"] for b in record["blocks"])
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_the_same_twice():
    states = []
    for _ in range(2):
        model, view, masks, dense = cut()
        repair(view, masks, dense, adapter={"rank": 4, "dropout": 0.2, "every": 2})
        states.append(model.state_dict())
    assert all(torch.equal(states[0][n], states[1][n]) for n in states[0])


def test_a_half_precision_model_is_trained_in_float32_and_stays_what_it_is():
    model, view, masks, dense = cut()
    model.to(torch.bfloat16)
    dense.to(torch.bfloat16)
    record = repair(view, masks, dense, ("norms", "mask-lora"))
    assert all(b["kept"] for b in record["blocks"])
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    assert all((m.tensor()[masks[m.name]] == 0).all() for m in view.matrices())


def test_padded_windows():
    _, view, masks, dense = cut()
    mask = torch.ones_like(IDS, dtype=torch.bool)
    mask[::2, 16:] = False
    record = repair(view, masks, dense, data=Windows(IDS, mask))
    assert all(b["kept"] for b in record["blocks"])


# -- stopped and gone on ----------------------------------------------------------------------


@pytest.mark.parametrize("stream", ["pruned", "dense"])
def test_stopped_after_a_block_it_goes_on_to_the_same_weights(tmp_path, stream, monkeypatch):
    model, view, masks, dense = cut(num_hidden_layers=3)
    repair(view, masks, dense, stream=stream)
    whole = model.state_dict()

    model, view, masks, dense = cut(num_hidden_layers=3)
    trained = Reconstruction._repair

    def stops(self, block, *rest):
        if block.index == 2:
            raise KeyboardInterrupt
        return trained(self, block, *rest)

    monkeypatch.setattr(Reconstruction, "_repair", stops)
    with pytest.raises(KeyboardInterrupt):
        repair(view, masks, dense, stream=stream, folder=tmp_path)
    monkeypatch.setattr(Reconstruction, "_repair", trained)

    model, view, masks, dense = cut(num_hidden_layers=3)
    done = []
    monkeypatch.setattr(
        Reconstruction, "_repair", lambda s, b, *r: done.append(b.index) or trained(s, b, *r)
    )
    record = repair(view, masks, dense, stream=stream, folder=tmp_path)
    assert done == [2]
    assert [b["block"] for b in record["blocks"]] == [0, 1, 2]
    assert all(torch.equal(t, whole[n]) for n, t in model.state_dict().items())


def test_another_setting_does_not_go_on(tmp_path):
    _, view, masks, dense = cut()
    repair(view, masks, dense, folder=tmp_path)
    _, view, masks, dense = cut()
    with pytest.raises(UsageError) as error:
        repair(view, masks, dense, stream="dense", folder=tmp_path)
    assert error.value.field == "stream"


def test_streamed_from_disk_it_gives_the_same_weights(tmp_path, tiny_folder):
    """Both models a block at a time; what the callback sees is what a resident run makes."""
    from secateur.models.saving import save_config_and_tokenizer, save_weights
    from secateur.models.tiny import tiny_tokenizer

    model, view, masks, dense = cut()
    for part, name in ((model, "cut"), (dense, "dense")):
        save_weights(part, tmp_path / name)
        save_config_and_tokenizer(part, tiny_tokenizer(), tmp_path / name)
    streamed = [
        load(str(tmp_path / n), dtype="float32", stream=True).streamed for n in ("cut", "dense")
    ]
    repair(view, masks, dense)
    seen = {}

    def keep(block):
        present = list(streamed[0]._resident), list(streamed[1]._resident)
        assert present == ([block.index], []), "one block of one model at a time"
        for name, parameter in block.module.named_parameters():
            seen[f"{block.name}.{name}"] = parameter.detach().clone()

    Reconstruction(
        streamed[0].view,
        masks,
        Dense(streamed[1].view, streamed[1].resident),
        FAST,
        ("norms", "mask-lora"),
        {"rank": 4, "alpha": 8.0},
        resident=streamed[0].resident,
        written=keep,
    ).run(Windows(IDS))
    state = model.state_dict()
    assert len(seen) == sum(len(list(b.module.parameters())) for b in view.blocks)
    for name, value in seen.items():
        torch.testing.assert_close(value, state[name])


def _process(rank, world, port, out):
    import os

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
    model, view, masks, dense = cut()
    repair(view, masks, dense)
    torch.save(model.state_dict(), f"{out}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_agree_with_one(tmp_path):
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_process, args=(r, 2, port, str(tmp_path))) for r in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(240)
        assert worker.exitcode == 0
    model, view, masks, dense = cut()
    # Processes take every second window, so one must walk them in that order.
    order = torch.tensor([0, 2, 1, 3, 4, 6, 5, 7])
    repair(view, masks, dense, data=Windows(IDS[order]))
    states = [torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in range(2)]
    for name, value in model.state_dict().items():
        assert torch.equal(states[0][name], states[1][name])
        torch.testing.assert_close(states[0][name], value, atol=2e-3, rtol=1e-2)


# -- bad input --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"train": ("head",)}, "train"),
        ({"train": ("biases",)}, "train"),  # a Llama has none
        ({"train": ("lora",)}, "train"),  # would fill the zeros
        ({"train": ("norms",), "unit": "matrix"}, "train"),
        ({"unit": "window"}, "unit"),
        ({"stream": "mine"}, "stream"),
        ({"stream": "dense", "unit": "matrix", "train": ("all",)}, "stream"),
        ({"adapter": {"rnk": 4}}, "rnk"),
        ({"adapter": {"rank": "many"}}, "rank"),
        ({"adapter": {"rank": 0}}, "rank"),
    ],
)
def test_bad_requests_name_the_field_and_change_nothing(change, field):
    model, view, masks, dense = cut()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UsageError) as error:
        repair(view, masks, dense, **change)
    assert error.value.field == field
    assert error.value.fix
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    ModelView.of(model)


def test_another_dense_model_is_refused():
    _, view, masks, _ = cut()
    for other in (tiny_model("llama", num_hidden_layers=3), tiny_model("llama", hidden_size=96)):
        with pytest.raises(UsageError, match="the dense model has"):
            repair(view, masks, other)


def test_a_streamed_run_cannot_recover_and_says_what_can():
    from secateur.recipe import Recipe

    with pytest.raises(UsageError, match="streamed") as error:
        Recipe.build({"model": "tiny", "stream": True, "recovery": {"method": "reconstruct"}})
    assert "Reconstruction" in error.value.fix


def test_the_trained_share_is_told_and_a_run_can_do_it():
    """As the step of a run, by the recipe's words."""
    from secateur.progress import Progress
    from secateur.training.recoveries import Task, recoveries

    told = []

    class Listening(Progress):
        def note(self, message):
            told.append(message)

    model, view, masks, dense = cut()
    before = distance(model, dense)
    task = Task(
        view,
        masks,
        Windows(IDS),
        FAST,
        ("norms", "mask-lora"),
        adapter={"rank": 4, "targets": ["q", "down"]},
        reconstruction={"samples": 4, "unit": "block", "stream": "dense"},
        teacher=lambda: dense,
        progress=Listening(),
    )
    record = recoveries["reconstruct"](task)
    assert record["windows"] == 4
    assert distance(model, dense) < before
    assert any("% of each block" in line for line in told)
    with pytest.raises(UsageError, match="before the cut"):
        recoveries["reconstruct"](Task(view, masks, Windows(IDS), FAST, ("norms",)))
