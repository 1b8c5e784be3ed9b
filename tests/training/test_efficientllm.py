"""EfficientLLM as a hook of the training loop: two executions, one training; resume; ranks; limits."""

import copy
import json
import os
import subprocess
import sys

import pytest
import torch
from efficient_cases import exact_llama, exact_loss, parameters, windows

from secateur.errors import NumericsError, UsageError
from secateur.masks.structured import structure_of
from secateur.models.norms import alive_of
from secateur.models.tiny import tiny_model
from secateur.models.units import parameters_of
from secateur.training import checkpoint
from secateur.training.efficientllm import PruneOptions, PruningAware
from secateur.training.loop import Hook, fit
from secateur.training.prune_schedule import PruneSchedule
from secateur.training.settings import TrainSettings
from secateur.training.unit_choice import TYPES, Rules

STEPS = 12


def options(model, keep=0.5, start=2, stop=9, every=1, pace="linear_params", rules=None, **own):
    # Raw sums and few residual channels, so that in a few steps all three types take part.
    return PruneOptions(
        int(keep * parameters(model)),
        PruneSchedule(pace, start=start, stop=stop, every=every),
        rules=rules or Rules(min_ffn=40, min_width=36),
        context=24,
        **own,
    )


def trained(model, chosen, steps=STEPS, hooks=(), folder=None, loss=exact_loss, also=(), **own):
    hook = PruningAware(chosen, also)
    settings = TrainSettings(**{"steps": steps, "lr": 2e-3, "batch": 4, "weight_decay": 0.1} | own)
    fitted = fit(
        model, windows(), settings, hooks=[hook, *hooks], loss=loss, folder=folder,
        identity={"budget": chosen.budget},
    )  # fmt: skip
    return hook, fitted


class Adam(Hook):
    """Keeps the optimizer for a look at its state."""

    def begin(self, at):
        self.at = at


@pytest.mark.parametrize("every", [3, 0])
@pytest.mark.parametrize("second_order", [True, False])
def test_masked_and_compact_train_the_same(every, second_order):
    """(G.2, G.9) In float64, before, between and after events, moments included."""
    compact, masked = exact_llama(), exact_llama()
    look, look2 = Adam(), Adam()
    own = {"second_order": second_order, "solver": "cholesky"}
    hook, one = trained(compact, options(compact, **own), hooks=[look])
    hook2, two = trained(masked, options(masked, compact_every=every, **own), hooks=[look2])
    assert {e["type"] for e in hook.events} == {"head", "ffn", "stem"}
    assert [e["units"] for e in hook.events] == [e["units"] for e in hook2.events]
    assert two.losses == pytest.approx(one.losses, rel=1e-10)
    assert structure_of(compact) == structure_of(masked)
    for (name, a), b in zip(compact.named_parameters(), masked.parameters(), strict=True):
        assert a.shape == b.shape
        assert torch.allclose(a, b, rtol=0, atol=1e-9), name
        for state in (look.at.optimizer.state[a], look2.at.optimizer.state[b]):
            assert state["exp_avg"].shape == state["exp_avg_sq"].shape == a.shape
        assert torch.allclose(
            look.at.optimizer.state[a]["exp_avg"], look2.at.optimizer.state[b]["exp_avg"],
            rtol=0, atol=1e-9,
        ), name  # fmt: skip


def test_masked_units_are_and_stay_zero():
    model = exact_llama()
    seen = []

    class Look(Hook):
        def after_step(self, at):
            named = parameters_of(at.model)
            stem = next(g for g in hook._groups if g.kind == "stem")
            gone = hook._gone["stem"]
            if gone.any():
                for part in stem.slices:
                    places = part.index[gone].reshape(-1)
                    tensor = named[part.parameter]
                    assert not tensor.index_select(part.dim, places).any(), part.parameter
                    moments = at.optimizer.state[tensor]["exp_avg"]
                    assert not moments.index_select(part.dim, places).any()
                assert alive_of(at.model.model.norm, stem.n_units) == int((~gone).sum())
                seen.append(at.step)

    chosen = options(model, compact_every=0)
    hook = PruningAware(chosen)
    settings = TrainSettings(steps=8, lr=2e-3, batch=4)
    fit(model, windows(), settings, hooks=[hook, Look()], loss=exact_loss)
    assert seen
    assert parameters(model) <= exact_parameters() // 2 or hook._waiting == 0


