"""Allocators in whole runs: readings gathered once, plans kept, streamed, resumed, patterned."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import secateur
from secateur.allocation import Plan, allocators
from secateur.allocation.plan import UnitCut
from secateur.allocation.summary import block_ratios, role_ratios, summary
from secateur.errors import UsageError
from secateur.evidence.readings import sampled_positions
from secateur.masks.target import Target
from secateur.models.tiny import VOCABULARY, tiny_model, tiny_tokenizer
from secateur.recipe import Recipe

IDS = torch.randint(4, VOCABULARY, (6, 32), generator=torch.Generator().manual_seed(3))
STILL = [n for n in allocators if not allocators[n].searches]
SETTINGS = {"calibration": IDS, "samples": 6, "length": 32}


def plan_of(folder):
    return Plan.of_record(json.loads((folder / "secateur" / "plan.json").read_text()))


@pytest.mark.parametrize("name", STILL)
def test_every_allocator_on_a_real_run_is_exact(name):
    result = secateur.prune(
        tiny_model("llama"), tiny_tokenizer(), sparsity=0.37, allocation=name, **SETTINGS
    )
    totals = result.report["totals"]
    assert totals["zeros"] == Target(0.37).count(totals["elements"])
    assert result.report["allocation"]["allocator"] == name


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "ria", "gblm"])
@pytest.mark.parametrize("sparsity", [0.5, "4:8"])
def test_every_method_follows_an_uneven_plan(method, sparsity):
    allocation = {"name": "incremental", "width": 0.4}
    result = secateur.prune(
        tiny_model("llama"),
        tiny_tokenizer(),
        method=method,
        sparsity=sparsity,
        allocation=allocation,
        **SETTINGS,
    )
    delivered = {m["delivered_count"] / (m["shape"][0] * m["shape"][1]) for m in _modules(result)}
    assert len(delivered) > 1
    if sparsity == "4:8":
        kept = {
            tuple((~mask).view(mask.shape[0], -1, 8).sum(-1).unique().tolist())
            for mask in result.masks.values()
        }
        assert all(len(k) == 1 for k in kept)
        assert len(kept) > 1


def test_an_uneven_plan_foretells_no_2_4_storage(tiny_folder, tmp_path):
    """Half of its matrices keep one or three of four, which no 2:4 kernel can store."""
    settings = {**SETTINGS, "sparsity": "2:4", "method": "magnitude"}
    model = str(tiny_folder("llama"))
    even = secateur.prune(model, out=tmp_path / "even", **settings)
    steep = {"name": "incremental", "width": 0.6, "shape": "linear"}
    odd = secateur.prune(model, out=tmp_path / "odd", allocation=steep, **settings)
    assert len({m["scope"] for m in _modules(odd)}) > 1
    assert even.report["size"]["disk"]["semi_structured"]
    assert not odd.report["size"]["disk"].get("semi_structured")


def _modules(result):
    return result.report["modules"]


@pytest.mark.parametrize("name", ["als", "alphapruning", "lamp"])
def test_a_streamed_run_plans_the_same(tiny_folder, tmp_path, name):
    model = str(tiny_folder("llama"))
    settings = {**SETTINGS, "sparsity": 0.5, "allocation": name}
    secateur.prune(model, out=tmp_path / "whole", **settings)
    secateur.prune(model, out=tmp_path / "streamed", stream=True, **settings)
    whole, streamed = plan_of(tmp_path / "whole"), plan_of(tmp_path / "streamed")
    assert whole.ratios == pytest.approx(streamed.ratios, abs=1e-3)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("feature", ["output", "gate"])
def test_als_compares_other_activations_too(family, feature):
    allocation = {"name": "als", "feature": feature, "mu": "global", "component_feature": "input"}
    plan = secateur.allocate(
        tiny_model(family), tiny_tokenizer(), sparsity=0.5, allocation=allocation, **SETTINGS
    )
    assert plan.removed == Target(0.5).count(plan.elements)
    assert len(set(plan.ratios.values())) > 1


def test_mixtures_of_experts_are_planned_too():
    result = secateur.prune(
        tiny_model("mixtral"), tiny_tokenizer(), sparsity=0.5, allocation="als", **SETTINGS
    )
    assert result.report["totals"]["delivered"] == 0.5


def test_readings_are_gathered_once_and_kept(tiny_folder, tmp_path, monkeypatch):
    from secateur.evidence import redundancy

    calls = []
    read = redundancy.BlockFeatures.read
    monkeypatch.setattr(
        redundancy.BlockFeatures, "read", lambda self, b: (calls.append(b.index), read(self, b))[1]
    )
    model = str(tiny_folder("llama"))
    settings = {**SETTINGS, "sparsity": 0.5, "evidence": tmp_path / "evidence"}
    secateur.prune(model, allocation="als", **settings)
    blocks = len(calls)
    secateur.prune(model, allocation={"name": "als", "width": 0.05}, **settings)
    assert len(calls) == blocks
    secateur.prune(model, allocation={"name": "als", "tokens": 50}, **settings)
    assert len(calls) == 2 * blocks


def test_a_folder_keeps_its_plan(tiny_folder, tmp_path, monkeypatch):
    """A resumed run follows the plan it began with and does not make another."""
    from secateur.run import runner

    model, out = str(tiny_folder("llama")), tmp_path / "run"
    settings = {**SETTINGS, "sparsity": 0.5, "allocation": "als", "out": out}
    first = secateur.prune(model, **settings)
    plan = plan_of(out)
    monkeypatch.setattr(runner, "make_plan", lambda *_: pytest.fail("planned again"))
    again = secateur.prune(model, **settings)
    assert plan_of(out) == plan
    assert again.report["totals"] == first.report["totals"]
    with pytest.raises(UsageError, match="allocation"):
        secateur.prune(model, **{**settings, "allocation": "uniform"})


RANKS = """
import sys, torch
torch.set_num_threads(1)
import secateur
ids = torch.load(sys.argv[3], weights_only=True)
secateur.prune(sys.argv[1], out=sys.argv[2], calibration=ids, samples=6, length=32, sparsity=0.5,
               allocation={"name": "als", "tokens": 64})
