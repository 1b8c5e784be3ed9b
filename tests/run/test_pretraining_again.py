"""``secateur pretrain``: which run a folder is of, and what its texts may be."""

import pytest
import torch
from torch import nn

import secateur
from secateur.data.documents import text_of
from secateur.data.stream import names_texts, open_stream
from secateur.data.texts import Text
from secateur.errors import UsageError
from secateur.masks.structured import StructuredMask, structure_of
from secateur.models.surgery import shrink
from secateur.models.tiny import tiny_model, tiny_tokenizer
from secateur.recipe_parts import Pretraining
from secateur.run.pretraining_setup import in_memory, options_of, settings_of
from secateur.training.compensation import Compensation
from secateur.training.prune_options import find_groups
from secateur.training.unit_choice import Rules, smallest
from secateur.training.unit_ledger import UnitLedger

SMALL = {"batch": 4, "length": 32, "tokens": 4 * 32 * 3, "epochs": None, "keep_params": 0.95}
ONE, TWO = ["The quick brown fox. " * 90], ["Of cutting roses. " * 90]


def test_a_folder_is_of_its_text_and_its_evaluation(tmp_path, tiny_folder):
    folder, out = tiny_folder("llama"), tmp_path / "out"
    for name, text in (("a", ONE), ("b", TWO)):
        (tmp_path / f"{name}.txt").write_text(text[0])
    first = {"text": str(tmp_path / "a.txt"), "length": 32, "windows": 1}
    secateur.pretrain(folder, text=ONE, out=out, evaluation=first, **SMALL)
    with pytest.raises(UsageError, match="holds a run with text"):
        secateur.pretrain(folder, text=TWO, out=out, evaluation=first, **SMALL)
    second = first | {"text": str(tmp_path / "b.txt")}
    with pytest.raises(UsageError, match="holds a run with evaluation"):
        secateur.pretrain(folder, text=ONE, out=out, evaluation=second, **SMALL)
    (tmp_path / "a.txt").write_text(TWO[0])  # the same name, other words
    with pytest.raises(UsageError, match=r"holds a run with evaluation\.windows"):
        secateur.pretrain(folder, text=ONE, out=out, evaluation=first, **SMALL)


def test_names_and_documents_are_told_apart(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("words")
    assert names_texts([str(path), "pydoc"])
    assert not names_texts(["The quick brown fox.", "x" * 5000])
    with pytest.raises(UsageError, match="some do not"):
        names_texts([str(path), "The quick brown fox."])
    with pytest.raises(UsageError, match="too long") as caught:
        open_stream("words " * 1000, tiny_tokenizer(), 16)
    assert "[text]" in caught.value.fix


def test_texts_in_memory():
    text = Text.of(["a b c"])
    assert in_memory(text) is text
    assert in_memory([text]) == [text]
    assert in_memory(["a", "b"]).documents == ["a", "b"]
    for wrong in ([{"text": "a"}], {"train": ["a"]}, [["a"]], 5):
        with pytest.raises(UsageError, match="strings"):
            in_memory(wrong)


def test_rows_of_a_data_set_are_their_field():
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"text": ["a b c"]})
    assert in_memory(rows) is rows
    stream = datasets.IterableDataset.from_generator(lambda: iter([{"text": "a b c " * 40}]))
    with pytest.raises(UsageError, match="shuffled"):
        open_stream(stream.shuffle(buffer_size=4), tiny_tokenizer(), 16)


def test_half_a_surrogate_pair_is_named():
    with pytest.raises(UsageError, match="row 3 has half a surrogate"):
        text_of({"text": "a\ud800b"}, 3, "some.jsonl")


def test_pruning_ends_within_the_training():
    spec = Pretraining(batch=1, length=8, tokens=32, prune_from=0.9, prune_until=1.0)
    settings = settings_of(spec, 8)
    schedule = options_of(spec, settings, 8, nn.Linear(4, 4)).schedule
    assert schedule.start < schedule.stop <= settings.steps == 4