def exact_parameters():
    return parameters(exact_llama())


def test_budget_shape_and_bookkeeping():
    """(G.11) Uniform, exact, and the same again under the same seed."""
    model, again = exact_llama(), exact_llama()
    average = {n: p.detach().clone() for n, p in parameters_of(model).items()}
    chosen = options(model)
    hook, fitted = trained(model, chosen, also=[average])
    assert hook.settled
    assert parameters(model) == hook.parameters <= chosen.budget
    assert hook.parameters == hook.events[-1]["parameters"]
    assert hook.events == trained(again, chosen)[0].events
    shapes = [
        {n.split(".", 3)[3]: p.shape for n, p in model.named_parameters() if f"layers.{i}." in n}
        for i in range(2)
    ]
    assert shapes[0] == shapes[1]
    assert {n: t.shape for n, t in average.items()} == {
        n: p.shape for n, p in parameters_of(model).items()
    }
    sizes = [hook.initial, *(e["parameters"] for e in hook.events)]
    assert sizes == sorted(sizes, reverse=True)
    for event in hook.events:
        assert 2 < event["step"] <= 9
        assert event["price"] <= min(event["rivals"].values()) or event is hook.events[-1]
    assert sum(span[3] for span in hook.spans) == fitted.steps
    assert hook.spans[0][1] == hook.initial
    assert hook.spans[-1][1] == hook.parameters


def test_a_budget_of_everything_changes_nothing():
    """(G.11)"""
    plain, kept = exact_llama(), exact_llama()
    settings = TrainSettings(steps=4, lr=1e-3, batch=4)
    expected = fit(plain, windows(), settings, loss=exact_loss).losses
    hook, fitted = trained(kept, options(kept, keep=1.0, stop=3), steps=4, lr=1e-3, weight_decay=0)
    assert fitted.losses == expected
    assert not hook.events


def test_compensation_helps():
    """(G.3) What copies of channels did is taken over by the channels they copy."""
    plain = exact_llama()
    with torch.no_grad():
        for layer in plain.model.layers:
            for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):
                linear.weight[48:] = linear.weight[:48]
            layer.mlp.down_proj.weight[:, :48] *= 10  # so that the copies are the least salient
    ids = windows(8).ids
    harm = {}
    for second_order in (True, False):
        model = copy.deepcopy(plain)
        own = {"kinds": ("ffn",), "second_order": second_order, "damping": 1e-8}
        pruner = options(model, keep=0.95, start=1, stop=2, **own)
        hook, _ = trained(model, pruner, steps=3, lr=0.0, weight_decay=0.0)
        assert all(min(u) >= 48 for e in hook.events for _, u in e["units"])
        with torch.no_grad():
            harm[second_order] = float((model(ids).logits - plain(ids).logits).square().mean())
    assert harm[True] < 1e-6 * harm[False]


@pytest.mark.parametrize("how", [{"compact_every": 1}, {"compact_every": 3, "memory": None}])
@pytest.mark.parametrize("kill", [1, 4, 7, 11])
def test_resume_is_exact_anywhere(tmp_path, kill, how):
    """Between events too: the checkpoint holds shapes, plan, accumulators and what is masked."""

    class Stop(Hook):
        def after_step(self, at):
            if at.step == kill:
                raise RuntimeError("killed")

    def model():
        return tiny_model("llama", num_key_value_heads=4)

    chosen = options(model(), every=2, **how)
    whole = model()
    hook, expected = trained(whole, chosen, folder=tmp_path / "whole", checkpoint_every=1)
    with pytest.raises(RuntimeError):
        trained(model(), chosen, folder=tmp_path / "cut", hooks=[Stop()], checkpoint_every=1)
    resumed = model()
    hook2, fitted = trained(resumed, chosen, folder=tmp_path / "cut", checkpoint_every=1)
    assert fitted.resumed == kill - 1
    assert fitted.losses == expected.losses
    assert hook2.events == hook.events
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    other = options(model(), keep=0.6)
    with pytest.raises(UsageError, match="budget"):
        trained(model(), other, folder=tmp_path / "cut", checkpoint_every=1)