"""


@pytest.mark.slow
def test_two_ranks_plan_what_one_plans(tiny_folder, tmp_path):
    model = str(tiny_folder("llama"))
    program, ids = tmp_path / "program.py", tmp_path / "ids.pt"
    program.write_text(RANKS)
    torch.save(IDS, ids)
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
        *(str(program), model, str(tmp_path / "two"), str(ids)),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    allocation = {"name": "als", "tokens": 64}
    secateur.prune(model, out=tmp_path / "one", sparsity=0.5, allocation=allocation, **SETTINGS)
    assert plan_of(tmp_path / "two").ratios == pytest.approx(
        plan_of(tmp_path / "one").ratios, abs=1e-3
    )


# -- the plan's file -------------------------------------------------------------------------------


def test_a_plan_survives_json(tmp_path):
    shapes = {"layers.0.q": (4, 8), "layers.1.q": (4, 8)}
    plan = Plan(
        Target.parse("4:8"),
        shapes,
        {"layers.0.q": 12, "layers.1.q": 20},
        {"allocator": "als", "options": {"mu": "row"}},
        {"layers.0.q": (5, 8), "layers.1.q": (3, 8)},
        {"layers.0:heads": UnitCut(8, 6, 100)},
    )
    assert Plan.of_record(json.loads(json.dumps(plan.record()))) == plan
    matrices = replace(plan, units={})
    assert block_ratios(matrices) == {"layers.0": 0.375, "layers.1": 0.625}
    assert role_ratios(matrices) == {"q": 0.5}
    assert block_ratios(plan) == {"layers.0": 0.75}
    assert role_ratios(plan) == {"heads": 0.75}
    assert summary(plan)["achieved"] == 0.75


def test_a_pattern_is_edited_by_hand(tmp_path):
    path = tmp_path / "plan.json"
    record = Plan(Target.parse("2:4"), {"a": (4, 8)}, {"a": 16}, patterns={"a": (2, 4)}).record()
    record["modules"]["a"]["pattern"] = "3:4"
    path.write_text(json.dumps(record))
    assert Plan.load(path).counts == {"a": 8}
    record["modules"]["a"]["pattern"] = "0.5"
    path.write_text(json.dumps(record))
    with pytest.raises(UsageError, match="written N:M"):
        Plan.load(path)


def test_an_edited_plan_that_misses_its_target_says_so(tmp_path):
    model = tiny_model("llama")
    path = tmp_path / "plan.json"
    record = secateur.allocate(model, allocation="incremental", sparsity=0.3).record()
    next(iter(record["modules"].values()))["removed"] = 0
    path.write_text(json.dumps(record))
    result = secateur.prune(model, tiny_tokenizer(), allocation=str(path), **SETTINGS)
    assert any("edited by hand" in note for note in result.report["notes"])


def test_a_plan_of_matrices_guides_a_structured_run(tiny_folder, tmp_path):
    model = str(tiny_folder("llama"))
    path = tmp_path / "plan.json"
    wished = secateur.allocate(model, allocation="incremental", sparsity=0.3)
    path.write_text(json.dumps(wished.record()))
    common = {"method": "unit-magnitude", "evaluation": None}
    secateur.prune(model, allocation=str(path), out=tmp_path / "a", **common)
    secateur.prune(model, allocation="incremental", sparsity=0.3, out=tmp_path / "b", **common)
    plans = [json.loads((tmp_path / x / "secateur" / "plan.json").read_text()) for x in "ab"]
    assert plans[0]["units"] == plans[1]["units"]
    assert plans[0]["target"] == plans[1]["target"] == "0.3"
    told = json.loads((tmp_path / "a" / "report.json").read_text())
    assert told["structure"]["target"]["asked"] == 0.3
    for saved in (path, tmp_path / "a" / "secateur" / "plan.json"):
        with pytest.raises(UsageError, match=r"the plan was made for 0\.3"):
            secateur.prune(model, allocation=str(saved), sparsity=0.4, out=tmp_path / "c", **common)


@pytest.mark.parametrize("allocation", ["global", "atp", {"name": "dsa", "scores": "method"}])
def test_allocators_that_rank_weights_do_not_go_with_units(allocation):
    with pytest.raises(UsageError, match="ranks whole units") as caught:
        secateur.prune(
            tiny_model("llama"),
            tiny_tokenizer(),
            method="unit-magnitude",
            allocation=allocation,
            **SETTINGS,
        )
    assert caught.value.field == "allocation"


@pytest.mark.parametrize("removed", [1.5, "2", None, True])
def test_what_is_removed_is_a_whole_number(removed):
    record = Plan(Target(0.5), {"a": (2, 2)}, {"a": 2}).record()
    record["modules"]["a"]["removed"] = removed
    with pytest.raises(UsageError, match="'a': what is removed is a whole number"):
        Plan.of_record(record)


def test_units_are_checked():
    record = Plan(
        Target(0.5), {"a": (2, 2)}, {"a": 2}, units={"b:heads": UnitCut(4, 2, 1)}
    ).record()
    record["units"]["b:heads"]["removed"] = 5
    with pytest.raises(UsageError, match="4 units"):
        Plan.of_record(record)


# -- the sample of tokens, recipes -----------------------------------------------------------------


def test_sampled_tokens_are_real_distinct_and_from_the_first_windows():
    mask = torch.ones(4, 10, dtype=torch.bool)
    mask[0, 5:] = False
    places = sampled_positions(mask, 4, 10, 12)
    assert len(set(places.tolist())) == 12
    assert bool(mask.reshape(-1)[places].all())
    assert int(places.max()) < 20
    assert len(sampled_positions(None, 2, 5, 100)) == 10


@pytest.mark.parametrize(
    ("allocation", "words"),
    [
        ("alss", "did you mean 'als'"),
        ({"mu": "row"}, "has a name"),
        ({"name": "als", "muu": 1}, "no such option"),
        ({"name": "als", "width": "wide"}, "width"),
        ({"name": "als", "min_sparsity": 0.6}, "cannot be met"),
        ({"name": "plan.json", "mu": 1}, "has no options"),
    ],
)
def test_wrong_allocations_leave_the_model_as_it_was(allocation, words):
    model = tiny_model("llama")
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(UsageError) as caught:
        secateur.prune(model, tiny_tokenizer(), sparsity=0.5, allocation=allocation, **SETTINGS)
    assert words in str(caught.value)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_an_allocation_without_options_is_its_name():
    recipe = Recipe.build({"model": "tiny", "allocation": {"name": "als"}})
    assert recipe.allocation == "als"


def test_allocate_from_python_and_compare(tiny_folder, tmp_path):
    model = str(tiny_folder("llama"))
    plan = secateur.allocate(model, allocation="incremental", sparsity=0.6, **SETTINGS)
    assert plan.removed == Target(0.6).count(plan.elements)
    assert plan.provenance["allocator"] == "incremental"
    again = secateur.allocate(tiny_model("llama"), allocation="incremental", sparsity=0.6)
    assert again.counts == plan.counts
