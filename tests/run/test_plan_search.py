"""The search in its folder: files, resuming, refusing, workers, and never worse than the start."""

import json
import os
import signal
import subprocess
import sys
import time
import xml.dom.minidom

import pytest

from secateur.allocation.plan import Plan
from secateur.allocation.search.engine import SearchSettings
from secateur.cli import main
from secateur.errors import UsageError
from secateur.recipe import Recipe
from secateur.run.plan_search import Workers, search_plan
from secateur.run.trials import Trials

SHORT = {"calibration": {"samples": 4, "length": 32}, "search": {"samples": 8}}


def recipe(model="tiny", **changes):
    base = {"model": str(model), "sparsity": 0.7, "allocation": "dsa", "evaluation": None, **SHORT}
    return Recipe.build({**base, **changes})


def settings(budget=24, **changes):
    return SearchSettings(budget=budget, population=8, offspring=4, **changes)


def read(path):
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """One whole search on the packaged model."""
    out = tmp_path_factory.mktemp("searched") / "s"
    return out, search_plan(recipe(), out, settings=settings())


def test_files_of_a_search(searched):
    out, record = searched
    assert read(out / "search.json")["history"] == record["history"]
    assert len(record["history"]) == 24
    plan = Plan.load(out / "plan.json")
    assert plan.removed == plan.target.count(plan.elements)
    found = read(out / "found.json")
    assert found["expression"] == record["best"]["candidate"]
    assert found["scores"] == "wanda"
    svg = (out / "search.svg").read_text()
    xml.dom.minidom.parseString(svg)
    assert "best so far" in svg


def test_never_worse_than_uniform_and_owl_on_the_search_split(searched):
    record = searched[1]
    uniform, owl = record["history"][:2]
    assert uniform["candidate"].endswith("-(0)")
    assert "OUTLIER:5" in owl["candidate"]
    assert uniform["full"]
    assert owl["full"]
    assert record["best"]["value"] <= min(uniform["value"], owl["value"])


def test_what_was_found_can_be_used(searched, tmp_path):
    out, _ = searched
    common = ["prune", "tiny", "--samples", "4", "--length", "32", "--no-eval"]
    plan = [*common, "--allocation", str(out / "plan.json"), "-o", str(tmp_path / "a")]
    assert main(plan) == 0
    function = Recipe.build(
        {**SHORT, "model": "tiny", "sparsity": 0.7, "evaluation": None,
         "allocation": {"name": "dsa", "preset": str(out / "found.json")}}
    )  # fmt: skip
    from secateur.run.runner import execute

    execute(function, out=tmp_path / "b")
    counts = [
        {
            n: m["removed"]
            for n, m in read(tmp_path / x / "secateur" / "plan.json")["modules"].items()
        }
        for x in "ab"
    ]
    assert counts[0] == counts[1]
    assert "How the plan was found" in (tmp_path / "a" / "report.html").read_text()
    assert "How the plan was found" not in (tmp_path / "b" / "report.html").read_text()


def test_measuring_on_the_searched_text_is_said(searched, tmp_path):
    out, _ = searched
    words = [
        "prune",
        "tiny",
        "--samples",
        "4",
        "--length",
        "32",
        "--eval-windows",
        "2",
        "--no-speed",
    ]
    words += ["--eval-length", "32", "--allocation", str(out / "plan.json")]
    for text, said in (("pydoc:train", True), ("pydoc:test", False)):
        assert main([*words, "--eval-text", text, "-o", str(tmp_path / text)]) == 0
        notes = read(tmp_path / text / "report.json")["notes"]
        assert any("searched on the very text" in note for note in notes) == said


def test_finished_again_costs_nothing_and_a_larger_budget_goes_on(searched, monkeypatch):
    out, record = searched
    calls = []
    whole = Trials.__call__
    monkeypatch.setattr(
        Trials, "__call__", lambda self, plan, rung: calls.append(rung) or whole(self, plan, rung)
    )
    again = search_plan(recipe(), out, settings=settings())
    assert again["history"] == record["history"]
    assert calls == []
    longer = search_plan(recipe(), out, settings=settings(28))
    assert longer["history"][:24] == record["history"]
    assert calls.count(0) == 4


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"sparsity": 0.6}, "target"),
        ({"method": "magnitude"}, "method"),
        ({"search": {"samples": 8, "seed": 9}}, "search"),
        ({"search": {"samples": 8, "fitness": "perplexity"}}, "fitness"),
        ({"allocation": {"name": "dsa", "lam": 0.04}}, "allocator"),
    ],
)
def test_another_recipe_in_the_same_folder_is_refused(searched, change, field):
    out, _ = searched
    before = (out / "search.json").read_text()
    with pytest.raises(UsageError, match="the folder holds") as caught:
        search_plan(recipe(**change), out, settings=settings())
    assert caught.value.field == field
    assert (out / "search.json").read_text() == before


def test_another_seed_in_the_same_folder_is_refused(searched):
    with pytest.raises(UsageError) as caught:
        search_plan(recipe(), searched[0], settings=settings(seed=1))
    assert caught.value.field == "seed"


