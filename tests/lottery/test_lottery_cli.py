"""The command line: find, verify, certify, experiment; clear errors and exit codes."""

import json

import pytest
import torch
from typer.testing import CliRunner

from secateur.cli.lottery import app
from secateur.errors import SecateurError, UsageError, VerificationError
from secateur.lottery import save_network

runner = CliRunner()


def run(*words):
    result = runner.invoke(app, [str(w) for w in words])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture
def network(small_net, tmp_path):
    save_network(small_net, tmp_path / "net.safetensors")
    return tmp_path / "net.safetensors"


def test_find_then_verify(network, tmp_path):
    ticket, page = tmp_path / "t.safetensors", tmp_path / "t.html"
    found = run("find", network, "--eps", 0.5, "--out", ticket, "--page", page, "--json")
    record = json.loads(found.stdout)
    assert record["certificate"]["bound"] <= 0.5
    assert record["size"]["kept"] < record["size"]["random"]
    assert page.exists()
    assert run("verify", ticket, "--target", network).exit_code == 0
    checks = json.loads(run("verify", ticket, "--json").stdout)
    assert checks["holds"]
    assert len(checks["checks"]) >= 5


@pytest.mark.parametrize("kind", ["subset-sum", "malach", "copies"])
def test_every_construction(kind, network, tmp_path):
    ticket = tmp_path / "t.safetensors"
    words = ("find", network, "-c", kind, "--weight-eps", 0.05, "-o", ticket)
    assert "proved, zonotope" in run(*words, "--method", "zonotope").stdout
    assert "ok" in run("verify", ticket).stdout


def test_options_and_estimates(network):
    base = ("find", network, "--weight-eps", 0.01, "--estimate", "--json")
    shared = json.loads(run(*base).stdout)
    own = json.loads(run(*base, "-O", "pools=independent", "-O", "base=3/2").stdout)
    assert own["neurons"] > shared["neurons"]
    assert "neurons" in run(*base[:-1]).stdout


def test_certify_a_pruning(network, small_net, tmp_path):
    pruned = tmp_path / "pruned.safetensors"
    matrices = [layer.matrix.clone() for layer in small_net.layers]
    matrices[0][0, 0] = 0.0
    save_network(small_net.with_matrices(matrices), pruned)
    record = json.loads(run("certify", network, pruned, "--domain=-1,1", "--json").stdout)
    assert 0 < record["empirical"] <= record["bound"]
    assert "at most" in run("certify", network, pruned, "--method", "interval").stdout


def test_verify_refuses_a_forgery(network, tmp_path):
    from safetensors import safe_open
    from safetensors.torch import save_file

    ticket = tmp_path / "t.safetensors"
    run("find", network, "--eps", 0.5, "--out", ticket)
    with safe_open(ticket, "pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    tensors["witness"] = torch.zeros_like(tensors["witness"]) - 5
    save_file(tensors, ticket, metadata)
    with pytest.raises(VerificationError):
        run("verify", ticket)
    assert run("verify", ticket, "--json").exit_code == 1


def test_experiments(tmp_path):
    record = json.loads(run("experiment", "success", "--quick", "-o", tmp_path, "--json").stdout)
    assert record["success"]["findings"]
    assert (tmp_path / "success.html").exists()


@pytest.mark.parametrize(
    "words",
    [
        ("find", "digits", "--eps", -1, "-o", "x"),
        ("find", "digits", "-o", "x"),
        ("find", "he:4-2", "--eps", 1),
        ("find", "he:4", "--eps", 1, "-o", "x"),
        ("find", "he:4-two", "--eps", 1, "-o", "x"),
        ("find", "missing.safetensors", "--eps", 1, "-o", "x"),
        ("find", "he:4-2", "--eps", 1, "-c", "lgo", "-o", "x"),
        ("find", "he:4-2", "--eps", 1, "-O", "colour=red", "-o", "x"),
        ("find", "he:4-2", "--eps", 1, "--domain", "0,inf", "-o", "x"),
        ("find", "he:4-2", "--eps", 1, "--domain", "0", "-o", "x"),
        ("find", "he:4-2", "--eps", 1, "--seed", -3, "-o", "x"),
        ("find", "he:4-2", "--eps", 1, "--method", "guess", "-o", "x"),
        ("experiment", "astrology", "-o", "x"),
        ("certify", "he:4-2", "he:4-3"),
    ],
    ids=lambda words: " ".join(map(str, words)),
)
def test_bad_requests(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as caught:
        run(*words)
    assert caught.value.exit_code == 2
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SecateurError):
        run("find", "he:3-2", "--weight-eps", 0.1, "-o", tmp_path / "file" / "t.safetensors")


def test_help_has_examples():
    for command in ("find", "verify", "certify", "experiment"):
        assert "secateur lottery" in run(command, "--help").stdout
