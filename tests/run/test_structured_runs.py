"""Structured runs end to end: forms, chaining, resume, verification, bad input."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch

import secateur
from secateur.errors import UsageError, VerificationError
from secateur.masks.structured import structure_of
from secateur.methods import methods
from secateur.methods.structured_base import StructuredMethod, UnitDecision, UnitProblem, lowest
from secateur.models.tiny import tiny_model, tiny_tokenizer
from secateur.run.verifying import verify_run

IDS = torch.randint(4, 200, (6, 24), generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class LeastSquares(StructuredMethod):
    """Smallest norm goes; the reader is refitted to what it gave before."""

    name = "least-squares"
    summary = "for these tests"
    driver: ClassVar[Literal["score", "blocks"]] = "blocks"
    kinds = frozenset({"head", "kv_group", "ffn"})

    fail_at: int = -1

    def decide(self, problem: UnitProblem) -> UnitDecision:
        if problem.block == self.fail_at:
            raise KeyboardInterrupt
        columns = problem.weight.square().sum(0)
        score = columns[problem.columns].sum(1)
        gone = lowest(score, problem.count, problem.gone, problem.even)
        keep = torch.ones(problem.weight.shape[1], dtype=torch.bool)
        keep[problem.columns[gone].reshape(-1)] = False
        gram = problem.moments.gram
        assert gram is not None
        gram = gram + 0.01 * gram.diagonal().mean() * torch.eye(len(gram))
        fitted = torch.zeros_like(problem.weight)
        fitted[:, keep] = torch.linalg.solve(
            gram[keep][:, keep], (problem.weight @ gram)[:, keep].T
        ).T
        return UnitDecision(gone, fitted, score, {"damping": 0.01})


methods.register("least-squares", LeastSquares)


def run(model: Any = None, **settings: Any) -> Any:
    loaded = tiny_model("llama", num_hidden_layers=3) if model is None else model
    settings = {"method": "unit-magnitude", "sparsity": 0.5, **settings}
    given = {} if isinstance(loaded, str | Path) else {"tokenizer": tiny_tokenizer()}
    return secateur.prune(loaded, **given, calibration=IDS, **settings)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(input_ids=IDS[:2]).logits
    return out


def test_uneven_widths_need_a_manifest(tmp_path: Path) -> None:
    result = run(out=tmp_path / "a", structure={"ranking": "global"}, sparsity=0.4)
    assert not result.report["structure"]["form"]["stock"]
    again = secateur.load_pruned(tmp_path / "a")
    torch.testing.assert_close(logits(again), logits(result.model))
    assert again.config.use_cache
    first = again.generate(IDS[:2], max_new_tokens=5, do_sample=False, pad_token_id=0)
    plain = again.generate(
        IDS[:2], max_new_tokens=5, do_sample=False, pad_token_id=0, use_cache=False
    )
    assert torch.equal(first, plain)
    widths = {r["after"] for r in result.report["structure"]["groups"] if r["kind"] == "ffn"}
    assert len(widths) > 1
    assert "checks" in verify_run(tmp_path / "a")
    for page in ("report.html", "report.md"):
        text = (tmp_path / "a" / page).read_text()
        assert "What is left of each group" in text
        assert "secateur.load" in text


def test_uniform_is_a_stock_checkpoint_even_where_heads_do_not_divide(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = tiny_model("llama", num_attention_heads=12, num_key_value_heads=12, head_dim=4)
    structure = {"uniform": True, "kinds": ["head", "ffn"]}
    result = run(model, out=tmp_path / "a", structure=structure, sparsity=5 / 12)
    form = result.report["structure"]["form"]
    assert form["stock"]
    assert form["architecture"] == "MistralForCausalLM"  # 48 is no multiple of 7 heads
    assert json.loads((tmp_path / "a/config.json").read_text())["num_attention_heads"] == 7
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert torch.equal(logits(again), logits(result.model))
    plain = run(out=tmp_path / "b", structure=structure)
    assert plain.report["structure"]["form"]["architecture"] == "LlamaForCausalLM"


@pytest.mark.parametrize("family", ["gpt2", "opt", "bloom", "qwen3", "phi3", "gemma3"])
def test_every_family_comes_back(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    result = run(model, out=tmp_path / "a", method="unit-random", sparsity=0.5)
    torch.testing.assert_close(
        logits(secateur.load_pruned(tmp_path / "a")), logits(result.model), rtol=1e-4, atol=1e-5
    )


def test_stem_and_layers_come_back(tmp_path: Path) -> None:
    for family, kinds in (("llama", ["stem"]), ("gemma3", ["stem"]), ("gpt2", ["layer", "stem"])):
        model = tiny_model(family, **({"n_layer": 4} if family == "gpt2" else {}))
        result = run(
            model,
            out=tmp_path / family,
            structure={"kinds": kinds},
            evaluation={"text": "pydoc:test", "windows": 1, "length": 32, "speed": False},
        )
        assert result.report["quality"]["dense"]["perplexity"] > 0
        again = secateur.load_pruned(tmp_path / family)
        torch.testing.assert_close(logits(again), logits(result.model), rtol=1e-4, atol=1e-5)


def test_chained_runs_count_in_the_original_model(tmp_path: Path) -> None:
    first = run(out=tmp_path / "a", structure={"kinds": ["ffn"]}, sparsity=0.25)
    gone = {k: v.clone() for k, v in structure_of(first.model).gone.items()}
    second = run(str(tmp_path / "a"), out=tmp_path / "b", method="unit-random", sparsity=0.5)
    after = structure_of(second.model)
    assert after is not None
    for key, mask in gone.items():
        assert len(after.gone[key]) == 96  # of the original, not of what was left
        assert bool(after.gone[key][mask].all())
        assert int(after.gone[key].sum()) == 24 + 36
    again = secateur.load_pruned(tmp_path / "b")
    assert structure_of(again) == after
    torch.testing.assert_close(logits(again), logits(second.model))
    verify_run(tmp_path / "b")


def test_single_weights_of_a_cut_model(tmp_path: Path) -> None:
    """A structured folder is a model like any other: prune its weights, and it still opens."""
    run(out=tmp_path / "a", structure={"ranking": "global"}, sparsity=0.4)
    second = run(str(tmp_path / "a"), out=tmp_path / "b", method="wanda", sparsity=0.5)
    again = secateur.load_pruned(tmp_path / "b")
    torch.testing.assert_close(logits(again), logits(second.model))
    assert structure_of(again) == structure_of(second.model)
    assert verify_run(tmp_path / "b")["masked"] > 0
    with pytest.raises(UsageError, match="shapes of their own"):
        run(str(tmp_path / "a"), out=tmp_path / "c", method="magnitude", stream=True)


def test_training_follows_a_cut(tmp_path: Path) -> None:
    """The cut folder is trained by a run that removes nothing more."""
    run(out=tmp_path / "a", structure={"ranking": "global"}, sparsity=0.4)
    result = run(
        str(tmp_path / "a"),
        out=tmp_path / "b",
        method="magnitude",
        sparsity=0.0,
        recovery={"method": "lora", "steps": 3, "length": 24, "rank": 2},
    )
    again = secateur.load_pruned(tmp_path / "b")
    torch.testing.assert_close(logits(again), logits(result.model), rtol=1e-4, atol=1e-5)
    assert not torch.equal(logits(again), logits(secateur.load_pruned(tmp_path / "a")))


def test_why_and_plan_speak_plainly(tmp_path: Path) -> None:
    from secateur.recipe import Recipe
    from secateur.run.forecast import forecast
    from secateur.run.results import explain

    run(out=tmp_path / "a")
    told = explain(tmp_path / "a", "layers.1.mlp")
    assert told["group"]["removed"] == len(told["gone"]) == told["group"]["before"] // 2
    with pytest.raises(UsageError, match="no such group"):
        explain(tmp_path / "a", "nothing")
    with pytest.raises(UsageError, match="planned in its run"):
        forecast(Recipe.build({"model": "tiny", "method": "unit-magnitude"}))


def test_blocks_driver_repairs_and_resumes(tmp_path: Path, monkeypatch: Any) -> None:
    import secateur.run.structured_blocks as blocks

    monkeypatch.setattr(blocks, "BOUNDARY_SECONDS", 0.0)
    whole = run(out=tmp_path / "a", method="least-squares")
    plain = run(method="unit-magnitude")
    dense = logits(tiny_model("llama", num_hidden_layers=3))
    assert (logits(whole.model) - dense).norm() < (logits(plain.model) - dense).norm()
    with pytest.raises(KeyboardInterrupt):
        run(out=tmp_path / "b", method="least-squares", options={"fail_at": 2})
    assert not (tmp_path / "b" / "model.safetensors.index.json").exists()
    marker = tmp_path / "b" / "secateur" / "run.json"
    record = json.loads(marker.read_text())
    record["recipe.options"] = {}
    marker.write_text(json.dumps(record))
    run(out=tmp_path / "b", method="least-squares")
    events = (tmp_path / "b/secateur/events.jsonl").read_text()
    assert '"resumed", "blocks": 2' in events
    for file in sorted((tmp_path / "a").glob("*.safetensors")):
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_dense_target_is_offered(tmp_path: Path) -> None:
    result = run(method="least-squares", reconstruct="dense", structure={"kinds": ["ffn"]})
    assert result.report["totals"]["delivered"] == pytest.approx(0.5)


@dataclass(frozen=True)
class InRounds(StructuredMethod):
    """Scores in three rounds; may be killed in one of them."""

    name = "in-rounds"
    summary = "for these tests"
    needs_data = False

    fail_at: int = -1

    @property
    def rounds(self) -> int:
        return 3

    def scores(self, job: Any) -> dict[str, torch.Tensor]:
        if job.round == self.fail_at:
            raise KeyboardInterrupt
        return {
            g.key: torch.arange(g.n_units, dtype=torch.float32).roll(job.round) for g in job.groups
        }


methods.register("in-rounds", InRounds)


def test_rounds_resume(tmp_path: Path) -> None:
    structure = {"kinds": ["ffn"]}
    whole = run(out=tmp_path / "a", method="in-rounds", structure=structure)
    with pytest.raises(KeyboardInterrupt):
        run(out=tmp_path / "b", method="in-rounds", structure=structure, options={"fail_at": 2})
    marker = tmp_path / "b" / "secateur" / "run.json"
    record = json.loads(marker.read_text())
    record["recipe.options"] = {}
    marker.write_text(json.dumps(record))
    again = run(out=tmp_path / "b", method="in-rounds", structure=structure)
    assert structure_of(whole.model) == structure_of(again.model)
    assert '"rounds": 2' in (tmp_path / "b/secateur/events.jsonl").read_text()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"sparsity": 0.99}, "without emptying a group"),
        ({"sparsity": "2:4"}, "no N:M pattern"),
        ({"scope": "row"}, "no meaning"),
        ({"update": "exact"}, "no meaning"),
        ({"include": ["*.mlp.*"]}, "by kind and block"),
        ({"structure": {"kinds": ["heads"]}}, "kinds"),
        ({"structure": {"round_to": 7}}, "does not divide"),
        ({"structure": {"protect": [9]}}, "3 blocks"),
        ({"structure": {"protect": [0, 1, 2]}}, "every block is protected"),
        ({"structure": {"at_least": 3}}, "only 2 key-value groups"),
        ({"structure": {"ranking": "global", "uniform": True}}, "its own width"),
        ({"structure": {"kinds": ["head"], "gqa": "even", "ranking": "global"}}, "evenly"),
        ({"structure": {"align": True, "round_to": 8}}, "alignment moves"),
        ({"structure": {"width": 3}}, "no such setting"),
        ({"structure": {"align": True, "ranking": "global"}}, "its own width"),
        ({"structure": {"target_kind": "latency", "context": 999}}, "128 positions"),
        ({"method": "least-squares", "structure": {"kinds": ["stem"]}}, "does not cut stem"),
        ({"method": "magnitude", "structure": {"uniform": True}}, "removes single weights"),
    ],
)
def test_bad_input(settings: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=words):
        run(out=tmp_path / "a", **settings)
    assert not (tmp_path / "a").exists()  # refused before any work: nothing is left behind


def test_multi_query_has_no_groups() -> None:
    with pytest.raises(UsageError, match="share one key-value head"):
        run(tiny_model("falcon"))
    result = run(tiny_model("falcon"), structure={"gqa": "even"})
    assert result.report["totals"]["delivered"] == pytest.approx(0.5)


def test_a_layer_down_to_its_last_group_keeps_it(tmp_path: Path) -> None:
    """A cut model whose layers differ can be cut again, whatever some have left."""
    structure = {"kinds": ["head"], "ranking": "global"}
    first = run(out=tmp_path / "a", structure=structure, sparsity=1 / 6)
    assert sorted(r["after"] for r in first.report["structure"]["groups"]) == [1, 2, 2]
    second = run(str(tmp_path / "a"), structure=structure, sparsity=0.4)
    assert [r["after"] for r in second.report["structure"]["groups"]] == [1, 1, 1]
    with pytest.raises(UsageError, match="the only group"):
        run(second.model, structure=structure, sparsity=0.3)


def test_a_manifest_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    run(out=tmp_path / "a", structure={"ranking": "global"}, sparsity=0.4)
    with pytest.raises(UsageError, match="built from its manifest"):
        secateur.load_pruned(tmp_path / "a", device_map="auto")
    path = tmp_path / "a" / "pruning_manifest.json"
    good = json.loads(path.read_text())

    def broken(change: Any) -> Path:
        record = json.loads(json.dumps(good))
        change(record)
        shutil.rmtree(tmp_path / "b", ignore_errors=True)
        shutil.copytree(tmp_path / "a", tmp_path / "b")
        (tmp_path / "b" / "pruning_manifest.json").write_text(json.dumps(record))
        return tmp_path / "b"

    key = "model.layers.0.mlp"
    with pytest.raises(VerificationError, match="its manifest says"):
        secateur.load_pruned(broken(lambda r: r["groups"][key].update(kept=[1, 2])))
    with pytest.raises(UsageError, match="no group of that name"):
        secateur.load_pruned(broken(lambda r: r["groups"].update(x=r["groups"].pop(key))))
    with pytest.raises(UsageError, match="counts 500 units"):
        secateur.load_pruned(broken(lambda r: r["groups"][key].update(of=500)))
    with pytest.raises(UsageError, match="format 9"):
        secateur.load_pruned(broken(lambda r: r.update(format=9)))
    with pytest.raises(UsageError, match="not a structured mask"):
        secateur.load_pruned(broken(lambda r: r.pop("groups")))
    with pytest.raises(UsageError, match="cannot have had -3 units"):
        secateur.load_pruned(broken(lambda r: r["groups"][key].update(of=-3)))
    for field in ("stock", "architecture", "original_config"):
        with pytest.raises(UsageError, match="not a pruning manifest"):
            secateur.load_pruned(broken(lambda r, field=field: r.pop(field)))
    with pytest.raises(UsageError, match="not a pruning manifest"):
        secateur.load_pruned(broken(lambda r: r.update(original_config=[])))
    last_gone = {"model.layers": {"of": 3, "kept": [0, 1]}}
    for name in list(good["groups"]):
        if ".2." in name:
            last_gone[name] = good["groups"][name]
    with pytest.raises(VerificationError, match="says is gone"):
        secateur.load_pruned(broken(lambda r: r["groups"].update(last_gone)))
    folder = broken(lambda r: None)
    shard = sorted(folder.glob("model-block-*.safetensors"))[0]
    shard.unlink()
    with pytest.raises(secateur.SecateurError):
        secateur.load_pruned(folder)
    report = tmp_path / "a" / "secateur" / "result.json"
    record = json.loads(report.read_text())
    record["structure"]["groups"][0]["after"] += 1
    report.write_text(json.dumps(record))
    with pytest.raises(VerificationError, match="units stay"):
        verify_run(tmp_path / "a", load_model=False)


@pytest.mark.parametrize("kind", ["parameters", "flops"])
def test_other_targets_are_met(kind: str) -> None:
    result = run(sparsity=0.2, structure={"target_kind": kind, "kinds": ["ffn"]})
    target = result.report["structure"]["target"]
    assert target["delivered"] == pytest.approx(0.2, abs=0.005)


def test_latency_is_a_target() -> None:
    """That it ends, and says what it did; how close it comes is the machine's affair."""
    wide = tiny_model("llama", num_hidden_layers=2, intermediate_size=4096)
    result = run(wide, sparsity=0.05, structure={"target_kind": "latency", "context": 64})
    assert any("latency:" in note for note in result.report["notes"])