def test_inputs_computed_again_are_not_sampled_again():
    model = tiny_model("llama", num_key_value_heads=4)
    options = options_of(
        Pretraining(batch=2, length=8, tokens=64), settings_of(Pretraining(), 8), 8, model
    )
    groups = find_groups(model, options)
    units = {g.key: [0] for g in groups}
    dead = {g.key: torch.zeros(g.n_units, dtype=torch.bool) for g in groups}
    look = Compensation(model, groups, units, dead, tokens=8, windows=2)
    ids = torch.arange(16).view(2, 8)
    for _ in range(2):  # two forwards of a step
        look.look()
        model(ids)
        model(ids)  # as checkpointing does in backward
    look.rest()
    model(ids)
    assert {len(site.seen) for site in look.sites.values()} == {2}
    look.release()


def test_uniform_widths_stop_at_the_narrowest_layer():
    model = tiny_model("llama", num_key_value_heads=4)
    options = options_of(
        Pretraining(batch=2, length=8, tokens=64, kinds=["ffn"]),
        settings_of(Pretraining(), 8),
        8,
        model,
    )
    mask = StructuredMask()
    first = find_groups(model, options)[0]
    mask.remove(first, torch.arange(first.n_units) < 10)
    shrink(model, mask)
    groups = find_groups(model, options)
    narrow = min(g.n_units for g in groups)
    assert narrow == max(g.n_units for g in groups) - 10
    ledger = UnitLedger(model, groups, 4)
    least = ledger.after({g.key: 2 for g in groups}).parameters
    assert smallest(groups, ledger, Rules(min_ffn=narrow - 2)) == least
    own = smallest(groups, ledger, Rules(min_ffn=narrow - 2, layer_mode="global"))
    assert own < least


def test_an_interrupted_training_leaves_an_ordinary_model(monkeypatch):
    from secateur.run import pretraining
    from secateur.training.hooks import Hook
    from secateur.training.loop import fit

    class Stop(Hook):
        def after_step(self, at):
            if at.step == 8:
                raise RuntimeError("killed")

    monkeypatch.setattr(
        pretraining, "fit", lambda *a, hooks, **more: fit(*a, hooks=[*hooks, Stop()], **more)
    )
    model = tiny_model("llama", num_key_value_heads=4)
    own = SMALL | {"tokens": 4 * 32 * 14, "keep_params": 0.6, "prune_until": 0.9}
    with pytest.raises(RuntimeError, match="killed"):
        secateur.pretrain(model, tiny_tokenizer(), text=ONE, compact_every=0, **own)
    assert structure_of(model).gone
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_a_pace_too_slow_for_its_budget_is_told():
    few = SMALL | {"tokens": 4 * 32 * 8, "keep_params": 0.6, "prune_pace": "every_n_batches"}
    result = secateur.pretrain(
        tiny_model("llama"), tokenizer=tiny_tokenizer(), text=ONE, evaluation=None, **few
    )
    assert any("pace was too slow" in note for note in result.report["notes"])


def test_layers_of_their_own_widths_are_saved_and_opened_again(tmp_path, tiny_folder):
    """(G.10) A shape no plain config can say."""
    out, ids = tmp_path / "out", torch.arange(4, 20)[None]
    result = secateur.pretrain(
        tiny_folder("llama"), text=ONE, out=out, evaluation=None, layer_mode="global",
        **SMALL | {"keep_params": 0.7, "tokens": 4 * 32 * 8},
    )  # fmt: skip
    assert len({layer.mlp.up_proj.out_features for layer in result.model.model.layers}) > 1
    assert not result.report["structure"]["form"]["stock"]
    with torch.no_grad():
        again = secateur.load_pruned(out, dtype=torch.float32)(ids).logits
        assert torch.equal(again, result.model(ids).logits)
