"""``secateur heads``: classifiers, feature encoders, encoder-decoders; and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import secateur
from secateur.cli import main
from secateur.data.samples import IGNORED, Samples, read_samples, sample_batches
from secateur.errors import UsageError
from secateur.models.tiny import randomise, tiny_tokenizer
from secateur.report import write_report

transformers = pytest.importorskip("transformers")
WORDS = ["red leaf", "green branch and root", "a thorn", "cut here", "grow", "seven roses in a row"]


def saved(folder: Path, kind: str) -> Path:
    if kind == "t5":
        config = transformers.T5Config(
            d_model=48, d_kv=12, num_heads=4, num_layers=2, d_ff=64, vocab_size=264,
            decoder_start_token_id=0, pad_token_id=0,
        )  # fmt: skip
        model: Any = transformers.T5ForConditionalGeneration(config)
    else:
        config = transformers.BertConfig(
            hidden_size=48, num_attention_heads=4, num_hidden_layers=3, intermediate_size=64,
            vocab_size=264, num_labels=3, max_position_embeddings=64,
        )  # fmt: skip
        classifier = kind == "classifier"
        model = (
            transformers.BertForSequenceClassification if classifier else transformers.BertModel
        )(config)
    randomise(model)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def rows(path: Path, **extra: Any) -> Path:
    lines = [
        {"text": text, **{key: value(n) for key, value in extra.items()}}
        for n, text in enumerate(WORDS * 2)
    ]
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return path


@pytest.mark.parametrize(
    ("kind", "extra", "options"),
    [
        ("classifier", {"label": lambda n: n % 3}, ["--rescore"]),
        ("encoder", {}, ["--uniform"]),
        (
            "t5",
            {"target": lambda n: WORDS[n % 6][::-1]},
            ["--kind", "encoder", "--kind", "decoder"],
        ),
    ],
)
def test_every_kind_of_model_is_cut_and_opens_again(
    kind: str, extra: Any, options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, data = saved(tmp_path / "model", kind), rows(tmp_path / "data.jsonl", **extra)
    out = tmp_path / "out"
    words = ["heads", str(model), "--data", str(data), "--share", "0.5", "--out", str(out)]
    capsys.readouterr()
    assert main([*words, *options, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["heads"]["removed"] == record["heads"]["of"] // 2
    assert record["parameters"]["after"] < record["parameters"]["before"]
    assert record["held_out"]["samples"] == 2
    again = secateur.load_pruned(out)
    assert sum(p.numel() for p in again.parameters()) == record["parameters"]["after"]
    page = (out / "report.html").read_text()
    assert record["layers"][0]["name"] in page
    assert "Score of each head" in page
    assert main(["verify", str(out)]) == 0
    assert "gives the recorded answers" in capsys.readouterr().out
    assert main(["why", record["layers"][0]["name"], "--run", str(out)]) == 0
    assert main(["report", str(out)]) == 0
    # and once more, from the pruned folder
    second = [
        "heads",
        str(out),
        "--data",
        str(data),
        "--share",
        "0.2",
        "--out",
        str(tmp_path / "2"),
    ]
    assert main(second) == 0
    assert "heads removed" in capsys.readouterr().out
    assert main(["verify", str(tmp_path / "2")]) == 0


def test_a_folder_whose_weights_changed_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, data = saved(tmp_path / "model", "encoder"), rows(tmp_path / "data.jsonl")
    out = tmp_path / "out"
    assert (
        main(["heads", str(model), "--data", str(data), "--share", "0.5", "--out", str(out)]) == 0
    )
    weights = load_file(out / "model.safetensors")
    key = next(k for k in weights if k.endswith("dense.weight"))
    weights[key] = weights[key].flip(0).contiguous()
    save_file(weights, out / "model.safetensors", {"format": "pt"})
    capsys.readouterr()
    assert main(["verify", str(out)]) == 1
    assert "answers differently" in capsys.readouterr().err
    assert main(["verify", "--quick", str(out)]) == 0


@pytest.mark.parametrize(("dense", "pruned"), [(0.0, 1.0), (None, 2.0), (1.0, float("nan"))])
def test_a_report_of_losses_that_do_not_compare(
    dense: float | None, pruned: float, tmp_path: Path
) -> None:
    model, data = saved(tmp_path / "model", "classifier"), rows(
        tmp_path / "data.jsonl", label=lambda n: n % 3
    )  # fmt: skip
    out = tmp_path / "out"
    assert main(["heads", str(model), "--data", str(data), "--out", str(out)]) == 0
    record = json.loads((out / "secateur" / "result.json").read_text())
    record["held_out"] |= {"dense": dense, "pruned": pruned}
    page = write_report(record, out)["html"].read_text()
    assert ("not a finite number" in page) == (dense is None or pruned != pruned)


def test_a_decoder_of_grouped_heads_verifies(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = tmp_path / "lines.txt", tmp_path / "out"
    data.write_text("\n".join(WORDS))
    assert main(["heads", "tiny", "--data", str(data), "--share", "0.4", "--out", str(out)]) == 0
    assert main(["verify", str(out)]) == 0
    assert "layers keep exactly" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("kind", "extra", "options", "word"),
    [
        ("encoder", {"label": lambda n: 0}, [], "no classifier"),
        ("classifier", {"label": lambda n: n}, [], "classes 0 to 2"),
        ("classifier", {"label": lambda n: 0}, ["--share", "1.5"], "sparsity"),
        ("classifier", {"label": lambda n: 0}, ["--kind", "cross"], "no such attention"),
        ("classifier", {"label": lambda n: 0}, ["--ranking", "best"], "ranking"),
        ("encoder", {"target": lambda n: "x"}, [], "belong together"),
        ("t5", {}, [], "belong together"),
    ],
)
def test_bad_requests_leave_no_folder(
    kind: str,
    extra: Any,
    options: list[str],
    word: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, data = saved(tmp_path / "model", kind), rows(tmp_path / "data.jsonl", **extra)
    out = tmp_path / "out"
    assert main(["heads", str(model), "-d", str(data), "-o", str(out), *options]) == 2
    said = capsys.readouterr().err
    assert word in said
    assert "Traceback" not in said
    assert not out.exists()


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "no sample"),
        ("nonsense", "line 1"),
        ('{"label": 1}', "line 1"),
        ('{"text": "a", "label": "1"}', "not int"),
        ('{"text": "a", "label": 1}\n{"text": "b"}', "line 2"),
        ('{"text": "a", "label": 1, "target": "b"}', "one of the two"),
    ],
)
def test_damaged_samples_are_named(text: str, word: str, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(text)
    with pytest.raises(UsageError, match=word):
        read_samples(path)


def test_samples_become_padded_batches(tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("one\n\ntwo words\n")
    assert read_samples(tmp_path / "lines.txt").texts == ["one", "two words"]
    samples = Samples(WORDS, targets=[w[:3] for w in WORDS])
    batches = sample_batches(samples, tiny_tokenizer(), length=9, size=4)
    assert [len(b["input_ids"]) for b in batches] == [4, 2]
    assert max(b["input_ids"].shape[1] for b in batches) == 9
    for batch in batches:
        real = batch["attention_mask"].bool()
        assert (batch["input_ids"][~real] == 0).all()
        assert torch.equal(batch["labels"] == IGNORED, batch["labels"] < 0)