def test_looks_at_held_out_text_leave_no_trace():
    """Survivors are fitted to inputs of the training step alone."""
    weights = []
    for every in (1, 100):
        model = exact_llama()
        hook = PruningAware(options(model))
        held = windows(4, seed=9).ids

        def look(model=model, held=held):
            with torch.no_grad():
                return float(model(held).logits.mean())

        settings = TrainSettings(steps=8, lr=2e-3, batch=4, validate_every=every)
        fit(model, windows(), settings, hooks=[hook], loss=exact_loss, validate=look)
        weights.append([p.detach() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_accumulation_and_checkpointing_choose_the_same():
    events = []
    for own, again in (({}, False), ({"micro_batch": 1}, False), ({"micro_batch": 2}, True)):
        model = tiny_model("llama", num_key_value_heads=4)
        if again:
            model.gradient_checkpointing_enable()
        hook, _ = trained(model.train(), options(model), **own)
        events.append([(e["type"], e["units"]) for e in hook.events])
    assert events[0] == events[1] == events[2]


def test_mixed_precision_keeps_float32_weights():
    model = tiny_model("llama", num_key_value_heads=4)
    hook, fitted = trained(model, options(model), precision="bf16")
    assert parameters(model) == hook.parameters
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(map(torch.isfinite, map(torch.tensor, fitted.losses)))


@pytest.mark.parametrize(
    ("family", "own"),
    [("llama", {}), ("llama", {"gqa": "even"}), ("gpt2", {}), ("opt", {}), ("gpt_neox", {}),
     ("phi3", {}), ("qwen3", {"compact_every": 0}), ("gemma2", {"compact_every": 2}),
     ("opt", {"compact_every": 3})],
)  # fmt: skip
def test_families(family, own):
    """Biases, LayerNorm, Conv1D, fused projections, shared keys, norms with 1 + weight."""
    model = tiny_model(family)
    kinds = ("head", "ffn") if family in ("phi3",) else ("head", "ffn", "stem")
    hook, _ = trained(model, options(model, keep=0.75, kinds=kinds, **own))
    assert hook.settled
    assert parameters(model) == hook.parameters <= hook.options.budget


def test_tied_embeddings_stay_tied():
    """(G.10)"""
    model = tiny_model("llama", num_key_value_heads=4, tie_word_embeddings=True)
    rules = Rules(min_ffn=90, min_heads=4, min_width=20)
    trained(model, options(model, keep=0.8, rules=rules))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.shape[1] < 48


def test_fixed_pace_pauses_after_a_head():
    """A head counts as its channels; at the end whatever is left goes at once."""
    model = tiny_model("llama", num_key_value_heads=4)
    rules = Rules(normalize="cost", costs={"head": 1e12, "ffn": 1.0, "stem": 1.0}, min_heads=3)
    chosen = options(model, keep=0.8, start=1, stop=30, pace="every_n_batches", rules=rules)
    hook, _ = trained(model, chosen, steps=31)
    assert hook.events[0]["type"] == "head"
    assert hook.events[0]["step"] == 2
    assert hook.events[1]["step"] == 2 + 12  # head_dim
    assert parameters(model) <= chosen.budget


def test_layers_of_their_own_widths():
    model = tiny_model("llama", num_key_value_heads=4)
    rules = Rules(layer_mode="global", min_heads=1, min_ffn=8, min_width=40)
    hook, _ = trained(model, options(model, keep=0.6, rules=rules))
    assert parameters(model) == hook.parameters <= hook.options.budget


# -- what is refused -----------------------------------------------------------------------------


def test_unreachable_budgets_are_refused():
    model = tiny_model("llama", num_key_value_heads=4)
    with pytest.raises(UsageError, match="smallest shape") as caught:
        trained(model, options(model, keep=0.01))
    assert caught.value.field == "keep_params"
    with pytest.raises(UsageError, match="already"):
        trained(model, options(model, keep=1.5))
    single = tiny_model("llama", num_key_value_heads=1)
    with pytest.raises(UsageError, match="one key-value head") as caught:
        trained(single, options(single))
    assert caught.value.field == "gqa"
    for rules in (
        Rules(costs={"ffn": 1.0}, normalize="cost"),
        Rules(costs=dict.fromkeys(TYPES, 1.0)),
    ):
        with pytest.raises(UsageError, match="cost for each"):
            options(model, rules=rules)
    for own in ({"kinds": ("layer",)}, {"kinds": ()}, {"gqa": "duplicate"}, {"compact_every": -1},
                {"damping": 0.0}, {"hessian_tokens": 0}, {"saliency": "x"}):  # fmt: skip
        with pytest.raises(UsageError) as caught:
            trained(model, options(model, **own))
        assert caught.value.field == next(iter(own))


def test_a_layer_down_to_its_last_group_keeps_it():
    model = tiny_model("llama")
    rules = Rules(normalize="cost", costs={"head": 1e12, "ffn": 1.0, "stem": 1.0})
    hook, _ = trained(model, options(model, keep=0.5, rules=rules))
    assert hook.settled
    assert model.model.layers[0].self_attn.k_proj.weight.shape[0] == 12


@pytest.mark.parametrize("folder", [True, False])
def test_a_loss_that_is_not_finite_stops_with_a_good_state(tmp_path, folder):
    model = tiny_model("llama", num_key_value_heads=4)

    class Poison(Hook):
        def after_backward(self, at):
            if at.step == 7:
                at.model.model.norm.weight.grad[0] = torch.nan

    with pytest.raises(NumericsError, match=r"gradient of 'model\.norm\.weight'"):
        trained(
            model, options(model), hooks=[Poison()], checkpoint_every=5,
            folder=tmp_path if folder else None,
        )  # fmt: skip
    assert all(torch.isfinite(p).all() for p in model.parameters())
    if folder:
        assert checkpoint.load(tmp_path)[1]["step"] == 5


# -- several processes ---------------------------------------------------------------------------

SCRIPT = """
import json, sys
sys.path.insert(0, sys.argv[2])
import torch
torch.set_num_threads(1)
from pathlib import Path
from secateur.run.ranks import Ranks
from test_efficientllm import options, trained
from efficient_cases import exact_llama
ranks = Ranks.from_environment("cpu")
model = exact_llama()
hook, fitted = trained(
    model, options(model, compact_every=int(sys.argv[3])), folder=Path(sys.argv[1]) / "folder",
    micro_batch=1,
)
record = {"events": hook.events, "losses": fitted.losses, "rank": ranks.rank,
          "sum": [float(p.sum()) for p in model.parameters()]}
(Path(sys.argv[1]) / f"record-{ranks.rank}.json").write_text(json.dumps(record))
"""


@pytest.mark.parametrize("every", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_two_processes_choose_what_one_chooses(tmp_path, every):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    here = os.path.dirname(__file__)
    made = {}
    for world in (1, 2):
        out = tmp_path / str(world)
        out.mkdir()
        launch = [sys.executable]
        if world > 1:
            launch += ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0",
                       "--standalone"]  # fmt: skip
        done = subprocess.run(
            [*launch, str(script), str(out), here, str(every)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        made[world] = [
            json.loads((out / f"record-{rank}.json").read_text()) for rank in range(world)
        ]
    alone, (first, second) = made[1][0], made[2]
    assert first["sum"] == second["sum"]
    for record in (first, second):
        assert [e["units"] for e in record["events"]] == [e["units"] for e in alone["events"]]
        assert record["losses"] == pytest.approx(alone["losses"], rel=1e-8)
