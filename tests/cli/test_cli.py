"""The command line in process: words, exit codes, JSON."""

import json
import shutil
import subprocess
import sys

import pytest

import secateur
from secateur.cli import COMMANDS, main


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, tiny_folder):
    folder = tmp_path_factory.mktemp("cli")
    text = folder / "text.txt"
    text.write_text(
        "\n\n".join(f"Paragraph {i} speaks of roses and of pruning shears." for i in range(200))
    )
    model = str(tiny_folder("llama"))
    code = main(
        [
            "prune",
            model,
            "--method",
            "sparsegpt",
            "--sparsity",
            "0.5",
            "--calibration",
            str(text),
            "--samples",
            "4",
            "--length",
            "32",
            "--eval-text",
            str(text),
            "--eval-length",
            "32",
            "--eval-windows",
            "4",
            "--no-speed",
            "--out",
            str(folder / "run"),
        ]
    )
    assert code == 0
    return folder / "run", model, text


def output(capsys, words):
    code = main(words)
    return code, capsys.readouterr().out


def test_prune_left_everything(run_folder):
    folder, _, _ = run_folder
    for name in (
        "config.json",
        "model.safetensors.index.json",
        "masks.safetensors",
        "report.html",
        "report.md",
        "report.json",
        "secateur/result.json",
        "secateur/recipe.yaml",
        "secateur/plan.json",
        "secateur/events.jsonl",
    ):
        assert (folder / name).exists(), name
    assert not (folder / "secateur" / "state").exists()


def test_eval_json(run_folder, capsys):
    folder, model, text = run_folder
    words = ["eval", str(folder), "--text", str(text), "--length", "32", "--windows", "4", "--json"]
    code, out = output(capsys, words)
    record = json.loads(out)
    assert code == 0
    recorded = json.loads((folder / "report.json").read_text())["quality"]
    assert record["perplexity"] == pytest.approx(recorded["pruned"]["perplexity"], rel=1e-4)
    assert record["protocol"]["digest"] == recorded["protocol"]["digest"]
    code, out = output(capsys, [*words[:-1], "--dense", model, "--json"])
    record = json.loads(out)
    assert record["dense_perplexity"] == pytest.approx(recorded["dense"]["perplexity"], rel=1e-4)
    assert record["kl"] > 0
    assert 0 <= record["top1_agreement"] <= 1


def test_run_repeats_a_recipe(run_folder, capsys, tmp_path):
    folder, _, _ = run_folder
    words = [
        "run",
        str(folder / "secateur" / "recipe.yaml"),
        "--out",
        str(tmp_path / "b"),
        "--json",
    ]
    code, out = output(capsys, words)
    assert code == 0
    assert json.loads(out)["totals"]["delivered"] == 0.5
    for path in folder.glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_plan(run_folder, capsys, tmp_path):
    _, model, _ = run_folder
    saved = tmp_path / "plan.json"
    code, out = output(capsys, ["plan", model, "-s", "0.5", "--save", str(saved), "--json"])
    record = json.loads(out)
    assert code == 0
    assert record["plan"]["removed"] * 2 == record["plan"]["elements"]
    assert saved.exists()
    assert "none" in record["speed"]
    assert main(["plan", model, "-s", "2:4"]) == 0
    assert main(["plan", model, "-s", "0.7", "--pattern", "2:4"]) == 2


def test_why(run_folder, capsys):
    folder, _, _ = run_folder
    code, out = output(capsys, ["why", "model.layers.1.mlp.up_proj", "--run", str(folder)])
    assert code == 0
    assert "50.0000%" in out
    code, out = output(capsys, ["why", "layers.1", "--run", str(folder), "--json"])
    assert len(json.loads(out)["matches"]) == 7
    assert main(["why", "model.layer.1.mlp.up_proj", "--run", str(folder)]) == 2
    assert "did you mean" in capsys.readouterr().err


def test_verify_and_report(run_folder, capsys):
    folder, _, _ = run_folder
    code, out = output(capsys, ["verify", str(folder), "--json"])
    assert code == 0
    assert json.loads(out)["verified"]
    assert main(["report", str(folder)]) == 0
    assert main(["verify", str(folder.parent)]) == 2


