"""SlimGPT in whole runs: every kind of family, orderings on a trained model, the command line."""

import json

import pytest
import torch

import secateur
from secateur.cli import main
from secateur.errors import UsageError
from secateur.models.loading import load
from secateur.models.tiny import tiny_model


def ids(windows=8, length=24, seed=0):
    return torch.randint(4, 260, (windows, length), generator=torch.Generator().manual_seed(seed))


def prune(model, sparsity=0.25, **settings):
    return secateur.prune(
        model, method="slimgpt", calibration=ids(), samples=8, sparsity=sparsity, **settings
    )


@pytest.mark.parametrize("family", ["llama", "qwen3", "opt", "gpt2", "gpt_neox", "phi3"])
def test_every_layout_is_cut_and_runs(family):
    """GQA, q/k norms, biases, Conv1D, fused qkv and gate_up."""
    result = prune(tiny_model(family), 0.3)
    report = result.report
    assert report["totals"]["delivered"] == pytest.approx(0.3, abs=0.15)
    assert any(g["removed"] for g in report["structure"]["groups"])
    assert report["structure"]["parameters"]["after"] < report["structure"]["parameters"]["before"]
    with torch.no_grad():
        assert bool(torch.isfinite(result.model(input_ids=ids(2)).logits).all())


def test_nothing_removed_leaves_the_logits_bit_for_bit():
    """Oracle 6."""
    model = tiny_model("llama")
    with torch.no_grad():
        before = model(input_ids=ids(2)).logits
        after = prune(model, 0.0).model(input_ids=ids(2)).logits
    assert torch.equal(before, after)


def test_refitted_blocks_stay_nearer_than_blocks_merely_cut():
    def error(**options):
        dense = tiny_model("opt")
        cut = prune(tiny_model("opt"), 0.4, options=options).model
        with torch.no_grad():
            gap = cut(input_ids=ids(8)).logits - dense(input_ids=ids(8)).logits
        return float(gap.square().mean())

    assert error() < 0.9 * error(compensate=False)


def test_same_number_of_heads_in_every_key_value_group():
    structure = {"kinds": ["head"], "gqa": "even"}
    result = prune(tiny_model("llama", num_attention_heads=8), 0.25, structure=structure)
    for group in result.report["structure"]["groups"]:
        assert group["removed"] % 2 == 0
    assert any(g["removed"] for g in result.report["structure"]["groups"])


def test_the_papers_schedule_takes_least_from_the_first_block():
    model = tiny_model("llama", num_hidden_layers=4, intermediate_size=160)
    allocation = {"name": "incremental", "first": 0.0625}
    result = prune(model, 0.3, allocation=allocation, structure={"kinds": ["ffn"]})
    removed = [g["removed"] for g in result.report["structure"]["groups"]]
    assert removed == sorted(removed)
    assert removed[0] == pytest.approx(0.0625 * 160, abs=1)
    assert sum(removed) == pytest.approx(0.3 * 4 * 160, abs=1)


def test_multi_query_attention_keeps_its_only_group():
    """Its heads can only go with ``gqa: even``; asked for groups it says so."""
    model = tiny_model("llama", num_key_value_heads=1)
    with pytest.raises(UsageError, match="even"):
        prune(model, 0.25)
    result = prune(model, 0.25, structure={"gqa": "even"})
    assert any(g["removed"] for g in result.report["structure"]["groups"])


def test_more_than_can_go_is_refused():
    with pytest.raises(UsageError):
        prune(tiny_model("llama"), 0.99)


def test_broken_weights_and_activations_are_named():
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(secateur.SecateurError, match=r"layers\.1|not finite|NaN"):
        prune(model)


def test_stories260k_orderings(data_folder):
    """At 50 %: {exact, slimgpt} < initial diagonal and < no compensation < magnitude."""
    folder = str(data_folder / "stories260k")
    torch.manual_seed(0)
    text = load(folder).model.generate(
        torch.full((96, 1), 1),
        do_sample=True,
        min_length=128,
        max_length=128,
        top_k=0,
        eos_token_id=None,
        pad_token_id=0,
    )

    def perplexity(method="slimgpt", **options):
        model = load(folder).model
        secateur.prune(
            model, method=method, calibration=text[:48], samples=48, sparsity=0.5, options=options
        )
        with torch.no_grad():
            logits = model(input_ids=text[48:]).logits[:, :-1]
        return float(
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), text[48:, 1:].flatten()).exp()
        )

    slim, exact = perplexity(), perplexity(head_score="exact")
    initial = perplexity(head_score="initial_diag")
    without = perplexity(compensate=False)
    magnitude = perplexity("unit-magnitude")
    assert min(slim, exact) <= initial
    assert max(slim, exact, initial) < 0.95 * without
    assert without < magnitude


def test_from_the_command_line_to_a_loaded_model(tmp_path, capsys):
    out = tmp_path / "slim"
    command = ["prune", "tiny", "--method", "slimgpt", "--sparsity", "0.25", "--out", str(out)]
    command += ["--samples", "4", "--length", "64", "--eval-length", "64", "--eval-windows", "2"]
    assert main([*command, "--no-speed", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["totals"]["delivered"] == pytest.approx(0.25, abs=0.01)
    assert record["quality"]["pruned"]["perplexity"] > record["quality"]["dense"]["perplexity"]
    model = secateur.load_pruned(out)
    assert sum(p.numel() for p in model.parameters()) == record["structure"]["parameters"]["after"]
    with torch.no_grad():
        assert bool(torch.isfinite(model(input_ids=ids(1)).logits).all())
