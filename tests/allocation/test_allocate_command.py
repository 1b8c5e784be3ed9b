"""``secateur allocate``: what it prints, writes and refuses."""

from __future__ import annotations

import json

import pytest

from secateur.cli import main

SMALL = ["--samples", "4", "--length", "64"]


def told(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.fixture
def plan(tmp_path, capsys):
    path = tmp_path / "plan.json"
    assert (
        main(["allocate", "make", "tiny", "-a", "incremental", "-s", "0.6", "-o", str(path)]) == 0
    )
    capsys.readouterr()
    return path


def test_make_writes_a_plan_and_says_what_is_in_it(tmp_path, capsys):
    path = tmp_path / "plan.json"
    words = ["make", "tiny", "-a", "als", "-A", "width=0.05", "-s", "0.5", "-o", str(path)]
    assert main(["allocate", *words, *SMALL, "--json"]) == 0
    record = told(capsys)
    assert record["achieved"] == 0.5
    assert record["provenance"]["options"] == {"width": 0.05}
    assert json.loads(path.read_text())["removed"] * 2 == json.loads(path.read_text())["elements"]


def test_show_draws_every_block(plan, capsys):
    assert main(["allocate", "show", str(plan), "--matrices"]) == 0
    out = capsys.readouterr().out
    assert "60.000%" in out
    assert out.count("█") > 100
    assert "model.layers.5" in out
    assert "model.layers.0.self_attn.q_proj" in out


def test_compare_puts_allocators_and_plans_side_by_side(plan, tmp_path, capsys):
    page = tmp_path / "page"
    names = [w for n in ("uniform", "alphapruning", "als", str(plan)) for w in ("-a", n)]
    words = ["allocate", "compare", "tiny", *names, "-s", "0.6", *SMALL, "--page", str(page)]
    assert main([*words, "--json"]) == 0
    plans = told(capsys)["plans"]
    assert list(plans) == ["uniform", "alphapruning", "als", str(plan)]
    assert all(p["achieved"] == pytest.approx(0.6, abs=1e-6) for p in plans.values())
    html = (page / "report.html").read_text()
    assert html.count("<svg") >= 3
    assert "alphapruning" in html
    assert main(words) == 0
    assert "page written" in capsys.readouterr().out


def test_a_run_follows_the_plan_and_draws_it(plan, tmp_path, capsys):
    out = tmp_path / "run"
    words = ["prune", "tiny", "-m", "magnitude", "-a", str(plan), "-s", "0.6", "--no-eval"]
    assert main([*words, "--out", str(out), "--json"]) == 0
    report = told(capsys)
    assert report["allocation"]["allocator"] == "file"
    assert report["totals"]["delivered"] == pytest.approx(0.6, abs=1e-6)
    assert "how much each block gives" in (out / "report.html").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["make", "tiny", "-a", "alls", "-o", "p.json"], "did you mean"),
        (["make", "tiny", "-a", "als", "-o", "p.txt"], ".json"),
        (["make", "tiny", "-a", "als", "-A", "wide=1", "-o", "p.json"], "no such option"),
        (["make", "tiny", "-a", "als", "-A", "min_sparsity=0.9", "-o", "p.json"], "cannot be met"),
        (["make", "tiny", "-s", "1.5", "-o", "p.json"], "[0, 1)"),
        (["show", "absent.json"], "not a plan: No such file"),
        (["search", "tiny", "--workers", "0", "-o", "s"], "workers=0"),
        (["search", "tiny", "--executor", "threads", "-o", "s"], "executor='threads'"),
        (["search", "tiny", "-A", "lam=0.075", "-o", "s"], "whole hundredths"),
        (
            [
                "search",
                "tiny",
                "--search-text",
                "pydoc:test",
                "--eval-text",
                "pydoc:test",
                "--search-samples",
                "4",
                "--eval-windows",
                "1",
                "-o",
                "s",
            ],
            "the very text",
        ),
        (["compare", "tiny", "-a", "absent.json"], "not a plan"),
    ],
)
def test_bad_input_is_told_and_writes_nothing(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = SMALL if words[0] != "show" else []
    assert main(["allocate", *words, *small]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


def test_compare_takes_all_that_need_no_search_and_tells_their_warnings(capsys):
    words = ["allocate", "compare", "tiny", "-m", "magnitude", "-s", "0.7", *SMALL, "--json"]
    assert main(words) == 0
    plans = told(capsys)["plans"]
    assert {"dsa", "owl", "dlp", "als", "global", "lamp", "uniform"} <= set(plans)
    assert "atp" not in plans
    for name in ("er", "lamp", "global"):
        assert any("collapse" in note for note in plans[name]["provenance"]["notes"])


def test_a_run_refused_at_its_start_does_not_occupy_its_folder(plan, tmp_path, capsys):
    words = ["prune", "tiny", "-m", "magnitude", "-a", str(plan), "--no-eval", "--no-speed"]
    words += ["--out", str(tmp_path / "run")]
    assert main([*words, "-s", "0.7"]) == 2
    assert "the plan was made for 0.6" in capsys.readouterr().err
    assert main([*words, "-s", "0.6"]) == 0
    assert main([*words, "-s", "0.7"]) == 2
    assert "the folder holds" in capsys.readouterr().err


def test_a_function_refused_on_this_model_leaves_its_folder_free(tmp_path, capsys):
    words = ["prune", "tiny", "-m", "wanda", "-s", "0.6", "-a", "dsa", *SMALL, "--no-eval"]
    words += ["--no-speed", "--out", str(tmp_path / "run"), "-A"]
    assert main([*words, "expression=W:(NO_OP)-(MEAN)-(LOG,LOG)"]) == 1
    assert "LOG of" in capsys.readouterr().err
    assert main([*words, "expression=W:(NO_OP)-(MEAN)-(NO_OP)"]) == 0


def test_the_allocators_are_listed(capsys):
    assert main(["allocators", "--json"]) == 0
    rows = {row["name"]: row for row in told(capsys)["allocators"]}
    assert {"uniform", "als", "alphapruning", "incremental", "lamp", "er", "global"} <= set(rows)
    assert rows["als"]["needs"] == ["token sample", "weights"]
    assert rows["uniform"]["needs"] == []
    assert rows["lamp"]["needs"] == ["weights"]
    assert main(["allocators"]) == 0
    assert "min_sparsity" in capsys.readouterr().out


def test_methods_with_allocators_are_compared(tmp_path, capsys):
    out = tmp_path / "table"
    words = ["compare", "tiny", "-m", "magnitude,magnitude@als,wanda@incremental", "-s", "0.7"]
    small = ["--eval-length", "64", "--eval-windows", "4", *SMALL]
    assert main([*words, *small, "--out", str(out), "--json"]) == 0
    found = told(capsys)["perplexity"]
    assert list(found) == ["magnitude", "magnitude@als", "wanda@incremental"]
    assert found["magnitude"]["0.7"] != found["magnitude@als"]["0.7"]