@pytest.mark.parametrize("rule", [{"round_to": 32}, {"at_least": 40, "kinds": ["ffn"]}])
def test_a_time_is_sought_within_what_may_go(rule: dict[str, Any], monkeypatch: Any) -> None:
    """The search starts at the largest cut, which rounding and floors make smaller."""
    import secateur.run.latency as latency

    def count(model: Any, *_: Any) -> float:
        return float(sum(p.numel() for p in model.parameters()))

    monkeypatch.setattr(latency, "prefill_seconds", count)
    structure = {"target_kind": "latency", "context": 64, "protect": [0], **rule}
    result = run(sparsity=0.1, structure=structure)
    sizes = result.report["structure"]["parameters"]
    assert sizes["after"] / sizes["before"] == pytest.approx(0.9, abs=0.04)


def test_widths_are_rounded_and_blocks_protected() -> None:
    structure = {"round_to": 8, "protect": [0, -1]}
    result = run(sparsity=0.3, structure=structure)
    target = result.report["structure"]["target"]
    assert target["delivered"] == pytest.approx(0.3, abs=0.03)  # of the block that may be cut
    assert result.report["totals"]["delivered"] == pytest.approx(0.1, abs=0.01)
    for row in result.report["structure"]["groups"]:
        if row["block"] in (0, 2):
            assert row["removed"] == 0
        elif row["kind"] == "ffn":
            assert row["after"] % 8 == 0
