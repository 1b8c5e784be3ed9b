"""Tables, prices, recipes, stored forests and the command line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.datasets import dump_svmlight_file, load_breast_cancer, load_diabetes, load_iris
from sklearn.ensemble import (
    ExtraTreesRegressor,
    RandomForestClassifier,
)
from typer.testing import CliRunner

from secateur.cli.forest import app
from secateur.errors import SecateurError, UsageError
from secateur.forests import ForestInputError, load_forest, save_forest
from secateur.forests.recipe import read_recipe
from secateur.forests.tables import read_costs, read_table

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory):
    """A table in three formats, and prices in two."""
    folder = tmp_path_factory.mktemp("forest")
    x, y = load_breast_cancer(return_X_y=True)
    names = [f"f{i}" for i in range(30)]
    frame = pd.DataFrame(x, columns=names).assign(y=y)
    frame.to_csv(folder / "data.csv", index=False)
    frame.to_parquet(folder / "data.parquet")
    dump_svmlight_file(x, y, str(folder / "data.svm"), zero_based=False)
    prices = pd.DataFrame({"feature": names, "cost": np.arange(30) % 3 + 1.0})
    prices.to_csv(folder / "costs.csv", index=False)
    (folder / "costs.yaml").write_text(
        "\n".join(f"{n}: {{cost: 2, group: g{i // 10}}}" for i, n in enumerate(names))
    )
    return folder


def run(*arguments: object):
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.mark.parametrize("strings", [False, True])
def test_a_stored_forest_predicts_the_same(tmp_path, strings: bool) -> None:
    frame = load_iris(as_frame=True)
    y = frame.target_names[frame.target] if strings else frame.target
    forest = RandomForestClassifier(5, random_state=0).fit(frame.data, y)
    save_forest(forest, tmp_path / "forest.npz")
    again = load_forest(tmp_path / "forest.npz")
    np.testing.assert_array_equal(again.predict(frame.data), forest.predict(frame.data))
    np.testing.assert_array_equal(again.predict_proba(frame.data), forest.predict_proba(frame.data))
    assert list(again.feature_names_in_) == list(frame.data.columns)
    assert again.get_params()["n_estimators"] == 5


def test_a_stored_regressor_and_files_that_are_none(tmp_path) -> None:
    x, y = load_diabetes(return_X_y=True)
    forest = ExtraTreesRegressor(4, random_state=0).fit(x, y)
    save_forest(forest, tmp_path / "f.npz")
    np.testing.assert_array_equal(load_forest(tmp_path / "f.npz").predict(x), forest.predict(x))
    (tmp_path / "no.npz").write_bytes(b"PK nothing")
    np.savez(tmp_path / "other.npz", a=np.ones(3))
    np.savez(tmp_path / "pickled.npz", header=np.array([{}], dtype=object))
    for name in ("no.npz", "other.npz", "pickled.npz", "absent.npz"):
        with pytest.raises(ForestInputError, match="not a forest"):
            load_forest(tmp_path / name)


def test_tables_of_all_formats_agree(folder) -> None:
    csv, parquet = (read_table(folder / f"data.{e}", "y") for e in ("csv", "parquet"))
    svm = read_table(folder / "data.svm", None)
    np.testing.assert_array_equal(csv.x.to_numpy(), parquet.x.to_numpy())
    np.testing.assert_allclose(csv.x.to_numpy(), svm.x.to_numpy(), rtol=1e-6)
    assert csv.classify
    assert not read_table(folder / "data.csv", "f0").classify
    assert read_table(folder / "data.csv", "y", "regression").classify is False


@pytest.mark.parametrize(
    ("file", "text", "target", "words"),
    [
        ("a.csv", "a,y\n1,0\n", "z", "target='z'"),
        ("a.csv", "a,y\nred,0\n", "y", "holds words"),
        ("a.csv", "a,y\n1,\n", "y", "no target"),
        ("a.txt", "", "y", "unknown kind"),
        ("absent.csv", None, "y", "no such file"),
        ("a.csv", "a,y\n1,0\n1,2,3,4\n", "y", "cannot be read as csv"),
        ("a.csv", "", "y", "cannot be read as csv"),
        ("a.csv", "a,y\n", "y", "no rows"),
        ("a.csv", "y\n1\n0\n", "y", "no feature"),
        ("a.csv", "a,y\n1,0\ninf,1\n", "y", "data='a': row 2 is infinite"),
        ("a.csv", "a,y\n1,0\n1e99,1\n", "y", "too large"),
        ("a.csv", "a,y\n1,inf\n2,1\n", "y", "targets must be finite"),
        ("a.csv", "a,y\n1,3\n2,3\n", "y", "same target"),
        ("a.parquet", "junk", "y", "cannot be read as parquet"),
        ("a.svm", "1 a:b\n", None, "cannot be read as svmlight"),
    ],
)
def test_wrong_tables_are_named(tmp_path, file, text, target, words) -> None:
    if text is not None:
        (tmp_path / file).write_text(text)
    with pytest.raises(SecateurError, match=words):
        read_table(tmp_path / file, target)


def test_prices_and_groups(folder, tmp_path) -> None:
    names = [f"f{i}" for i in range(30)]
    assert read_costs(None, names) == (None, None)
    costs, groups = read_costs(folder / "costs.csv", names)
    assert costs is not None
    assert (costs["f4"], groups) == (2.0, None)
    costs, groups = read_costs(folder / "costs.yaml", names)
    assert groups is not None
    assert groups[:11] == ["g0"] * 10 + ["g1"]
    for text, words in (
        ("f0: 1", "feature='f1'"),
        ("f0: cheap\nf1: 2", "no number"),
        ("[1]", "must map"),
        ("f0: [1", "cannot be read as YAML"),
        ("f0: -1\nf1: 2", "0 or more"),
        ("f0: 1\nf1: 2\nf9: 1", "feature='f9'"),
    ):
        (tmp_path / "c.yaml").write_text(text)
        with pytest.raises(SecateurError, match=words):
            read_costs(tmp_path / "c.yaml", ["f0", "f1"])
    (tmp_path / "c.csv").write_text("feature,cost\nf0,1\nf1,1\nf0,7\n")
    with pytest.raises(SecateurError, match="twice"):
        read_costs(tmp_path / "c.csv", ["f0", "f1"])


def test_recipes_name_what_is_wrong(tmp_path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("data: d.csv\nbudget: 3\n")
    assert read_recipe(file, {"trees": 5}).trees == 5
    for text, words in (
        ("data: d.csv\nbugdet: 3", "bugdet"),
        ("data: d.csv\nbudget: -3", "budget"),
        ("budget: 3", "data"),
        ("data: d.csv\nlam: .inf", "lam"),
        ("data: d.csv\njobs: 0", "no work"),
        ("data: d.csv\nseed: -1", "seed"),
        ("data: d.csv\nsolver: simplex", "solver='simplex'"),
        ("data: [", "cannot be read as YAML"),
        ("data: d.csv\ntest: 0.6\nvalidation: 0.5", "nothing to train"),
    ):
        file.write_text(text)
        with pytest.raises(UsageError, match=words):
            read_recipe(file, {})


def test_prune_writes_a_forest_figures_and_a_page(folder, tmp_path) -> None:
    out = tmp_path / "out"
    common = ["--target", "y", "--trees", 8, "--costs", folder / "costs.csv", "--out", out]
    result = run("prune", folder / "data.csv", "--budget", 5, *common)
    assert result.exit_code == 0, result.output
    assert "budget 5" in result.output
    record = json.loads((out / "result.json").read_text())
    assert record["optimum"]["cost"] <= 5
    assert record["after"]["cost"] < record["before"]["cost"]
    assert record["optimum"]["dual_bound"] <= record["optimum"]["objective"] + 1e-12
    forest = load_forest(out / "forest.npz")
    assert sum(t.tree_.node_count for t in forest.estimators_) == record["after"]["nodes"]
    page = (out / "report.html").read_text()
    for title in ("Score against cost", "Nodes against cost", "ask for a feature"):
        assert title in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    (out / "report.html").unlink()
    assert run("report", out).exit_code == 0
    assert (out / "report.html").read_text() == page


def test_path_compare_and_json(folder, tmp_path) -> None:
    data, out = folder / "data.parquet", tmp_path / "out"
    result = run("path", data, "--target", "y", "--trees", 5, "--points", 0, "-o", out)
    assert result.exit_code == 0, result.output
    assert "all of them" in result.output
    result = run(
        "compare", data, "--target", "y", "--trees", 4, "-m", "budgetprune", "-m", "greedy",
        "--seeds", 2, "-o", out, "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert {row["method"] for row in record["table"]} == {"budgetprune", "greedy"}
    assert "greedy" in (out / "report.html").read_text()
    result = run(
        "compare", data, "--target", "y", "--trees", 4, "-m", "budgetprune", "-m", "greedy", "-m",
        "depth", "--costs", folder / "costs.yaml", "--seeds", 1, "-o", tmp_path / "c", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    unpruned_cost = json.loads(result.stdout)["unpruned"][0][1]
    assert unpruned_cost <= 3 * 2, "three groups at 2 each, each paid once"
    groups = run(
        "prune", data, "--target", "y", "--trees", 4, "--costs", folder / "costs.yaml", "--lam",
        0.01, "-o", out, "--json",
    )  # fmt: skip
    assert set(json.loads(groups.stdout)["after"]["usage"]) == {"g0", "g1", "g2"}


def test_wrong_requests_end_in_a_message(folder, tmp_path) -> None:
    data = folder / "data.csv"
    for arguments, words in (
        (["prune", data, "--target", "y"], "one of --budget and --lam"),
        (["prune", data, "--target", "q", "--lam", 1], "target='q'"),
        (["prune", data, "--target", "y", "--budget", 1, "--solver", "primal_dual"], "nested"),
        (["path", data, "--target", "y", "--solver", "primal_dual"], "nested"),
        (["prune", data, "--target", "y", "--lam", 1, "-o", data], "in the way"),
        (["report", tmp_path], "no result.json"),
        (["compare", data, "--target", "y", "-m", "gredy"], "did you mean 'greedy'"),
    ):
        caught = run(
            *arguments,
            *([] if arguments[0] == "report" or "-o" in arguments else ["-o", tmp_path / "o"]),
        )
        assert isinstance(caught.exception, SecateurError)
        assert words in str(caught.exception)
        assert caught.exception.exit_code == 2
    assert not (tmp_path / "o").exists()


def test_the_primal_dual_prunes_from_the_command_line(folder, tmp_path) -> None:
    result = run(
        "prune", folder / "data.csv", "--target", "y", "--trees", 4, "--lam", 0.01, "--solver",
        "primal_dual", "-o", tmp_path, "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert record["optimum"]["solver"] == "primal_dual"
    assert record["optimum"]["gap"] < 0.01 * record["optimum"]["objective"]
    assert len(record["path"]) > 2


@pytest.mark.parametrize(
    "file", sorted((ROOT / "recipes" / "forests").glob("*.yaml")), ids=lambda p: p.stem
)
def test_shipped_recipes_run(folder, tmp_path, monkeypatch, file) -> None:
    words = re.search(
        r"^#   secateur forest (\w+) --recipe (\S+) --out \S+", file.read_text(), re.M
    )
    assert words, "a recipe says how it is run"
    assert ROOT / words[2] == file
    assert words[2] in (ROOT / "docs" / "recipes.md").read_text()
    monkeypatch.chdir(folder)
    result = run(words[1], "--recipe", file, "--trees", 5, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "report.html").exists()


@pytest.mark.parametrize("command", ["prune", "path", "compare", "report"])
def test_help_shows_an_example(command: str) -> None:
    assert f"secateur forest {command}" in run(command, "--help").output
