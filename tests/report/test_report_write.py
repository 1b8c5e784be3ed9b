"""The run's page, card and record: complete, safe, and honest when something is missing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from secateur.report import write_report
from secateur.report.facts import facts, headlines, loss_word, verdicts

Make = Callable[..., dict[str, Any]]
NASTY = "</script><script>alert(1)</script>\"'><img src=x onerror=alert(2)>|`{{7*7}}"
SECTIONS = ["quality", "sparsity", "masks", "cost", "modules", "reproduce"]


def test_every_section_is_there_and_nothing_comes_from_outside(
    result: Make, parse: Any, tmp_path: Path
) -> None:
    paths = write_report(result(), tmp_path)
    page = parse(paths["html"].read_text("utf-8"))
    assert [i for i in page.ids if i in SECTIONS] == SECTIONS
    assert all(a.startswith("data:") for a in page.addresses)
    assert not page.handlers
    for words in ("19.83", "31.06", "3f9a1c07", "secateur prune demo", "verified", "AMD EPYC"):
        assert words in page.text
    assert page.tags.count("svg") > 12
    assert len(set(page.ids)) == len(page.ids)


def test_every_matrix_is_in_the_table(result: Make, parse: Any, tmp_path: Path) -> None:
    run = result(blocks=3)
    page = parse(write_report(run, tmp_path)["html"].read_text("utf-8"))
    assert page.tags.count("tr") == 1 + len(run["modules"])
    assert all(m["name"] in page.text for m in run["modules"])


def test_hostile_names_stay_text(result: Make, parse: Any, tmp_path: Path) -> None:
    run = result(blocks=2)
    run["modules"][0]["name"] = run["model"]["name"] = run["command"] = NASTY
    run["modules"][0]["role"] = run["modules"][0]["scope"] = NASTY
    run["modules"][0]["notes"] = run["notes"] = [NASTY]
    run["quality"]["protocol"] = {NASTY: NASTY}
    run["machine"] = {NASTY: {NASTY: NASTY}}
    run["recipe"]["method"] = NASTY
    paths = write_report(run, tmp_path)
    html = paths["html"].read_text("utf-8")
    page = parse(html)
    assert page.tags.count("script") == 1
    assert "img" not in page.tags
    assert not page.handlers
    assert NASTY in page.text
    assert "49|" not in page.text
    markdown = paths["markdown"].read_text("utf-8")
    body = markdown.split("---\n", 2)[2].split("```")
    assert "<script>" not in body[0] + body[2]
    assert front_matter(markdown)["tags"][-1] == NASTY


def test_the_policy_names_the_script_it_allows(result: Make, tmp_path: Path) -> None:
    import base64
    import hashlib
    import re

    html = write_report(result(blocks=2), tmp_path)["html"].read_text("utf-8")
    script = re.search(r"<script>(.*?)</script>", html, re.S)
    assert script is not None
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in html
    assert "default-src 'none'" in html


def front_matter(markdown: str) -> dict[str, Any]:
    head = markdown.split("---\n", 2)
    assert head[0] == ""
    loaded = yaml.safe_load(head[1])
    assert isinstance(loaded, dict)
    return loaded


def test_markdown_is_a_model_card(result: Make, tmp_path: Path) -> None:
    run = result(blocks=2)
    run["model"]["name"] = "HuggingFaceTB/SmolLM2-135M"
    markdown = write_report(run, tmp_path)["markdown"].read_text("utf-8")
    header = front_matter(markdown)
    assert header["base_model"] == "HuggingFaceTB/SmolLM2-135M"
    assert "sparsegpt" in header["tags"]
    metric = header["model-index"][0]["results"][0]["metrics"][0]
    assert metric["value"] == 31.06
    for heading in ("Quality", "Bytes on disk", "Speed", "How to get this again", "Matrices"):
        assert f"## {heading}" in markdown
    rows = [line for line in markdown.splitlines() if line.startswith("| model")]
    assert len(rows) == len(run["modules"])
    assert {line.count("|") for line in rows} == {6}


def test_json_is_the_record(result: Make, tmp_path: Path) -> None:
    run = result(blocks=2)
    run["timing"]["odd"] = float("nan")
    saved = json.loads(write_report(run, tmp_path)["json"].read_text("utf-8"))
    assert saved["timing"]["odd"] is None
    assert saved["modules"] == run["modules"]


@pytest.mark.parametrize(
    "part",
    ["quality", "size", "speed", "blocks", "modules", "timing", "machine", "memory_peak", "notes",
     "recipe", "totals", "command"],
)  # fmt: skip
def test_each_part_may_be_missing(part: str, result: Make, parse: Any, tmp_path: Path) -> None:
    for how in ("null", "absent"):
        run = result(blocks=2) | {part: None}
        if how == "absent":
            del run[part]
        paths = write_report(run, tmp_path)
        parse(paths["html"].read_text("utf-8"))
        front_matter(paths["markdown"].read_text("utf-8"))


def test_parts_of_modules_may_be_missing(result: Make, parse: Any, tmp_path: Path) -> None:
    run = result(blocks=2)
    for module in run["modules"]:
        module |= {"histogram": None, "picture": None, "output_error": None, "threshold": None}
        del module["seconds"], module["notes"]
    run["speed"]["decode"] = None
    run["quality"] |= {"kl": None, "dense": None}
    page = parse(write_report(run, tmp_path)["html"].read_text("utf-8"))
    assert "masks" not in page.ids
    assert "modules" in page.ids


def test_an_almost_empty_record_still_makes_a_page(parse: Any, tmp_path: Path) -> None:
    page = parse(write_report({}, tmp_path)["html"].read_text("utf-8"))
    assert "Quality was not measured" in page.text
    assert "not verified" in page.text


def test_wrong_counts_are_shouted(result: Make, parse: Any, tmp_path: Path) -> None:
    run = result(blocks=2)
    run["modules"][3]["delivered_count"] -= 1
    html = write_report(run, tmp_path)["html"].read_text("utf-8")
    assert "1 matrices got another count" in parse(html).text
    assert 'class="off"' in html
    assert "c-alert" in html


def test_verdicts_do_not_flatter(result: Make) -> None:
    text = " ".join(line for _, line in verdicts(result()))
    assert "a heavy loss" in text
    assert "The written folder is no smaller" in text
    unmeasured = " ".join(line for _, line in verdicts(result(speed=None, verified=False)))
    assert "Scattered zeros bring none with dense kernels" in unmeasured
    assert "have not been verified" in unmeasured


def test_speed_within_the_spread_is_no_headline(result: Make) -> None:
    run = result()
    assert headlines(run)[-1]["value"] == "≈ 1×"
    run["speed"]["decode"]["ratio"] = {"median": 1.6, "low": 1.5, "high": 1.7}
    assert headlines(run)[-1]["value"] == "1.60×"


def test_records_are_laid_flat_and_hashes_shortened() -> None:
    found = dict(facts({"text": {"name": "pydoc", "sha256": "ab" * 32}, "bos": True, "n": None}))
    assert found == {
        "text name": "pydoc",
        "text sha256": "abababababababab…",
        "bos": "yes",
        "n": "–",
    }


def test_loss_scale_never_softens() -> None:
    order = ["no loss by this measure", "hardly any loss", "a small loss", "a clear loss",
             "a heavy loss", "a ruined model"]  # fmt: skip
    assert [loss_word(r) for r in (0.99, 1.01, 1.05, 1.2, 2.0, 50.0)] == order


def test_pages_are_the_same_every_time(result: Make, tmp_path: Path) -> None:
    one, two = (write_report(result(blocks=2), tmp_path / n) for n in "ab")
    assert all(one[kind].read_bytes() == two[kind].read_bytes() for kind in one)


def test_size_of_a_large_page(result: Make, tmp_path: Path) -> None:
    assert write_report(result(blocks=32), tmp_path)["html"].stat().st_size < 1_000_000