def test_brackets_in_a_path_are_no_markup(run_folder, capsys, tmp_path):
    odd = tmp_path / "roses[red]pruned[/]"
    shutil.copytree(run_folder[0], odd)
    code, out = output(capsys, ["report", str(odd)])
    assert code == 0
    assert str(odd) in out.replace("\n", "")
    assert main(["plan", "tiny", "--sparsity", "0.5", "--save", str(odd / "plan.json")]) == 0
    assert f"written to {odd / 'plan.json'}" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["bitmask", "gguf"])
def test_export(run_folder, capsys, tmp_path, kind):
    folder, _, _ = run_folder
    code, out = output(
        capsys,
        [
            "export",
            str(folder),
            "--format",
            kind,
            "--dtype",
            "bfloat16",
            "--out",
            str(tmp_path / "model.gguf"),
            "--json",
        ],
    )
    assert code == 0, out
    assert json.loads(out)["bytes"] > 0
    assert main(["export", str(folder), "--format", "zip", "--out", "x"]) == 2


def test_compare(run_folder, capsys, tmp_path):
    _, model, text = run_folder
    words = [
        "compare",
        model,
        "--methods",
        "magnitude,wanda,sparsegpt,wanda+exact",
        "--sparsity",
        "0.5,2:4",
        "--calibration",
        str(text),
        "--samples",
        "4",
        "--length",
        "32",
        "--eval-text",
        str(text),
        "--eval-length",
        "32",
        "--eval-windows",
        "2",
        "--out",
        str(tmp_path / "c"),
        "--json",
    ]
    code, out = output(capsys, words)
    assert code == 0
    record = json.loads(out)
    assert set(record["perplexity"]) == {"magnitude", "wanda", "sparsegpt", "wanda+exact"}
    assert all(set(row) == {"0.5", "2:4"} for row in record["perplexity"].values())
    assert (tmp_path / "c" / "report.html").exists()
    code, again = output(capsys, words)
    assert json.loads(again)["perplexity"] == record["perplexity"]


def test_lists(capsys):
    code, out = output(capsys, ["methods", "--json"])
    assert code == 0
    names = {m["name"] for m in json.loads(out)["methods"]}
    assert {"magnitude", "wanda", "gblm", "sparsegpt", "ria"} <= names
    code, out = output(capsys, ["texts", "--json"])
    assert "pydoc" in {t["name"] for t in json.loads(out)["texts"]}
    assert main(["methods"]) == 0
    assert main(["texts"]) == 0


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["prune", "no/such/model", "--out", "x"], 2),
        (["prune", "tiny"], 2),
        (["prune", "tiny", "--out", "x", "--sparsity", "2"], 2),
        (["prun"], 2),
        (["run", "absent.yaml", "--out", "x"], 2),
        (["why", "x", "--run", "absent"], 2),
        (["prune", "tiny", "--out", "x", "-O", "alpha"], 2),
    ],
)
def test_exit_codes_and_no_traceback(words, code, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(words) == code
    shown = capsys.readouterr().err
    assert shown
    assert "Traceback" not in shown
    assert not list(tmp_path.iterdir())


def test_errors_as_json(capsys):
    code, out = output(capsys, ["prune", "tiny", "--out", "x", "--sparsity", "50", "--json"])
    assert code == 2
    record = json.loads(out)
    assert record["field"] == "sparsity"
    assert "0.5" in record["fix"]


@pytest.mark.parametrize("name", [*COMMANDS, "methods", "texts"])
def test_help_has_an_example(name, capsys):
    word = {"evaluate": "eval"}.get(name, name)
    code, out = output(capsys, [word, "--help"])
    assert code == 0
    assert "secateur " in out


def test_importing_and_help_do_not_import_torch():
    code = (
        "import sys, secateur, secateur.cli; secateur.cli.main(['--help']); "
        "heavy = {'torch', 'transformers', 'scipy'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("flag", ["--version", "-V"])
def test_the_version_is_told(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([flag]) == 0
    assert capsys.readouterr().out == f"secateur {secateur.__version__}\n"


def test_ctrl_c_says_how_to_go_on(capsys, monkeypatch, tmp_path):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("secateur.run.verifying.verify_run", interrupted)
    assert main(["verify", str(tmp_path)]) == 130
    assert "the same command goes on where it stopped" in capsys.readouterr().err