@pytest.mark.slow
def test_killed_outright_it_goes_on_to_the_same_end(tiny_folder, tmp_path):
    folder = tiny_folder("llama")
    words = [
        "allocate", "search", str(folder), "-s", "0.7", "--budget", "40", "--population", "8",
        "--offspring", "4", "--samples", "4", "--length", "32", "--search-samples", "16",
        "--eval-windows", "2", "--json",
    ]  # fmt: skip
    out = tmp_path / "killed"
    child = subprocess.Popen(
        [sys.executable, "-m", "secateur", *words, "-o", str(out)],
        stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    journal = out / "secateur" / "evaluations.jsonl"
    deadline = time.time() + 120
    while time.time() < deadline and not (
        journal.exists() and journal.read_bytes().count(b"\n") >= 6
    ):
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.wait()
    known = journal.read_bytes().count(b"\n")
    assert known >= 6
    assert main([*words, "-o", str(out)]) == 0
    assert main([*words, "-o", str(tmp_path / "whole")]) == 0
    killed, whole = read(out / "search.json"), read(tmp_path / "whole" / "search.json")
    assert killed["resumed_from"] == known
    assert killed["history"] == whole["history"]
    assert killed["best"] == whole["best"]
    assert read(out / "plan.json")["modules"] == read(tmp_path / "whole" / "plan.json")["modules"]


@pytest.mark.slow
def test_processes_on_a_real_model_give_the_serial_history(tiny_folder, tmp_path):
    folder = tiny_folder("llama")
    kinds = {"serial": Workers(), "processes": Workers("processes", 2)}
    found = {
        kind: search_plan(recipe(folder), tmp_path / kind, settings=settings(16), workers=workers)
        for kind, workers in kinds.items()
    }
    assert found["processes"]["history"] == found["serial"]["history"]


@pytest.mark.slow
def test_a_local_ray_on_a_real_model_gives_the_serial_history(tiny_folder, tmp_path):
    pytest.importorskip("ray", reason="the extra 'ray' is not installed")
    folder = tiny_folder("llama")
    serial = search_plan(recipe(folder), tmp_path / "serial", settings=settings(12))
    ray = search_plan(
        recipe(folder), tmp_path / "ray", settings=settings(12), workers=Workers("ray", 2)
    )
    assert ray["history"] == serial["history"]


def test_ratios_are_searched_too(tiny_folder, tmp_path):
    record = search_plan(
        recipe(tiny_folder("llama"), sparsity="2:4"),
        tmp_path / "r",
        space="ratios",
        settings=settings(9, attempts=20),
    )
    assert record["best"]["value"] <= record["start"]
    assert not (tmp_path / "r" / "found.json").exists()
    plan = Plan.load(tmp_path / "r" / "plan.json")
    assert plan.removed == plan.target.count(plan.elements)


def test_methods_with_scores_of_their_own(tiny_folder, tmp_path):
    record = search_plan(
        recipe(
            tiny_folder("llama"),
            method="gblm",
            allocation={"name": "dsa", "scores": "method"},
        ),
        tmp_path / "g",
        settings=settings(10),
    )
    assert read(tmp_path / "g" / "found.json")["scores"] == "method"
    assert len(record["history"]) == 10


@pytest.mark.parametrize(
    ("changes", "arguments", "field"),
    [
        ({"stream": True}, {}, "stream"),
        ({}, {"space": "functions"}, "space"),
        ({"allocation": "owl"}, {}, "allocation"),
        ({"allocation": {"name": "dsa", "preset": "paper"}}, {}, "preset"),
        ({}, {"first": 9}, "first"),
        ({"allocation": {"name": "dsa", "lam": 0.055}}, {}, "lam"),
        ({}, {"workers": Workers("threads")}, "executor"),
        ({"evaluation": {"text": "pydoc"}}, {}, "search.text"),
    ],
)
def test_wrong_requests_are_named_and_leave_no_result(tmp_path, changes, arguments, field):
    if "evaluation" in changes:
        changes = changes | {"search": {"samples": 8, "text": "pydoc", "length": 64}}
        changes["evaluation"] = {"text": "pydoc:train", "length": 64, "windows": None}
    with pytest.raises(UsageError) as caught:
        search_plan(recipe(**changes), tmp_path / "o", settings=settings(), **arguments)
    assert caught.value.field == field
    assert not (tmp_path / "o" / "plan.json").exists()


def test_the_command_speaks(tiny_folder, tmp_path, capsys):
    words = [
        "allocate", "search", str(tiny_folder("llama")), "-s", "0.7", "--budget", "8",
        "--population", "4", "--samples", "4", "--length", "32", "--search-samples", "4",
    ]  # fmt: skip
    assert main([*words, "-o", str(tmp_path / "x"), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["best"]["value"] <= record["start"]
    assert main([*words, "-o", str(tmp_path / "y")]) == 0
    said = capsys.readouterr().out
    assert "preset=" in said
    assert "uniform" in said
    assert main([*words, "-o", str(tmp_path / "z"), "--space", "x"]) == 2
    assert "space" in capsys.readouterr().err
    assert not (tmp_path / "z").exists()
